// A pass through a decoder as a list of steps over named pieces of memory: recorded once, run in one call.
//
// Slots hold (T, width) floats each, T tokens in a run; steps say which of them they read and write. Every number of a
// step is checked when it is added, or, where it depends on the cache, before the first step runs.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "matmul/operators.h"
#include "ops/ops.h"

namespace rarefy::program {

// y = x W^T + bias, for weights that read the same x.
struct Product {
    int x;
    std::vector<matmul::Operator> weights;
    std::vector<const float*> biases;  // null: none
    std::vector<int> y;
};
// y = rms_norm(x) * weight, in pieces as wide as the weight; with a sum, x is added to it first and the norm is its.
struct Norm {
    int x, sum;  // sum -1: none
    const float* weight;
    int64_t width;
    float eps;
    int y;
};
// Rotates q and k, and stores k and v in the cache of a layer.
struct Rope {
    int q, k, v, layer, rotation;
};
struct Attention {
    int q, layer;
    int64_t window;
    float scale;
    int y;
};
// gate = activation(gate) * up.
struct Gate {
    int gate, up;
    ops::Activation activation;
};
using Step = std::variant<Product, Norm, Rope, Attention, Gate>;

// The cache of a layer: keys (K, blocks, D, 64) and values (K, blocks * 64, D).
struct Layer {
    float *keys, *values;
    ops::CacheShape shape;
};
// (positions, half) cosines and sines.
struct Rotation {
    const float *cos, *sin;
    int64_t num_positions, half;
};

// All that a run has to do with beside the steps. `x` is the memory of slot 0, which the steps may change, and `y` that
// of the slot that a run gives out.
struct Run {
    int64_t num_tokens, start;
    float *x, *y;
    std::vector<Layer> layers;
    std::vector<Rotation> rotations;
};

class Program {
public:
    // `widths`: of the slots, of which the first is given to a run. Throws std::invalid_argument, as all do here.
    Program(const ops::Kernels& kernels, std::vector<int64_t> widths, int output);
    void add(Step step);
    int64_t width(int slot) const;
    int output() const { return output_; }
    // Throws before anything is changed. Several threads may run one program.
    void run(const Run& run) const;

private:
    void check(const Product&) const;
    void check(const Norm&) const;
    void check(const Rope&) const;
    void check(const Attention&) const;
    void check(const Gate&) const;
    void check_cache(int layer, int64_t width, const Run& run) const;

    const ops::Kernels& kernels_;
    std::vector<int64_t> widths_;
    int output_;
    std::vector<Step> steps_;
};

}  // namespace rarefy::program
