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
        int32_t half_sums[2] = {0, 0};
        alignas(32) int32_t rounded[kBlockInputs] = {};
        UNROLL for (int i = 0; i < 8; ++i) {
            if (!usable) continue;
            const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), factor));
            const __m256i clamped =
                _mm256_max_epi32(_mm256_min_epi32(whole, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
            _mm256_store_si256(reinterpret_cast<__m256i*>(rounded + 8 * i), clamped);
        }
        for (int i = 0; i < kBlockInputs; ++i) {
            q[begin + i] = static_cast<int8_t>(rounded[i]);
            half_sums[i / 32] += rounded[i];
        }
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = half_sums[0];
        sums[2 * block + 1] = half_sums[1];
        if (wide_q == nullptr) continue;
        for (int step = 0; step < 16; ++step) {
            constexpr int kOrder[4] = {0, 2, 1, 3};
            for (int i = 0; i < 4; ++i)
                wide_q[begin + 4 * step + i] = static_cast<int16_t>(rounded[4 * step + kOrder[i]]);
        }
    }
}

void round_row_avx2(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers)
#include "matmul/round_row.inc"

}  // namespace rarefy::matmul
