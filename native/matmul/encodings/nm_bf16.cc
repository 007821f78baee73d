// bfloat16 under N:M: lists of entries for AVX-512 and AMX where a block keeps so few that a mask would cost more, or a
// mask.
//
// Every block keeps the same number of entries in every output, in the order in which sums take columns (contract.h).
// Two by two they make steps of 16 outputs: 32 bytes of columns (of the first entry in the high byte of an output, of
// the second one in the low byte), and 64 bytes of values in the same order, as vdpbf16ps takes them. A block has the
// columns of all its steps, then their values. Places that no entry takes are zeros at column 0. parameter: steps of a
// block; 0, and always on other instruction sets: no lists.
//
// Columns that no entry names must not hide a NaN or an infinity: sums start from Rows::starts, as with blocks.
#include "matmul/encodings/mask.h"

namespace rarefy::matmul {

constexpr int kListStepBytes = 96;

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::nm_bf16(Packing& packing) {
    constexpr int kMostEntries = 16;  // of 64, measured
    const int keep = static_cast<int>(packing.integer("keep", 1, 64));
    const int group = static_cast<int>(packing.integer("group", keep, 64));
    const int count = kBlockInputs % group == 0 ? kBlockInputs / group * keep : kBlockInputs;
    if (packing.isa() < Isa::avx512 || count > kMostEntries) {
        packers::mask_bf16(packing);
        return;
    }
    const DiskMask mask(packing);
    const uint8_t* entries = packing.take("values", Element::u16, mask.row_starts.back() * 2);
    PanelWeights& view = packing.view;
    for (int64_t row = 0; row < view.num_outputs; ++row)
        for (int64_t block = 0; block < view.num_blocks; ++block)
            require(popcount(mask.block(row, block)) <= count, "a block keeps too many entries");
    view.skips_blocks = true;
    view.parameter = ceil_div(count, 2);
    const int64_t block_bytes = view.parameter * kListStepBytes;
    uint8_t* const values = packing.place_values([&](int64_t) { return view.num_blocks * block_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        for (int row = 0; row < num_rows; ++row) {
            int64_t cursor = mask.row_starts[static_cast<size_t>(first + row)];
            uint8_t* columns = values + view.value_offsets[panel];
            for (int64_t block = 0; block < view.num_blocks; ++block, columns += block_bytes) {
                const uint64_t bits = mask.block(first + row, block);
                constexpr uint64_t kEven = 0x5555555555555555;
                uint64_t swapped = (bits & kEven) << 1 | (bits >> 1 & kEven);  // the odd column of two comes first
                for (int place = 0; swapped != 0; swapped &= swapped - 1, ++place) {
                    const int column = __builtin_ctzll(swapped) ^ 1;
                    const int64_t entry = cursor + popcount(bits & ((uint64_t{1} << column) - 1));
                    const int64_t lane = row * 2 + 1 - place % 2;
                    columns[place / 2 * 32 + lane] = static_cast<uint8_t>(column);
                    std::memcpy(columns + view.parameter * 32 + place / 2 * 64 + lane * 2, entries + entry * 2, 2);
                }
                cursor += popcount(bits);
            }
        }
    });
}

void reference::nm_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { mask_bf16(w, rows, part); }

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

void rarefy::matmul::avx2::nm_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    mask_bf16(w, rows, part);
}

#elif RAREFY_PASS_AVX512

#include "matmul/core_avx512.h"

namespace rarefy::matmul::avx512 {
namespace {

// kRows rows from `row` on by kPanels panels, `distance` apart.
template <int kRows, int kPanels>
void multiply_lists(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel,
                    int64_t distance) {
    const uint16_t* x = rows.bf16_x + row * rows.stride;
    const uint8_t* lists[kPanels];
    __m512 totals[kRows][kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        lists[p] = w.values + w.value_offsets[panel + p * distance];
        UNROLL for (int r = 0; r < kRows; ++r) { totals[r][p] = _mm512_set1_ps(rows.starts[row + r]); }
    }
    const int num_steps = static_cast<int>(w.parameter);
    for (int64_t block = 0; block < w.num_blocks; ++block, x += kBlockInputs) {
        __m512i first_half[kRows], second_half[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) {
            first_half[r] = load(x + r * rows.stride);
            second_half[r] = load(x + r * rows.stride + kBlockInputs / 2);
        }
        UNROLL for (int p = 0; p < kPanels; ++p) {
            if (fetches<kRows>()) prefetch<4096>(lists[p], num_steps * kListStepBytes);
            __m512 sums[kRows];
            UNROLL for (int r = 0; r < kRows; ++r) { sums[r] = _mm512_setzero_ps(); }
            const uint8_t* values = lists[p] + num_steps * 32;
            for (int step = 0; step < num_steps; ++step) {
                const __m512i columns =
                    _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lists[p] + step * 32)));
                const __m512i weights = load(values + step * 64);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512i gathered = _mm512_permutex2var_epi16(first_half[r], columns, second_half[r]);
                    sums[r] = add_pairs(sums[r], weights, gathered);
                }
            }
            lists[p] += num_steps * kListStepBytes;
            UNROLL for (int r = 0; r < kRows; ++r) { totals[r][p] = _mm512_add_ps(totals[r][p], sums[r]); }
        }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int64_t which = panel + p * distance;
            Lanes(w, which, part.y + (row + r) * part.y_stride + which * kPanelOutputs).store(totals[r][p]);
        }
    }
}

template <int kPanels>
void walk_lists(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    multiply_lists<1, kPanels>(w, rows, part, part.row_begin, panel, distance);
}

using ListRowsFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, int64_t panel,
                                  int64_t distance);
constexpr ListRowsFunction kListRows[] = {multiply_lists<1, 1>, multiply_lists<2, 1>, multiply_lists<3, 1>,
                                          multiply_lists<4, 1>};

// A few panels at a time, which stay in the L2 cache while all rows pass by.
void many_rows_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int64_t kGroupPanels = 8;
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + 3) / 4;
    for (int64_t begin = part.panel_begin; begin < part.panel_end; begin += kGroupPanels) {
        const int64_t end = begin + kGroupPanels < part.panel_end ? begin + kGroupPanels : part.panel_end;
        int64_t row = part.row_begin;
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t count = (num_rows + group) / num_groups;
            for (int64_t panel = begin; panel < end; ++panel) kListRows[count - 1](w, rows, part, row, panel, 0);
            row += count;
        }
    }
}

}  // namespace

void nm_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.parameter == 0)
        mask_bf16(w, rows, part);
    else if (part.row_end - part.row_begin == 1)
        walk_panels(w, rows, part, walk_lists<2>, walk_lists<1>);
    else
        many_rows_lists(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

void rarefy::matmul::neon::nm_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    mask_bf16(w, rows, part);
}

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::nm_bf16(const SampleSpec& spec) { return make_float_sample(spec, Element::u16, true); }

}  // namespace rarefy::matmul

#endif
