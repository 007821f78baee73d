// Quantizes and rounds activations with AVX-512.
#include <immintrin.h>

#include "matmul/kernels.h"

namespace rarefy::matmul {

#define UNROLL _Pragma("GCC unroll 32")

void quantize_row_avx512(const float* x, int64_t num_inputs, int8_t* q, int16_t*, float* scales, int32_t* sums) {
    constexpr int64_t kAhead = 512;  // floats; rows seldom come from a nearer cache than the last level
    const __m512 sign = _mm512_set1_ps(-0.0f);
    const __m512i bytes_in_order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const float infinity = __builtin_inff();
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        __m512 values[4];
        __m512i magnitude = _mm512_setzero_si512();
        UNROLL for (int i = 0; i < 4; ++i) {
            _mm_prefetch(reinterpret_cast<const char*>(x + begin + kAhead + 16 * i), _MM_HINT_T0);
            const int64_t left = num_inputs - begin - 16 * i;
            const __mmask16 lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
            values[i] = _mm512_maskz_loadu_ps(lanes, x + begin + 16 * i);
            // As integers the magnitudes keep their order, and infinity and NaN come last.
            magnitude = _mm512_max_epi32(magnitude, _mm512_castps_si512(_mm512_andnot_ps(sign, values[i])));
        }
        const int32_t bits = _mm512_reduce_max_epi32(magnitude);
        const bool finite = bits < 0x7f800000;
        float amax;
        __builtin_memcpy(&amax, &bits, 4);
        const float inverse = bits > 0 ? 127.0f / amax : infinity;
        const bool usable = finite && inverse < infinity;
        const __m512 factor = _mm512_set1_ps(inverse);
        // No product exceeds 127: 127 / amax is rounded by less than what the rounding to an integer takes off again.
        __m512i quarters[4];
        UNROLL for (int i = 0; i < 4; ++i) {
            quarters[i] = usable ? _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor)) : _mm512_setzero_si512();
        }
        const __m512i words_0 = _mm512_packs_epi32(quarters[0], quarters[1]);
        const __m512i words_1 = _mm512_packs_epi32(quarters[2], quarters[3]);
        const __m512i bytes = _mm512_permutexvar_epi32(bytes_in_order, _mm512_packs_epi16(words_0, words_1));
        _mm512_storeu_si512(q + begin, bytes);
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
        // Sums of 4 columns in each lane, then of the 8 lanes of each half.
        __m512i lanes = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
        lanes = _mm512_add_epi32(lanes, _mm512_shuffle_epi32(lanes, _MM_PERM_BADC));
        lanes = _mm512_add_epi32(lanes, _mm512_shuffle_epi32(lanes, _MM_PERM_CDAB));
        lanes = _mm512_add_epi32(lanes, _mm512_shuffle_i64x2(lanes, lanes, _MM_PERM_CDAB));
        const __m128i halves = _mm_unpacklo_epi32(_mm512_castsi512_si128(lanes), _mm512_extracti32x4_epi32(lanes, 2));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(sums + 2 * block), halves);
    }
}

void round_row_avx512(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers)
#include "matmul/round_row.inc"

}  // namespace rarefy::matmul
