// Quantizes and rounds activations with NEON.
#include <arm_neon.h>

#include "matmul/kernels.h"

namespace rarefy::matmul {

#define UNROLL _Pragma("GCC unroll 32")

void quantize_row_neon(const float* x, int64_t num_inputs, int8_t* q, int16_t*, float* scales, int32_t* sums) {
    constexpr int kVectors = kBlockInputs / 4;
    const float infinity = __builtin_inff();
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        float values[kBlockInputs] = {};
        const int64_t left = num_inputs - begin;
        const float* from = x + begin;
        if (left < kBlockInputs) {
            __builtin_memcpy(values, from, static_cast<unsigned long>(left) * 4);
            from = values;
        }
        // As integers the magnitudes keep their order, and infinity and NaN come last.
        uint32x4_t magnitudes = vdupq_n_u32(0);
        UNROLL for (int i = 0; i < kVectors; ++i) {
            magnitudes = vmaxq_u32(magnitudes, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(from + 4 * i))));
        }
        const uint32_t bits = vmaxvq_u32(magnitudes);
        const bool finite = bits < 0x7f800000;
        float amax;
        __builtin_memcpy(&amax, &bits, 4);
        const float inverse = bits > 0 ? 127.0f / amax : infinity;
        const bool usable = finite && inverse < infinity;
        int32x4_t half_sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
        UNROLL for (int i = 0; i < kVectors; i += 2) {
            int32x4_t rounded[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
            for (int j = 0; usable && j < 2; ++j) {
                const int32x4_t whole = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + 4 * (i + j)), inverse));
                rounded[j] = vmaxq_s32(vminq_s32(whole, vdupq_n_s32(127)), vdupq_n_s32(-127));
                half_sums[i / 8] = vaddq_s32(half_sums[i / 8], rounded[j]);
            }
            vst1_s8(q + begin + 4 * i, vmovn_s16(vcombine_s16(vmovn_s32(rounded[0]), vmovn_s32(rounded[1]))));
        }
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = vaddvq_s32(half_sums[0]);
        sums[2 * block + 1] = vaddvq_s32(half_sums[1]);
    }
}

void round_row_neon(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers)
#include "matmul/round_row.inc"

}  // namespace rarefy::matmul
