// Chooses the kernel of a repacked weight and runs products on the thread pool.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "matmul/weights.h"

namespace rarefy::matmul {

const char* name(Isa isa);
// Whether this build has kernels for the instruction set, and a CPU with these flags runs them.
bool can_run(Isa isa, const common::CpuFlags& cpu);
// Throws std::invalid_argument for an unknown name, or where this build or CPU cannot run it.
Isa runnable_isa(const std::string& name);

// Throws std::invalid_argument where there is none.
KernelFunction find_kernel(Encoding encoding, Isa isa);

struct ListedKernel {
    std::string format;
    Isa isa;
};
// Every compiled kernel, by the formats it serves.
std::vector<ListedKernel> list_kernels();

// One product of `multiply`: y (T, O), contiguous.
struct Product {
    const Weights* weights;
    float* y;
};

// y = x W^T for every product, x (T, I) contiguous. Quantizes x once, forks and joins once. All weights have I inputs.
void multiply(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products);

// Rows that are pixels side by side: row r has those at row_starts[r] + tap_offsets[t].
struct TapRows {
    const int64_t* row_starts;
    int64_t num_rows;
    const int64_t* tap_offsets;
    int64_t num_taps;
};

// The same for the patches of a convolution and integer weights, where pixels (P, C) have a multiple of 64 channels:
// the blocks that are quantized together then lie within a pixel, and each is quantized once for all taps that meet it.
void multiply_taps(const float* pixels, int64_t num_pixels, int64_t num_channels, const TapRows& taps,
                   const std::vector<Product>& products);

}  // namespace rarefy::matmul
