// Quantizes and rounds activations with AVX2.
#include <immintrin.h>

#include "matmul/kernels.h"

namespace rarefy::matmul {

#define UNROLL _Pragma("GCC unroll 32")

void quantize_row_avx2(const float* x, int64_t num_inputs, int8_t* q, int16_t* wide_q, float* scales, int32_t* sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const float infinity = __builtin_inff();
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        alignas(32) float values[kBlockInputs] = {};
        const int64_t left = num_inputs - begin;
        const float* from = x + begin;
        if (left < kBlockInputs) {
            __builtin_memcpy(values, from, static_cast<unsigned long>(left) * 4);
            from = values;
        }
        __m256i magnitude = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < 8; ++i) {
            // As integers the magnitudes keep their order, and infinity and NaN come last.
            magnitude =
                _mm256_max_epi32(magnitude, _mm256_castps_si256(_mm256_andnot_ps(sign, _mm256_loadu_ps(from + 8 * i))));
        }
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), magnitude);
        int32_t bits = 0;
        UNROLL for (int i = 0; i < 8; ++i) { bits = lanes[i] > bits ? lanes[i] : bits; }
        const bool finite = bits < 0x7f800000;
        float amax;
        __builtin_memcpy(&amax, &bits, 4);
        const float inverse = bits > 0 ? 127.0f / amax : infinity;
        const bool usable = finite && inverse < infinity;
        const __m256 factor = _mm256_set1_ps(inverse);
        UNROLL for (int half = 0; half < 2; ++half) {
            __m256i whole[4];
            UNROLL for (int i = 0; i < 4; ++i) {
                const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(from + 32 * half + 8 * i), factor);
                whole[i] = usable ? _mm256_cvtps_epi32(scaled) : _mm256_setzero_si256();
            }
            // Packing leaves pairs of lanes interleaved, four numbers each. vpacksswb bounds at 127, -128 cannot be.
            const __m256i first = _mm256_packs_epi32(whole[0], whole[1]),
                          second = _mm256_packs_epi32(whole[2], whole[3]);
            const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                                              _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + begin + 32 * half), bytes);
            const __m256i ones = _mm256_set1_epi16(1);
            const __m256i in_lanes = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), ones);
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(in_lanes), _mm256_extracti128_si256(in_lanes, 1));
            sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 1));
            sums[2 * block + half] = _mm_cvtsi128_si32(sum);
            if (wide_q == nullptr) continue;
            const __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4,
                                                   6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
            const __m256i ordered = _mm256_shuffle_epi8(bytes, order);
            auto* const wide = reinterpret_cast<__m256i*>(wide_q + begin + 32 * half);
            _mm256_storeu_si256(wide, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(ordered)));
            _mm256_storeu_si256(wide + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(ordered, 1)));
        }
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
    }
}

void round_row_avx2(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers)
#include "matmul/round_row.inc"

}  // namespace rarefy::matmul
