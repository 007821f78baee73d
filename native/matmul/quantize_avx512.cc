// Quantizes activations with AVX-512.
#include <immintrin.h>

#include "matmul/kernels.h"

namespace rarefy::matmul {

#define UNROLL _Pragma("GCC unroll 32")

void quantize_row_avx512(const float* x, int64_t num_inputs, int8_t* q, int16_t*, float* scales, int32_t* sums) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    const float infinity = __builtin_inff();
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        __m512 values[4];
        __m512i magnitude = _mm512_setzero_si512();
        UNROLL for (int i = 0; i < 4; ++i) {
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
        __m512i quarters[4];
        UNROLL for (int i = 0; i < 4; ++i) {
            quarters[i] = _mm512_setzero_si512();
            if (!usable) continue;
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor));
            quarters[i] = _mm512_max_epi32(_mm512_min_epi32(rounded, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + begin + 16 * i), _mm512_cvtepi32_epi8(quarters[i]));
        }
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = _mm512_reduce_add_epi32(_mm512_add_epi32(quarters[0], quarters[1]));
        sums[2 * block + 1] = _mm512_reduce_add_epi32(_mm512_add_epi32(quarters[2], quarters[3]));
    }
}

}  // namespace rarefy::matmul
