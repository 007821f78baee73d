// Activations in the forms that the kernels read them in, made once per call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "matmul/dispatch.h"

namespace rarefy::matmul {

// Memory that a thread keeps from call to call, so that small products allocate nothing.
class Scratch {
public:
    uint8_t* reserve(int64_t num_bytes);
    float* floats(int64_t count) { return reinterpret_cast<float*>(reserve(count * int64_t{sizeof(float)})); }
    // Gives large memory back, so that one long prompt does not hold it for ever.
    void trim() {
        constexpr int64_t kKeep = int64_t{32} << 20;
        if (size_ <= kKeep) return;
        bytes_ = nullptr;
        size_ = 0;
    }

private:
    struct Free {
        void operator()(uint8_t* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<uint8_t[], Free> bytes_;
    int64_t size_ = 0;
};

struct Activations {
    Rows floats{};
    Rows bf16{};
    Rows integers{};
};

// Where they will lie, in `scratch` or in x itself, and what fills rows [begin, end): any thread may call it, once for
// each row. Null where nothing needs to be done.
struct RowPlan {
    Activations activations;
    std::function<void(int64_t begin, int64_t end)> prepare;
};
RowPlan plan_rows(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products,
                  Scratch& scratch);

// Copied, rounded and quantized as the products need them.
Activations prepare_rows(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products,
                         Scratch& scratch);

struct PanelScratch {
    Scratch integers, bf16, code_lanes, float_lanes;
    void trim() {
        integers.trim();
        bf16.trim();
        code_lanes.trim();
        float_lanes.trim();
    }
};

// Gives integers and bfloat16 their row panels or lanes (row_panels.h) where a product reads them: blocks with AVX-512,
// what is kept with AVX2.
void add_row_panels(Activations& activations, const std::vector<Product>& products, PanelScratch& scratch);

inline const Rows& rows_for(const Weights& weights, const Activations& activations) {
    return weights.is_integer() ? activations.integers : weights.is_bf16() ? activations.bf16 : activations.floats;
}

// Rows [begin, end) of quantized taps, copied side by side out of quantized pixels.
Rows gather_taps(const Rows& pixels, const TapRows& taps, int64_t begin, int64_t end, bool skips, Scratch& scratch);

}  // namespace rarefy::matmul
