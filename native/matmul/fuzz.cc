// Damaged weights into every encoding on every instruction set of this machine: they are refused with an exception, or
// multiply without a fault: alone, several together, as sums and chains, and with the taps of a convolution. What
// several instruction sets accept must also give the same product.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/fuzz.h"
#include "common/pool.h"
#include "matmul/damage.h"
#include "matmul/dispatch.h"
#include "matmul/operators.h"
#include "matmul/weights.h"

namespace {

using namespace rarefy;
using fuzz::Exact;
using fuzz::Input;
using matmul::Isa;
using matmul::MaskedCodes;
using matmul::Sample;

struct Run {
    std::vector<float> y;
    bool same(const Run& other) const {
        return y.size() == other.y.size() && (y.empty() || std::memcmp(y.data(), other.y.data(), 4 * y.size()) == 0);
    }
};

// One call with all weights; their outputs have no room to spare.
std::vector<Run> products(const std::vector<const matmul::Weights*>& weights, const Exact<float>& x, int64_t num_rows,
                          int64_t num_inputs) {
    std::vector<Exact<float>> outputs;
    std::vector<matmul::Product> calls;
    for (const matmul::Weights* weight : weights) {
        outputs.emplace_back(static_cast<size_t>(num_rows * weight->view().num_outputs));
        calls.push_back({weight, outputs.back().data()});
    }
    matmul::multiply(x.data(), num_rows, num_inputs, calls);
    std::vector<Run> runs;
    for (size_t i = 0; i < weights.size(); ++i) {
        const float* y = outputs[i].data();
        runs.push_back({std::vector<float>(y, y + num_rows * weights[i]->view().num_outputs)});
    }
    return runs;
}

// The product of rows with an operator; the output has no room to spare.
Run product_of(const matmul::Operator& by, const Exact<float>& x, int64_t num_rows) {
    const int64_t size = num_rows * by.num_outputs();
    const Exact<float> y(static_cast<size_t>(size));
    matmul::multiply(x.data(), num_rows, by.num_inputs(), {matmul::Target{&by, y.data()}});
    return {std::vector<float>(y.data(), y.data() + size)};
}

// Each of some runs of x meets the weight, and what comes out of them meets another one, of any format.
void chain(Input& input, const std::string& what, const matmul::Machine& machine,
           const std::shared_ptr<const matmul::Weights>& weight) {
    const matmul::Operator inner(weight);
    const int64_t num_runs = input.between(1, 3), num_rows = input.pick<int64_t>({1, 1, 2, 7, 20});
    if (inner.num_outputs() * num_runs > 2048 || num_rows * num_runs * inner.num_inputs() > (1 << 16)) return;
    matmul::SampleSpec spec = matmul::random_spec(input, machine);
    spec.num_inputs = inner.num_outputs() * num_runs;
    const Sample sample = matmul::make_sample(spec);
    const matmul::Operator outer(std::make_shared<const matmul::Weights>(sample.packed(), weight->isa()));
    const auto both = matmul::Operator::chain(inner, outer, num_runs);
    const Exact<float> x(fuzz::floats(input, num_rows * both.num_inputs(), false));
    const Run expected = product_of(outer, Exact<float>(product_of(inner, x, num_rows * num_runs).y), num_rows);
    if (!product_of(both, x, num_rows).same(expected))
        fuzz::fail(what + ": a chain with " + spec.format + " is not one product after the other");
}

// Rows that are pixels side by side, against the same rows written out.
void taps(Input& input, const std::string& what, const matmul::Weights& weight) {
    const int64_t num_inputs = weight.view().num_inputs, num_outputs = weight.view().num_outputs;
    if (!weight.is_integer() || num_inputs % matmul::kBlockInputs != 0 || num_inputs == 0) return;
    int64_t num_taps = num_inputs / matmul::kBlockInputs;
    if (input.one_in(3)) num_taps = 1;
    const int64_t num_channels = num_inputs / num_taps, num_pixels = input.between(1, 40);
    const int64_t num_rows = input.pick<int64_t>({0, 1, 2, 5, 13, 40, 130});
    const int64_t last_row = input.between(0, num_pixels - 1);
    std::vector<int64_t> starts, offsets;
    for (int64_t i = 0; i < num_rows; ++i) starts.push_back(input.between(0, last_row));
    for (int64_t i = 0; i < num_taps; ++i) offsets.push_back(input.between(0, num_pixels - 1 - last_row));
    const std::vector<float> pixels = fuzz::floats(input, num_pixels * num_channels, false);
    std::vector<float> rows;
    for (const int64_t start : starts) {
        for (const int64_t offset : offsets) {
            const auto pixel = pixels.begin() + (start + offset) * num_channels;
            rows.insert(rows.end(), pixel, pixel + num_channels);
        }
    }
    const Exact<int64_t> exact_starts(starts), exact_offsets(offsets);
    const Exact<float> x(pixels), y(static_cast<size_t>(num_rows * num_outputs));
    matmul::multiply_taps(x.data(), num_pixels, num_channels,
                          {exact_starts.data(), num_rows, exact_offsets.data(), num_taps}, {{&weight, y.data()}});
    const Run got{std::vector<float>(y.data(), y.data() + num_rows * num_outputs)};
    if (!got.same(products({&weight}, Exact<float>(rows), num_rows, num_inputs)[0]))
        fuzz::fail(what + " on " + matmul::name(weight.isa()) + ": other bits for taps than for the rows written out");
}

void multiply_all(Input& input, const std::string& what,
                  const std::vector<std::shared_ptr<const matmul::Weights>>& weights) {
    const int64_t num_outputs = weights[0]->view().num_outputs, num_inputs = weights[0]->view().num_inputs;
    if (num_outputs > 4096 || num_inputs > 65536) return;
    const int64_t num_rows = input.pick<int64_t>({1, 1, 2, 3, 5, 12, 13, 17, 40, 100, 200});
    if (num_rows * num_outputs * num_inputs > (1 << 21)) return;
    const Exact<float> x(fuzz::floats(input, num_rows * num_inputs, false));
    std::vector<const matmul::Weights*> all;
    std::vector<Run> alone;
    for (const auto& weight : weights) {
        all.push_back(weight.get());
        common::set_num_threads(1);
        alone.push_back(products({weight.get()}, x, num_rows, num_inputs)[0]);
    }
    common::set_num_threads(static_cast<int>(input.between(1, 4)));
    const std::vector<Run> together = products(all, x, num_rows, num_inputs);
    const size_t other = weights.size() - 1;
    const auto both = matmul::Operator::sum(matmul::Operator(weights[0]), matmul::Operator(weights[other]));
    const Exact<float> sum(static_cast<size_t>(num_rows * num_outputs));
    matmul::multiply(x.data(), num_rows, num_inputs, {matmul::Target{&both, sum.data()}});
    for (size_t k = 0; k < alone[0].y.size(); ++k) {
        const float expected = alone[0].y[k] + alone[other].y[k];
        if (!(sum.data()[k] == expected) && !(std::isnan(sum.data()[k]) && std::isnan(expected)))
            fuzz::fail(what + ": a sum of two weights is not that of their products");
    }
    for (size_t i = 0; i < all.size(); ++i) {
        const std::string who = what + " on " + matmul::name(all[i]->isa());
        if (!alone[i].same(together[i])) fuzz::fail(who + ": other bits with other threads or company");
        // Where a scale or an activation is not finite, only the kernels that skip zeros may hide it.
        for (size_t k = 0; i > 0 && all[i]->is_integer() && k < alone[0].y.size(); ++k)
            if (std::isfinite(alone[0].y[k]) && alone[0].y[k] != alone[i].y[k])
                fuzz::fail(who + ": not the integer reference's result");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const matmul::Machine machine;
    Input input(data, size);
    const matmul::SampleSpec spec = matmul::random_spec(input, machine);
    const matmul::Hostile hostile(input, machine, spec, input.pick<int64_t>({0, 1, 1, 1, 1, 2, 2, 3, 5}));
    const std::string what = hostile.packed.format + " " + std::to_string(spec.num_outputs) + " x " +
                             std::to_string(spec.num_inputs) + ", seed " + std::to_string(spec.seed);
    std::vector<std::shared_ptr<const matmul::Weights>> weights;
    for (const Isa isa : machine.isas) {
        const auto masked = static_cast<MaskedCodes>(input.between(0, static_cast<int64_t>(MaskedCodes::all)));
        if (auto made = hostile.weights(isa, masked)) weights.push_back(std::move(made));
    }
    if (weights.empty()) return 0;
    multiply_all(input, what, weights);
    const auto& one = weights[static_cast<size_t>(input.between(0, static_cast<int64_t>(weights.size()) - 1))];
    if (one->view().num_outputs > 4096 || one->view().num_inputs > 4096) return 0;
    chain(input, what, machine, one);
    taps(input, what, *one);
    return 0;
}
