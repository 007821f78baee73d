// A weight repacked for the kernels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "matmul/contract.h"
#include "matmul/packing.h"

namespace rarefy::matmul {

// What the kernels multiply: floats, bfloat16 with rounded activations, or codes of so many bits with quantized ones.
enum class Values { floats = 0, int1 = 1, int2 = 2, int3 = 3, int4 = 4, int8 = 8, bf16 = 16 };

class Weights {
public:
    // Throws std::invalid_argument where the arrays contradict each other or the format is unknown.
    Weights(const PackedArrays& arrays, Isa isa, MaskedCodes masked_codes = MaskedCodes::fastest);
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;

    const PanelWeights& view() const { return view_; }
    Isa isa() const { return isa_; }
    Encoding encoding() const { return encoding_; }
    KernelFunction kernel() const { return kernel_; }
    bool is_bf16() const { return values_ == Values::bf16; }
    bool is_integer() const { return values_ != Values::floats && !is_bf16(); }
    // 0 for floats and bfloat16.
    int code_bits() const { return is_integer() ? static_cast<int>(values_) : 0; }
    int64_t num_bytes() const { return num_bytes_; }
    // By one row.
    int64_t num_read_bytes() const { return num_read_bytes_; }

private:
    Isa isa_;
    Encoding encoding_{};
    Values values_{};
    KernelFunction kernel_;
    PanelWeights view_{};
    int64_t num_bytes_ = 0, num_read_bytes_ = 0;
    std::vector<common::AlignedBytes> memory_;
};

}  // namespace rarefy::matmul
