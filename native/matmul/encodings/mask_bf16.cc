// bfloat16 under a mask: steps of two columns as in dense_bf16, 32 bits of mask each.
#include "matmul/encodings/mask.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::mask_bf16(Packing& packing) { pack_masked<16>(packing, "values", Element::u16); }

namespace reference {
namespace {

struct Stream : PanelStream {
    using PanelStream::PanelStream;
    void block(float* out) {
        for (int step = 0; step < 32; ++step) {
            const uint64_t bits = step_mask(mask, step, 4);
            for (int i = 0; i < 32; ++i) {
                uint16_t value = 0;
                if (bits >> i & 1) {
                    std::memcpy(&value, values, 2);
                    values += 2;
                }
                out[(step * 2 + i % 2) * kPanelOutputs + i / 2] = widen(value);
            }
        }
        mask += kMaskBytes;
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Stream : PanelStream {
    static constexpr int kFewRows = 16;
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            __m128i quarters[2];
            UNROLL for (int i = 0; i < 2; ++i) {
                const uint8_t bits = mask[2 * half + i];
                const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
                const auto* order = reinterpret_cast<const __m128i*>(kShuffles.words[bits]);
                quarters[i] = _mm_shuffle_epi8(kept, _mm_load_si128(order));
                values += 2 * _mm_popcnt_u32(bits);
            }
            widen_pairs(_mm256_set_m128i(quarters[1], quarters[0]), even[half], odd[half]);
        }
        mask += 4;
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Stream : PanelStream {
    static constexpr bool kIsPlain = false;
    void fetch(int num_columns) const {
        prefetch<4096>(values, num_columns * 16);
        prefetch<4096>(mask, num_columns * 2);
    }
    __m512i pairs() {
        const uint32_t kept = _cvtmask32_u32(_load_mask32(reinterpret_cast<__mmask32*>(const_cast<uint8_t*>(mask))));
        const __m512i expanded = _mm512_mask_expand_epi16(unknown_zero(), kept, load(values));
        values += 2 * _mm_popcnt_u32(kept);
        mask += 4;
        return expanded;
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_bf16<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Stream : PanelStream {
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            const uint8_t bits = mask[i];
            const Bytes order = load(reinterpret_cast<const uint8_t*>(kShuffles.words[bits]));
            widen_pairs(vqtbl1q_u8(load(values), order), even[i], odd[i]);
            values += 2 * __builtin_popcount(bits);
        }
        mask += 4;
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::mask_bf16(const SampleSpec& spec) { return make_float_sample(spec, Element::u16, true); }

}  // namespace rarefy::matmul

#endif
