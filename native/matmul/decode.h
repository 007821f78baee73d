// The numbers that a packed weight stands for, a panel at a time: one-hot rows meet the encoding's own kernel, so that
// every encoding is decoded by what multiplies with it, and exactly.
//
// What comes out is what the kernels multiply with: of tables the entries rounded to bfloat16, and with AVX512_BF16 no
// bfloat16 below 2^-126 (contract.h).
#pragma once

#include <cstdint>
#include <vector>

#include "matmul/activations.h"
#include "matmul/operators.h"

namespace rarefy::matmul {

// Memory of one thread's decoding.
class Decoder {
public:
    // panel[i * 16 + lane] becomes the number of output 16 * panel + lane and input i; 0 beyond the outputs. Chains are
    // multiplied and sums added in float32, in order.
    void decode(const Operator& by, int64_t panel, float* numbers);

private:
    // The forms of one-hot rows.
    enum class Form { none, floats, bf16, integers };
    void decode_weights(const Weights& weights, int64_t panel, float* numbers);
    void prepare(Form form, int64_t num_blocks);
    void set_ones(Form form, int64_t block, bool on);

    Scratch scratch_;
    Form form_ = Form::none;
    int64_t num_blocks_ = 0;
    int64_t block_ = -1;  // where the ones are
    Rows rows_{};
    float* x_ = nullptr;
    uint16_t* bits_ = nullptr;
    int8_t* q_ = nullptr;
    int16_t* wide_q_ = nullptr;
    int32_t *sums_ = nullptr, *byte_starts_ = nullptr;
};

}  // namespace rarefy::matmul
