// Codes under a mask for AVX2 and AVX-VNNI, which have no vpexpandb: all codes (dense.h), or lists of what is kept
// where those save 30 % of the bytes. Less is read and less multiplied, the more zeros there are; nothing is expanded.
// Many rows are multiplied by what is kept alone (lanes_avx2.h), from lists as from all codes.
//
// The lists of a segment have as many steps as the fullest of the panel's 16 outputs needs, four entries a step.
// Entries that are the zero point are left out; places that no entry takes have the zero point as their code. `extra`
// has the number of steps, a byte for each segment of each panel; `values` has the steps, one after the other:
//   64 bytes of columns within the segment, in the order of the vectors' bytes: 16 outputs, four entries each
//   the codes in that order: 64 bytes; or 32 bytes, outputs 0 to 7 in the low nibbles and 8 to 15 in the high ones
// Lists have an `extra`, all codes alone have none. With AVX-VNNI, whose dense kernel overtakes longer lists from two
// rows on, those have all codes besides: `mask`, and in `extra_offsets` where a panel begins.
#pragma once

#include "matmul/encodings/mask.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

inline bool has_no_expand(Isa isa) { return isa == Isa::avx2 || isa == Isa::avx_vnni; }

// What one output keeps of a segment, without what is zero.
struct KeptEntries {
    int count = 0;
    uint8_t columns[kBlockInputs], codes[kBlockInputs];
};

// The segments of a masked weight with codes of so many bits on disk.
struct MaskedSegments {
    const PanelWeights& view;
    const DiskValues stored;
    int columns;
    int64_t num_segments;  // of an output

    MaskedSegments(Packing& packing, int num_bits)
        : view(packing.view),
          stored(packing, "codes", Element::u8, num_bits),
          columns(4 * packing.view.steps_per_segment),
          num_segments(packing.view.num_blocks * (kBlockInputs / columns)) {}

    // Calls function(row, segment, entries, zero point) for all segments of a panel, row by row.
    template <class Function>
    void of_panel(int64_t panel, int64_t first, int num_rows, Function&& function) const {
        for (int row = 0; row < num_rows; ++row) {
            int64_t cursor = stored.mask.row_starts[static_cast<size_t>(first + row)];
            for (int64_t segment = 0; segment < num_segments; ++segment) {
                const int first_column = static_cast<int>(segment * columns % kBlockInputs);
                uint64_t bits = stored.mask.block(first + row, segment * columns / kBlockInputs) >> first_column;
                if (columns < kBlockInputs) bits &= (uint64_t{1} << columns) - 1;
                const int zero_point = zero_point_of(view, panel, segment, row);
                KeptEntries kept;
                for (; bits != 0; bits &= bits - 1) {
                    const uint8_t code = stored.code(cursor++);
                    if (code == zero_point) continue;
                    kept.columns[kept.count] = static_cast<uint8_t>(__builtin_ctzll(bits));
                    kept.codes[kept.count++] = code;
                }
                function(row, segment, kept, static_cast<uint8_t>(zero_point));
            }
        }
    }
};

// Codes of kBits, 4 or 8, stored as so many bits or fewer.
template <int kBits>
void pack_lists(Packing& packing, const MaskedSegments& segments, const uint8_t* steps) {
    constexpr int kStepBytes = 64 + 8 * kBits;
    uint8_t* const values = packing.place_values([&](int64_t panel) {
        int64_t sum = 0;
        for (int64_t i = 0; i < segments.num_segments; ++i) sum += steps[panel * segments.num_segments + i];
        return sum * kStepBytes;
    });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* const begin = values + packing.view.value_offsets[panel];
        uint8_t* out = begin;
        segments.of_panel(panel, first, num_rows,
                          [&](int row, int64_t segment, const KeptEntries& kept, uint8_t zero_point) {
                              if (segment == 0) out = begin;
                              const int places = 4 * steps[panel * segments.num_segments + segment];
                              for (int i = 0; i < places; ++i) {
                                  uint8_t* const step = out + i / 4 * kStepBytes;
                                  const uint8_t code = i < kept.count ? kept.codes[i] : zero_point;
                                  const int place = 4 * row + i % 4;
                                  step[place] = i < kept.count ? kept.columns[i] : 0;
                                  if (kBits == 8)
                                      step[64 + place] = code;
                                  else
                                      step[64 + place % 32] |= static_cast<uint8_t>(code << (place / 32 * 4));
                              }
                              out += places / 4 * kStepBytes;
                          });
    });
}

// As dense_int8.cc or dense_int4.cc has them.
template <int kBits>
void pack_all_codes(Packing& packing, const MaskedSegments& segments) {
    const int64_t panel_bytes = packing.view.num_blocks * kBlockInputs * kPanelOutputs * kBits / 8;
    uint8_t* const values = packing.place_values([&](int64_t) { return panel_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* const out = values + panel * panel_bytes;
        segments.of_panel(panel, first, num_rows,
                          [&](int row, int64_t segment, const KeptEntries& kept, uint8_t zero_point) {
                              uint8_t codes[kBlockInputs];
                              std::memset(codes, zero_point, sizeof(codes));
                              for (int i = 0; i < kept.count; ++i) codes[kept.columns[i]] = kept.codes[i];
                              for (int i = 0; i < segments.columns; ++i) {
                                  const int64_t step = (segment * segments.columns + i) / 4;
                                  const int place = 4 * row + i % 4;
                                  if (kBits == 8)
                                      out[step * 64 + place] = codes[i];
                                  else
                                      out[step / 2 * 64 + place] |= static_cast<uint8_t>(codes[i] << (step % 2 * 4));
                              }
                          });
    });
}

// The same of bfloat16, of which a row takes 72 cycles.
inline int64_t fewest_float_lane_rows(int64_t num_weights, int64_t num_kept) {
    const double kept_of_64 =
        64.0 * static_cast<double>(num_kept) / static_cast<double>(num_weights > 0 ? num_weights : 1);
    for (int64_t num_rows = 16; num_rows <= kTaskRows; num_rows += 16) {
        const double lanes = kPanelOutputs * (8 + 2.4 * kept_of_64) * static_cast<double>(ceil_div(num_rows, 32));
        if (600 + 16 * kept_of_64 + lanes < 72 * static_cast<double>(num_rows)) return num_rows;
    }
    return 0;
}

// What products with few rows go through.
enum class Kept { all_codes, lists, both };

// From how many rows on what is kept is faster (lanes_avx2.h), in cycles for a block of a panel, measured on Zen 5; 0:
// never. `steps`: of the lists, for 64 columns.
inline int64_t fewest_lane_rows(Isa isa, int num_bits, double kept_of_64, Kept few_rows, double steps) {
    const bool lists = few_rows != Kept::all_codes;
    const double dense = isa == Isa::avx_vnni ? 24 : num_bits == 4 ? 34 : 47;  // a row
    const double few = few_rows == Kept::lists ? 12 + 8 * steps : dense;
    const double begin = lists ? 60 * steps + (num_bits == 4 ? 200 : 100) : 1000 + 16 * kept_of_64;
    const double lanes = kPanelOutputs * (num_bits == 4 ? 4 + kept_of_64 : 8 + 1.8 * kept_of_64);  // 32 rows
    for (int64_t num_rows = 8; num_rows <= kTaskRows; num_rows += 8) {
        if (begin + lanes * static_cast<double>(ceil_div(num_rows, 32)) < few * static_cast<double>(num_rows))
            return num_rows;
    }
    return 0;
}

template <int kBits>
void pack_lists_or_all(Packing& packing, int stored_bits) {
    const MaskedSegments segments(packing, stored_bits);
    PanelWeights& view = packing.view;
    const int64_t num_counts = view.num_panels * segments.num_segments;
    std::vector<uint8_t> steps(static_cast<size_t>(num_counts), 0);
    std::vector<int64_t> kept_of_panels(static_cast<size_t>(view.num_panels), 0);
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        segments.of_panel(panel, first, num_rows, [&](int, int64_t segment, const KeptEntries& kept, uint8_t) {
            uint8_t& most = steps[static_cast<size_t>(panel * segments.num_segments + segment)];
            const auto needed = static_cast<uint8_t>((kept.count + 3) / 4);
            if (needed > most) most = needed;
            kept_of_panels[static_cast<size_t>(panel)] += kept.count;
        });
    });
    int64_t all_steps = 0, all_kept = 0;
    for (const uint8_t count : steps) all_steps += count;
    for (const int64_t count : kept_of_panels) all_kept += count;
    const int64_t num_blocks = view.num_panels * view.num_blocks;
    const int64_t code_bytes = num_blocks * kBlockInputs * kPanelOutputs * kBits / 8;
    const int64_t list_bytes = all_steps * (64 + 8 * kBits) + num_counts;
    const double blocks = static_cast<double>(num_blocks > 0 ? num_blocks : 1);
    const double mean_steps = static_cast<double>(all_steps) / blocks;
    constexpr double kShort = 2.2;  // steps of lists that few rows take as long for as for all codes
    const Kept few_rows = list_bytes >= code_bytes * 7 / 10                       ? Kept::all_codes
                          : packing.isa() == Isa::avx_vnni && mean_steps > kShort ? Kept::both
                                                                                  : Kept::lists;
    view.lane_rows = fewest_lane_rows(packing.isa(), kBits, static_cast<double>(all_kept) / blocks / kPanelOutputs,
                                      few_rows, mean_steps);
    const int64_t bytes_before = packing.num_bytes();
    if (few_rows != Kept::lists) pack_all_codes<kBits>(packing, segments);
    if (few_rows == Kept::all_codes) return;
    if (few_rows == Kept::both) {
        packing.leave_unread(packing.num_bytes() - bytes_before);
        view.mask = view.values;
        view.extra_offsets = view.value_offsets;
    }
    uint8_t* const extra = packing.allocate(num_counts);
    std::memcpy(extra, steps.data(), steps.size());
    view.extra = extra;
    pack_lists<kBits>(packing, segments, extra);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

#include "matmul/encodings/lists_avx2.h"

#endif
