// Codes of 4, 3 and 2 bits under a mask. AVX-512 and AMX have the fastest of three arrangements, the reference and NEON
// the smaller of singles and all. Those under a mask have 4 bits and steps of four columns: even steps the low nibbles
// of bytes, odd ones the high nibbles.
// - singles: 64 bits of mask for each step. The kept codes are two streams in the same bytes, the low nibbles for all
//   even steps of a segment and the high nibbles for all odd ones, each from the end of the segment's mask on.
// - pairs: 64 bits of mask for two steps. A bit is a byte: a code of the even step and the one in the same place of the
//   odd step beside it. It is kept where either is; the other then is its zero point. `parameter` is kPairs.
// - all: every code in the bits of the file, handed over to dense_int4.cc, dense_int3.cc or dense_int2.cc.
#include "matmul/encodings/lists.h"

namespace rarefy::matmul {

constexpr int64_t kPairs = -1;  // lists of nm.h have positive ones

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

#include "common/cpu.h"

namespace rarefy::matmul {

// One row takes as long as memory takes for its bytes, but singles no less than as long as their arithmetic, which is
// given in bytes that memory delivers meanwhile, for 64 weights, without scales (docs/limits.md): on Zen 4 more than
// the 32 of all codes of 4 bits, so that singles are never faster than these. There few bytes of pairs hide their
// arithmetic in part. That of the others takes less than memory.
MaskedCodes fastest_masked_codes(int64_t num_weights, const MaskedBytes& bytes, bool half_width) {
    constexpr int64_t kSingles = 21, kSinglesHalfWidth = 33, kPairsHalfWidth = 11;
    const int64_t singles = std::max(bytes.singles, num_weights * (half_width ? kSinglesHalfWidth : kSingles) / 64);
    const int64_t pairs =
        half_width ? std::max(bytes.pairs, bytes.pairs / 2 + num_weights * kPairsHalfWidth / 64) : bytes.pairs;
    if (bytes.all <= singles && bytes.all <= pairs) return MaskedCodes::all;
    return pairs <= singles ? MaskedCodes::pairs : MaskedCodes::singles;
}

namespace {

MaskedBytes count_bytes(const PanelWeights& view, const DiskMask& mask, int64_t first, int num_rows) {
    constexpr uint64_t kEven = 0x0f0f0f0f0f0f0f0f;  // columns 0-3 of each 8 are in an even step, 4-7 in an odd one
    const int segment_columns = 4 * view.steps_per_segment;
    MaskedBytes bytes{};
    bytes.singles = view.num_blocks * kBlockInputs * kMaskBytes;
    bytes.pairs = bytes.singles / 2;
    for (int64_t block = 0; block < view.num_blocks; ++block) {
        int even[2] = {}, odd[2] = {};  // of the segments
        for (int64_t row = first; row < first + num_rows; ++row) {
            const uint64_t kept = mask.block(row, block);
            bytes.pairs += popcount((kept | kept >> 4) & kEven);
            for (int column = 0; column < kBlockInputs; column += segment_columns) {
                const uint64_t of_segment = segment_columns == kBlockInputs ? kept : kept >> column & 0xffffffff;
                even[column != 0] += popcount(of_segment & kEven);
                odd[column != 0] += popcount(of_segment & ~kEven);
            }
        }
        for (int i = 0; i < 2; ++i) bytes.singles += even[i] > odd[i] ? even[i] : odd[i];
    }
    return bytes;
}

// Lays a panel out in zeroed memory. Gives the steps that lists of all blocks take, where these are segments.
template <bool kInPairs>
int put_panel(const PanelWeights& view, const DiskValues& stored, int64_t panel, int num_rows, uint8_t* out) {
    constexpr int kPairMaskBytes = kInPairs ? 8 : 16;  // of a pair of steps
    const int segment_pairs = view.steps_per_segment / 2, segments = 8 / segment_pairs;
    const int64_t first = panel * kPanelOutputs;
    int64_t cursors[kPanelOutputs];
    for (int row = 0; row < num_rows; ++row) cursors[row] = stored.mask.row_starts[static_cast<size_t>(first + row)];
    uint8_t *masks = nullptr, *low = out, *high = out;  // where the next nibbles are
    int list_steps = 0;
    for (int64_t block = 0; block < view.num_blocks; ++block) {
        uint64_t row_masks[kPanelOutputs];
        for (int row = 0; row < num_rows; ++row) row_masks[row] = stored.mask.block(first + row, block);
        uint8_t zero_points[kPanelOutputs];
        int counts[kPanelOutputs] = {};  // of codes that are not the zero point
        for (int pair = 0; pair < 8; ++pair, masks += kPairMaskBytes) {
            if (pair % segment_pairs == 0) {
                masks = high > low ? high : low;
                low = high = masks + segment_pairs * kPairMaskBytes;
                const int64_t segment = block * segments + pair / segment_pairs;
                for (int row = 0; row < num_rows; ++row)
                    zero_points[row] = static_cast<uint8_t>(zero_point_of(view, panel, segment, row));
            }
            uint64_t step_masks[2] = {};
            for (int row = 0; row < num_rows; ++row) {
                const auto bits = static_cast<unsigned>(row_masks[row] >> (8 * pair) & 0xff);
                const unsigned even = bits & 15, odd = bits >> 4;
                uint8_t codes[8];
                std::memset(codes, zero_points[row], sizeof(codes));
                for (unsigned left = bits; left != 0; left &= left - 1) {
                    const uint8_t code = stored.code(cursors[row]++);
                    codes[__builtin_ctz(left)] = code;
                    counts[row] += code != zero_points[row];
                }
                if (kInPairs) {
                    step_masks[0] |= static_cast<uint64_t>(even | odd) << (4 * row);
                    for (unsigned left = even | odd; left != 0; left &= left - 1) {
                        const int i = __builtin_ctz(left);
                        *low++ = static_cast<uint8_t>(codes[i] | codes[4 + i] << 4);
                    }
                    continue;
                }
                step_masks[0] |= static_cast<uint64_t>(even) << (4 * row);
                step_masks[1] |= static_cast<uint64_t>(odd) << (4 * row);
                for (unsigned left = even; left != 0; left &= left - 1) *low++ |= codes[__builtin_ctz(left)];
                for (unsigned left = odd; left != 0; left &= left - 1)
                    *high++ |= static_cast<uint8_t>(codes[4 + __builtin_ctz(left)] << 4);
            }
            std::memcpy(masks, step_masks, kPairMaskBytes);
        }
        list_steps += steps_of_lists(counts);
    }
    return list_steps;
}

// Every code of the weight, as a dense layout has them: each row a run of codes of so many bits.
std::vector<uint8_t> all_codes(const Packing& packing, const MaskedSegments& segments, int num_bits) {
    const int64_t num_inputs = packing.view.num_inputs, row_bytes = ceil_div(num_inputs * num_bits, 8);
    std::vector<uint8_t> runs(static_cast<size_t>(packing.view.num_outputs * row_bytes));
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        segments.of_panel(panel, first, num_rows,
                          [&](int row, int64_t segment, const KeptEntries& kept, uint8_t zero_point) {
                              uint8_t codes[kBlockInputs];
                              std::memset(codes, zero_point, sizeof(codes));
                              for (int i = 0; i < kept.count; ++i) codes[kept.columns[i]] = kept.codes[i];
                              const int64_t begin = segment * segments.columns;
                              uint8_t* run = runs.data() + (first + row) * row_bytes + begin * num_bits / 8;
                              // Eight codes are whole bytes.
                              for (int i = 0; i < segments.columns && begin + i < num_inputs; i += 8, run += num_bits) {
                                  const int count = static_cast<int>(std::min<int64_t>(8, num_inputs - begin - i));
                                  uint32_t eight = 0;
                                  for (int j = 0; j < count; ++j)
                                      eight |= static_cast<uint32_t>(codes[i + j]) << (j * num_bits);
                                  std::memcpy(run, &eight, static_cast<size_t>(ceil_div(count * num_bits, 8)));
                              }
                          });
    });
    return runs;
}

Encoding dense_encoding(int num_bits) {
    if (num_bits == 2) return Encoding::dense_int2;
    return num_bits == 3 ? Encoding::dense_int3 : Encoding::dense_int4;
}

}  // namespace

void packers::mask_int4(Packing& packing) {
    const int num_bits = take_stored_bits(packing);
    if (has_no_expand(packing.isa())) return pack_lists_or_all<4>(packing, num_bits);
    const MaskedSegments segments(packing, num_bits);
    const DiskValues& stored = segments.stored;
    PanelWeights& view = packing.view;
    std::vector<MaskedBytes> of_panels(static_cast<size_t>(view.num_panels));
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        of_panels[static_cast<size_t>(panel)] = count_bytes(view, stored.mask, first, num_rows);
    });
    const int64_t num_weights = view.num_panels * kPanelOutputs * view.num_blocks * kBlockInputs;
    MaskedBytes bytes{0, 0, num_weights * num_bits / 8};
    for (const MaskedBytes& of_panel : of_panels) {
        bytes.singles += of_panel.singles;
        bytes.pairs += of_panel.pairs;
    }
    const bool has_pairs = packing.isa() >= Isa::avx512;
    MaskedCodes arrangement = packing.masked_codes();
    if (arrangement == MaskedCodes::fastest && has_pairs)
        arrangement = fastest_masked_codes(num_weights, bytes, common::has_half_width_units());
    else if (arrangement == MaskedCodes::fastest)
        arrangement = bytes.all <= bytes.singles ? MaskedCodes::all : MaskedCodes::singles;
    if (arrangement == MaskedCodes::all)
        return packing.hand_over(dense_encoding(num_bits), all_codes(packing, segments, num_bits));
    const bool in_pairs = has_pairs && arrangement == MaskedCodes::pairs;
    if (in_pairs) view.parameter = kPairs;
    int32_t* const list_steps = allocate_list_steps(packing);
    uint8_t* const values = packing.place_values([&](int64_t panel) {
        const MaskedBytes& of_panel = of_panels[static_cast<size_t>(panel)];
        return in_pairs ? of_panel.pairs : of_panel.singles;
    });
    packing.for_each_panel([&](int64_t panel, int64_t, int num_rows) {
        const auto put = in_pairs ? put_panel<true> : put_panel<false>;
        const int num_steps = put(view, stored, panel, num_rows, values + view.value_offsets[panel]);
        if (list_steps != nullptr) list_steps[panel] = num_steps;
    });
}

namespace reference {
namespace {

using Stream = CodeStream<true>;

}  // namespace

void mask_int4(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

void rarefy::matmul::avx2::mask_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_lists_or_all<4>(w, rows, part, dense_int4);
}

#elif RAREFY_PASS_AVX512

#include "matmul/encodings/mask_lists_avx512.h"

namespace rarefy::matmul::avx512 {
namespace {

template <bool kOneRow>
struct Singles : MaskedStream {
    static constexpr bool kFetchesNear = true;
    static constexpr int kFetchSteps = 8;
    static constexpr int kOddShift = 4;
    static constexpr bool kExpandsOnce = true;
    const uint8_t* high;
    void start(const PanelWeights& w, int64_t panel) {
        MaskedStream::start(w, panel);
        high = values;
    }
    void begin_segment(int num_columns) {
        if (high > values) values = high;
        MaskedStream::begin_segment(num_columns);
        high = values;
    }
    void fetch(int num_steps) const { prefetch<4096>(values, num_steps * 24); }
    void next(__m512i pruned, __m512i& even, __m512i& odd) {
        const uint64_t even_mask = load_mask<kOneRow>(mask), odd_mask = load_mask<kOneRow>(mask + 8);
        // Both nibbles are expanded, and the one of the other stream dropped after.
        even = _mm512_and_si512(_mm512_mask_expand_epi8(pruned, even_mask, load(values)), _mm512_set1_epi8(0x0f));
        odd = _mm512_and_si512(_mm512_mask_expand_epi8(pruned, odd_mask, load(high)),
                               _mm512_set1_epi8(static_cast<char>(0xf0)));
        values += _mm_popcnt_u64(even_mask);
        high += _mm_popcnt_u64(odd_mask);
        mask += 16;
    }
};

template <bool kOneRow>
struct Pairs : MaskedStream {
    static constexpr bool kFetchesNear = true;
    static constexpr int kFetchSteps = 8;
    static constexpr int kOddShift = 4;
    static constexpr bool kExpandsOnce = true;
    void begin_segment(int num_columns) { MaskedStream::begin_segment(num_columns / 2); }
    void fetch(int num_steps) const { prefetch<4096>(values, num_steps * 28); }
    void next(__m512i pruned, __m512i& even, __m512i& odd) {
        const uint64_t kept = load_mask<!kOneRow>(mask);  // half as many masks leave one row loads to spare
        const __m512i both = _mm512_mask_expand_epi8(pruned, kept, load(values));
        even = _mm512_and_si512(both, _mm512_set1_epi8(0x0f));
        odd = _mm512_and_si512(both, _mm512_set1_epi8(static_cast<char>(0xf0)));
        values += _mm_popcnt_u64(kept);
        mask += 8;
    }
};

}  // namespace

void mask_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.parameter == kPairs)
        multiply_masked<Pairs<true>, Pairs<false> >(w, rows, part);
    else
        multiply_masked<Singles<true>, Singles<false> >(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
void mask_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<CodeStream<true> >(w, rows, part);
}

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::mask_int4(const SampleSpec& spec) { return make_code_sample(spec, stored_bits(spec.format), true); }

}  // namespace rarefy::matmul

#endif
