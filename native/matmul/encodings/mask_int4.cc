// Codes of 4, 3 and 2 bits under a mask, all as 4 bits: steps of four columns, 64 bits of mask each. The kept codes are
// two streams in the same bytes, the low nibbles for all even steps of a segment and the high nibbles for all odd ones,
// each from the end of the segment's mask on.
#include "matmul/encodings/lists.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::mask_int4(Packing& packing) {
    const int num_bits = take_stored_bits(packing);
    if (has_no_expand(packing.isa()))
        pack_lists_or_all<4>(packing, num_bits);
    else
        pack_masked<4>(packing, "codes", Element::u8, num_bits);
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
struct Stream : MaskedStream {
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

}  // namespace

void mask_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_masked<Stream<true>, Stream<false> >(w, rows, part);
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
