// Quantizes and rounds activations in plain C++.
#include <cmath>

#include "matmul/kernels.h"

namespace rarefy::matmul {

void quantize_row_reference(const float* x, int64_t num_inputs, int8_t* q, int16_t* wide_q, float* scales,
                            int32_t* sums) {
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        const int size = static_cast<int>(num_inputs - begin < kBlockInputs ? num_inputs - begin : kBlockInputs);
        float amax = 0.0f;
        bool finite = true;
        for (int i = 0; i < size; ++i) {
            const float magnitude = std::fabs(x[begin + i]);
            finite &= std::isfinite(magnitude);
            if (magnitude > amax) amax = magnitude;
        }
        const float inverse = amax > 0.0f ? 127.0f / amax : INFINITY;
        const bool usable = finite && std::isfinite(inverse);
        int8_t* out = q + begin;
        int32_t half_sums[2] = {0, 0};
        for (int i = 0; i < kBlockInputs; ++i) {
            const float rounded = usable && i < size ? std::nearbyint(x[begin + i] * inverse) : 0.0f;
            out[i] = static_cast<int8_t>(rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
            half_sums[i / 32] += out[i];
        }
        scales[block] = !finite ? NAN : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = half_sums[0];
        sums[2 * block + 1] = half_sums[1];
        if (wide_q == nullptr) continue;
        for (int step = 0; step < 16; ++step) {
            const int8_t* from = out + step * 4;
            int16_t* to = wide_q + begin + step * 4;
            to[0] = from[0];
            to[1] = from[2];
            to[2] = from[1];
            to[3] = from[3];
        }
    }
}

void round_row_reference(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers)
#include "matmul/round_row.inc"

}  // namespace rarefy::matmul
