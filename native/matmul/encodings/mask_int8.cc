// 8-bit codes under a mask: steps of four columns as in dense_int8, 64 bits of mask each.
#include "matmul/encodings/lists.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::mask_int8(Packing& packing) {
    if (has_no_expand(packing.isa()))
        pack_lists_or_all<8>(packing, 8);
    else
        pack_masked<8>(packing, DiskValues(packing, "codes", Element::u8, 8));
}

namespace reference {
namespace {

using Stream = CodeStream<false>;

}  // namespace

void mask_int8(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

void rarefy::matmul::avx2::mask_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_lists_or_all<8>(w, rows, part, dense_int8);
}

#elif RAREFY_PASS_AVX512

#include "matmul/encodings/mask_lists_avx512.h"

namespace rarefy::matmul::avx512 {
namespace {

template <bool kOneRow>
struct Stream : MaskedStream {
    static constexpr int kFetchSteps = 8;
    static constexpr int kOddShift = 0;
    static constexpr bool kExpandsOnce = true;
    void fetch(int num_steps) const { prefetch<4096>(values, num_steps * 40); }
    void next(__m512i pruned, __m512i& even, __m512i& odd) {
        const uint64_t even_mask = load_mask<kOneRow>(mask), odd_mask = load_mask<kOneRow>(mask + 8);
        even = _mm512_mask_expand_epi8(pruned, even_mask, load(values));
        values += _mm_popcnt_u64(even_mask);
        odd = _mm512_mask_expand_epi8(pruned, odd_mask, load(values));
        values += _mm_popcnt_u64(odd_mask);
        mask += 16;
    }
};

}  // namespace

void mask_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_masked<Stream<true>, Stream<false> >(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
void mask_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<CodeStream<false> >(w, rows, part);
}

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::mask_int8(const SampleSpec& spec) { return make_code_sample(spec, 8, true); }

}  // namespace rarefy::matmul

#endif
