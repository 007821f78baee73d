// Damaged weights, any geometry and any numbers into convolutions by taps and by patches on every instruction set of
// this machine: they are refused with an exception, or computed without an access outside of the arrays. The same bits
// for every number of threads, and of taps where nothing is damaged for every instruction set.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/fuzz.h"
#include "common/pool.h"
#include "direct/patches.h"
#include "direct/request.h"
#include "matmul/damage.h"

namespace {

using namespace rarefy;
using direct::Request;
using fuzz::Exact;
using fuzz::Input;
using matmul::Isa;
using matmul::Operator;
using Sizes = std::vector<int64_t>;

// More floats of an array or of what is copied, sums, or numbers to decode would take seconds under a sanitizer.
constexpr double kMostFloats = 1 << 16, kMostCopied = 1 << 20, kMostSums = 1 << 19, kMostDecoded = 1 << 16;

double product_of(const Sizes& sizes) {
    double product = 1;
    for (const int64_t size : sizes) product *= static_cast<double>(size);
    return product;
}

// Geometry that fits together, often with steps, zeros in front or outputs far outside of the input.
Request random_request(Input& input) {
    Request request{};
    request.way = input.one_in(3) ? direct::Way::patches : direct::Way::taps;
    const int64_t num_axes = input.between(1, direct::kAxes);
    const bool is_depthwise = input.one_in(2);
    const int64_t group_channels = is_depthwise ? 1 : input.between(1, 6);
    request.groups = is_depthwise ? input.between(1, 40) : input.between(1, 5);
    request.channels_last = input.one_in(3);
    request.x = {input.pick<int64_t>({1, 1, 1, 2, 3, 0})};
    for (int64_t axis = 0; axis < num_axes; ++axis) {
        const bool is_last = axis + 1 == num_axes;
        const auto far = [&](int64_t high) {
            return input.one_in(40) ? input.pick<int64_t>({1 << 10, 1 << 20, int64_t{1} << 31, (int64_t{1} << 31) - 1})
                                    : input.between(1, high);
        };
        const int64_t kernel = input.between(1, is_last ? 8 : 3);
        const int64_t dilation = far(3), stride = far(4), size = input.between(1, is_last ? 90 : 12);
        const int64_t before = input.one_in(2) ? 0 : far(4), seen = (kernel - 1) * dilation + 1;
        const int64_t fitting = std::max<int64_t>(0, (before + size + input.between(0, 3) - seen) / stride) + 1;
        request.x.push_back(size);
        request.kernel.push_back(kernel);
        request.stride.push_back(stride);
        request.dilation.push_back(dilation);
        request.before.push_back(before);
        request.out.push_back(std::min<int64_t>(fitting, 100) + (input.one_in(4) ? input.between(0, 60) : 0));
    }
    const auto channels = request.channels_last ? request.x.end() : request.x.begin() + 1;
    request.x.insert(channels, request.groups * group_channels);
    return request;
}

void damage_numbers(Input& input, Request& request) {
    const auto damage = [&](Sizes& numbers) {
        if (input.one_in(6)) return numbers.resize(static_cast<size_t>(input.between(0, 5)), 1);
        if (numbers.empty()) return;
        int64_t& number = numbers[static_cast<size_t>(input.between(0, static_cast<int64_t>(numbers.size()) - 1))];
        number = input.one_in(2) ? matmul::wild_number(input) : matmul::shifted(number, input.between(-2, 2));
    };
    switch (input.between(0, 8)) {
        case 0: request.groups = matmul::wild_number(input); break;
        case 1: request.channels_last = !request.channels_last; break;
        case 2: request.num_biases = matmul::wild_number(input); break;
        case 3: damage(request.x); break;
        case 4: damage(request.kernel); break;
        case 5: damage(request.stride); break;
        case 6: damage(request.dilation); break;
        case 7: damage(request.before); break;
        default: damage(request.out);
    }
    // No array has such sizes.
    for (int64_t& size : request.x) size = std::max<int64_t>(0, size);
}

// An operator (outputs, inputs) on each instruction set: of one weight or two, which may be damaged. Empty where it is
// refused anywhere.
class Weight {
public:
    Weight(Input& input, const matmul::Machine& machine, int64_t num_outputs, int64_t num_inputs, int64_t num_taps) {
        const int64_t kind = input.between(0, 7), num_runs = input.one_in(2) ? num_taps : 1;
        const int64_t rank = input.between(1, 40);
        if (kind == 0) {
            add(input, machine, rank, num_inputs / num_runs);
            add(input, machine, num_outputs, num_runs * rank);
        } else {
            add(input, machine, num_outputs, num_inputs);
            if (kind == 1) add(input, machine, num_outputs, num_inputs);
        }
        for (const Isa isa : machine.isas) {
            std::vector<Operator> parts;
            for (const matmul::Hostile& hostile : weights_)
                if (auto made = hostile.weights(isa)) parts.emplace_back(std::move(made));
            if (parts.size() < weights_.size()) break;
            try {
                operators.push_back(kind > 1    ? parts[0]
                                    : kind == 1 ? Operator::sum(parts[0], parts[1])
                                                : Operator::chain(parts[0], parts[1], num_runs));
            } catch (const std::invalid_argument&) {
                break;  // a damaged weight has another shape
            }
        }
        if (operators.size() < machine.isas.size()) operators.clear();
    }

    bool is_damaged() const {
        return std::any_of(weights_.begin(), weights_.end(), [](const auto& weight) { return weight.is_damaged; });
    }

    std::vector<Operator> operators;

private:
    void add(Input& input, const matmul::Machine& machine, int64_t num_outputs, int64_t num_inputs) {
        matmul::SampleSpec spec = matmul::random_spec(input, machine);
        spec.num_outputs = num_outputs;
        spec.num_inputs = num_inputs;
        weights_.emplace_back(input, machine, spec, input.pick<int64_t>({0, 0, 0, 1, 2}));
    }

    std::vector<matmul::Hostile> weights_;
};

// Bits may differ where they say that there is no number.
bool same(const float* a, const float* b, size_t count) {
    for (size_t i = 0; i < count; ++i)
        if (std::memcmp(a + i, b + i, sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const matmul::Machine machine;
    Input input(data, size);
    Request request = random_request(input);
    const bool is_direct = request.way == direct::Way::taps;
    const bool is_one = is_direct && input.one_in(2);
    const int64_t num_taps = static_cast<int64_t>(product_of(request.kernel));
    const int64_t group_channels = request.x[request.channels_last ? request.x.size() - 1 : 1] / request.groups;
    const int64_t group_outputs = is_direct && request.channels_last ? input.pick<int64_t>({1, 2, 4, 8, 8, 16})
                                  : input.one_in(2)                  ? 1
                                                                     : input.between(1, 20);
    const int64_t num_weights = is_one ? 1 : request.groups;
    const int64_t num_decoded =
        num_weights * 16 * ((group_outputs * request.groups / num_weights + 15) / 16) * num_taps * group_channels;
    if (static_cast<double>(num_decoded) > kMostDecoded) return 0;
    std::vector<Weight> weights;
    for (int64_t i = 0; i < num_weights; ++i) {
        weights.emplace_back(input, machine, group_outputs * request.groups / num_weights, num_taps * group_channels,
                             num_taps);
        if (weights.back().operators.empty()) return 0;
    }
    if (input.one_in(2)) request.num_biases = group_outputs * request.groups;
    for (int64_t i = input.pick<int64_t>({0, 0, 0, 1, 2}); i > 0; --i) damage_numbers(input, request);
    const bool is_damaged = std::any_of(weights.begin(), weights.end(), [](const auto& w) { return w.is_damaged(); });

    std::unique_ptr<Exact<float>> x, bias;
    std::vector<float> expected;
    for (size_t isa = 0; isa < machine.isas.size(); ++isa) {
        request.operators.clear();
        for (const Weight& weight : weights) request.operators.push_back(&weight.operators[isa]);
        direct::Convolution c;
        try {
            c = direct::checked(request);
        } catch (const std::invalid_argument&) {
            return 0;
        }
        const Sizes sizes = direct::sizes_of_output(request, c);
        const double copied = static_cast<double>(direct::count_floats(c.shape)) * static_cast<double>(c.shape.groups) *
                              static_cast<double>(c.shape.batch);
        if (product_of(sizes) > kMostFloats || product_of(request.x) > kMostFloats || copied > kMostCopied) return 0;
        if (product_of(sizes) * static_cast<double>(c.shape.num_inputs()) > kMostSums) return 0;
        const auto count = static_cast<size_t>(product_of(sizes));
        if (x == nullptr) {
            const auto num_floats = static_cast<int64_t>(product_of(request.x));
            x = std::make_unique<Exact<float>>(fuzz::floats(input, num_floats, false));
            bias = std::make_unique<Exact<float>>(fuzz::floats(input, c.shape.num_outputs(), false));
        }
        if (!is_direct && !direct::fits_strips(c)) return 0;
        c.x = x->data();
        c.bias = request.num_biases ? bias->data() : nullptr;
        for (const int num_threads : {1, static_cast<int>(input.between(1, 4))}) {
            const Exact<float> y(std::vector<float>(count, 12345.0f));
            c.y = y.data();
            common::set_num_threads(num_threads);
            (is_direct ? direct::convolve : direct::convolve_patches)(c);
            if (num_threads == 1 && (isa == 0 || is_damaged || !is_direct)) expected.assign(y.data(), y.data() + count);
            if (!same(y.data(), expected.data(), count))
                fuzz::fail(std::string(matmul::name(machine.isas[isa])) + ": other bits with other threads, or than " +
                           matmul::name(machine.isas[0]));
        }
    }
    return 0;
}
