#include "program/program.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "matmul/activations.h"

namespace rarefy::program {
namespace {

constexpr int64_t kMaxWidth = int64_t{1} << 32;
constexpr int64_t kMaxTokens = int64_t{1} << 24;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// One step, with the memory of the slots.
struct Runner {
    const ops::Kernels& kernels;
    const Run& run;
    const std::vector<float*>& slots;
    const std::vector<int64_t>& widths;
    std::vector<matmul::Target> targets;  // kept from product to product

    float* at(int slot) const { return slots[static_cast<size_t>(slot)]; }
    int64_t width(int slot) const { return widths[static_cast<size_t>(slot)]; }

    void operator()(const Product& step) {
        targets.clear();
        for (size_t i = 0; i < step.y.size(); ++i) targets.push_back({&step.weights[i], at(step.y[i])});
        matmul::multiply(at(step.x), run.num_tokens, width(step.x), targets);
        for (size_t i = 0; i < step.y.size(); ++i)
            if (step.biases[i] != nullptr)
                ops::add_bias(kernels, at(step.y[i]), step.biases[i], run.num_tokens, width(step.y[i]));
    }
    void operator()(const Norm& step) {
        ops::rms_norm(kernels, at(step.x), step.sum < 0 ? nullptr : at(step.sum), step.weight, step.eps,
                      run.num_tokens * (width(step.x) / step.width), step.width, at(step.y));
    }
    void operator()(const Rope& step) {
        const Layer& layer = run.layers[static_cast<size_t>(step.layer)];
        const Rotation& rotation = run.rotations[static_cast<size_t>(step.rotation)];
        ops::rope_store(kernels, at(step.q), at(step.k), at(step.v), rotation.cos, rotation.sin, run.num_tokens,
                        width(step.q) / layer.shape.head_dim, layer.shape, layer.keys, layer.values, run.start);
    }
    void operator()(const Attention& step) {
        const Layer& layer = run.layers[static_cast<size_t>(step.layer)];
        ops::attention(kernels, at(step.q), run.num_tokens, width(step.q) / layer.shape.head_dim, layer.shape,
                       layer.keys, layer.values, run.start, step.window, step.scale, at(step.y));
    }
    void operator()(const Gate& step) {
        ops::gate(kernels, at(step.gate), at(step.up), run.num_tokens * width(step.gate), step.activation);
    }
};

}  // namespace

Program::Program(const ops::Kernels& kernels, std::vector<int64_t> widths, int output)
    : kernels_(kernels), widths_(std::move(widths)), output_(output) {
    for (const int64_t width : widths_) require(0 <= width && width <= kMaxWidth, "the width of a slot is wrong");
    require(widths_.size() < 1 << 16, "too many slots");
    require(output != 0, "a run cannot give out what it was given");
    width(output);
}

int64_t Program::width(int slot) const {
    require(0 <= slot && slot < static_cast<int>(widths_.size()), "there is no such slot");
    return widths_[static_cast<size_t>(slot)];
}

void Program::add(Step step) {
    std::visit([this](const auto& known) { check(known); }, step);
    steps_.push_back(std::move(step));
}

void Program::check(const Product& step) const {
    require(step.weights.size() == step.y.size() && step.biases.size() == step.y.size(),
            "as many outputs and biases as weights are needed");
    for (size_t i = 0; i < step.y.size(); ++i) {
        require(step.weights[i].num_inputs() == width(step.x), "a weight has other inputs than its slot is wide");
        require(step.weights[i].num_outputs() == width(step.y[i]), "a weight has other outputs than its slot is wide");
        require(step.y[i] != step.x, "a product cannot write over what it reads");
    }
}

void Program::check(const Norm& step) const {
    require(width(step.x) == width(step.y) && step.width > 0 && width(step.x) % step.width == 0,
            "the slots of a norm have other widths than its weight");
    require(step.sum < 0 || (width(step.sum) == width(step.x) && step.width == width(step.x)),
            "the slots of a norm have other widths than its weight");
}

void Program::check(const Rope& step) const {
    require(width(step.k) == width(step.v) && width(step.q) > 0, "keys and values differ in width");
    require(step.layer >= 0 && step.rotation >= 0, "there is no such layer or rotation");
}

void Program::check(const Attention& step) const {
    require(width(step.q) == width(step.y) && step.q != step.y, "queries and outputs differ in width, or are one");
    require(step.layer >= 0 && step.window >= 0, "there is no such layer or window");
}

void Program::check(const Gate& step) const {
    require(width(step.gate) == width(step.up), "gate and up differ in width");
}

void Program::check_cache(int layer, int64_t width, const Run& run) const {
    require(static_cast<size_t>(layer) < run.layers.size(), "the cache has too few layers");
    const ops::CacheShape& shape = run.layers[static_cast<size_t>(layer)].shape;
    require(width > 0 && width % (shape.head_dim * shape.num_kv_heads) == 0,
            "the queries do not fit the heads of the cache");
    require(0 <= run.start && run.start <= shape.num_blocks * ops::kKeyBlock - run.num_tokens,
            "positions lie outside the cache");
}

void Program::run(const Run& run) const {
    require(0 <= run.num_tokens && run.num_tokens <= kMaxTokens, "too many tokens");
    for (const Step& step : steps_) {
        if (const auto* attention = std::get_if<Attention>(&step)) {
            check_cache(attention->layer, width(attention->q), run);
        } else if (const auto* rope = std::get_if<Rope>(&step)) {
            check_cache(rope->layer, width(rope->q), run);
            const ops::CacheShape& shape = run.layers[static_cast<size_t>(rope->layer)].shape;
            require(width(rope->k) == shape.num_kv_heads * shape.head_dim, "the keys do not fit the cache");
            require(static_cast<size_t>(rope->rotation) < run.rotations.size(), "there is no such rotation");
            const Rotation& rotation = run.rotations[static_cast<size_t>(rope->rotation)];
            require(rotation.num_positions >= run.start + run.num_tokens && 2 * rotation.half == shape.head_dim,
                    "cosines and sines do not fit the cache");
        }
    }
    if (run.num_tokens == 0) return;
    thread_local matmul::Scratch scratch;
    constexpr int64_t kAligned = 16;  // floats
    const auto floats_of = [&](size_t slot) {
        const bool given = slot == 0 || static_cast<int>(slot) == output_;
        return given ? 0 : matmul::round_up(widths_[slot] * run.num_tokens, kAligned);
    };
    int64_t num_floats = 0;
    for (size_t slot = 0; slot < widths_.size(); ++slot) {
        num_floats += floats_of(slot);
        require(num_floats <= int64_t{1} << 40, "the slots take too much memory");
    }
    auto* free = scratch.floats(num_floats);
    std::vector<float*> slots;
    slots.reserve(widths_.size());
    for (size_t slot = 0; slot < widths_.size(); ++slot) {
        slots.push_back(slot == 0 ? run.x : static_cast<int>(slot) == output_ ? run.y : free);
        free += floats_of(slot);
    }
    Runner runner{kernels_, run, slots, widths_, {}};
    for (const Step& step : steps_) std::visit(runner, step);
    scratch.trim();
}

}  // namespace rarefy::program
