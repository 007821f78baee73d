// Direct convolutions of every instruction set against loops in double precision, made to run under sanitizers: every
// array is exactly as large as it must be. All instruction sets and numbers of threads must give the same bits.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/cpu.h"
#include "common/pool.h"
#include "direct/driver.h"
#include "direct/patches.h"
#include "matmul/dispatch.h"

namespace {

using namespace rarefy;
using checks::check;
using checks::random_floats;
using direct::kAxes;
using direct::Shape;
using matmul::Isa;
using matmul::Operator;
using Floats = std::vector<float>;

Operator float_operator(const float* rows, int64_t num_outputs, int64_t num_inputs, Isa isa) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(rows);
    const matmul::PackedArrays packed{"dense-f32-v1",
                                      num_outputs,
                                      num_inputs,
                                      {{"values", matmul::Element::f32, bytes, num_outputs * num_inputs * 4}},
                                      {}};
    return Operator(std::make_shared<const matmul::Weights>(packed, isa));
}

struct Case {
    Shape shape;
    bool one_operator, channels_last, has_bias, of_patches;
    std::string name;
    Floats x, weight, bias;

    std::vector<Operator> operators(Isa isa) const {
        std::vector<Operator> made;
        const int64_t inputs = shape.num_inputs();
        if (one_operator) {
            made.push_back(float_operator(weight.data(), shape.num_outputs(), inputs, isa));
        } else {
            for (int64_t group = 0; group < shape.groups; ++group)
                made.push_back(float_operator(weight.data() + group * shape.group_outputs * inputs, shape.group_outputs,
                                              inputs, isa));
        }
        return made;
    }

    Floats run(Isa isa) const {
        const std::vector<Operator> weights = operators(isa);
        direct::Convolution convolution{shape, {}, x.data(), has_bias ? bias.data() : nullptr, nullptr, channels_last};
        for (const Operator& by : weights) convolution.operators.push_back(&by);
        Floats y(static_cast<size_t>(shape.batch * shape.num_outputs() * shape.out_size()), NAN);
        convolution.y = y.data();
        if (of_patches) {
            check(direct::fits_strips(convolution), name + " fits");
            direct::convolve_patches(convolution);
        } else {
            direct::convolve(convolution);
        }
        return y;
    }

    // Where the input that a tap of an output meets lies in x; -1 outside of the image.
    int64_t place_of(int64_t image, int64_t channel, const int64_t (&place)[kAxes], const int64_t (&tap)[kAxes]) const {
        int64_t pixel = 0;
        for (int a = 0; a < kAxes; ++a) {
            const int64_t at = place[a] * shape.stride[a] + tap[a] * shape.dilation[a] - shape.before[a];
            if (at < 0 || at >= shape.size[a]) return -1;
            pixel = pixel * shape.size[a] + at;
        }
        return channels_last ? (image * shape.image_size() + pixel) * shape.num_channels() + channel
                             : (image * shape.num_channels() + channel) * shape.image_size() + pixel;
    }

    int64_t place_in_y(int64_t image, int64_t output, int64_t place) const {
        return channels_last ? (image * shape.out_size() + place) * shape.num_outputs() + output
                             : (image * shape.num_outputs() + output) * shape.out_size() + place;
    }

    std::array<int64_t, kAxes> axes_of(int64_t place) const {
        return {place / shape.out[2] / shape.out[1], place / shape.out[2] % shape.out[1], place % shape.out[2]};
    }

    // One product for each group of all patches, written out.
    Floats run_written_out(Isa isa) const {
        const std::vector<Operator> weights = operators(isa);
        const int64_t places = shape.out_size(), num_rows = shape.batch * places, width = shape.num_inputs();
        Floats y(static_cast<size_t>(num_rows * shape.num_outputs()), NAN);
        for (int64_t group = 0; group < shape.groups; ++group) {
            Floats rows, made(static_cast<size_t>(num_rows * shape.group_outputs));
            for (int64_t row = 0; row < num_rows; ++row) {
                for (int64_t i = 0; i < width; ++i) {
                    const int64_t number = i / shape.group_channels, channel = i % shape.group_channels;
                    const auto axes = axes_of(row % places);
                    const int64_t at =
                        place_of(row / places, group * shape.group_channels + channel, {axes[0], axes[1], axes[2]},
                                 {number / shape.kernel[2] / shape.kernel[1],
                                  number / shape.kernel[2] % shape.kernel[1], number % shape.kernel[2]});
                    rows.push_back(at < 0 ? 0.0f : x[static_cast<size_t>(at)]);
                }
            }
            matmul::multiply(rows.data(), num_rows, width, {{&weights[static_cast<size_t>(group)], made.data()}});
            for (int64_t row = 0; row < num_rows; ++row) {
                for (int64_t i = 0; i < shape.group_outputs; ++i) {
                    const int64_t output = group * shape.group_outputs + i;
                    const float sum = made[static_cast<size_t>(row * shape.group_outputs + i)];
                    y[static_cast<size_t>(place_in_y(row / places, output, row % places))] =
                        has_bias ? sum + bias[static_cast<size_t>(output)] : sum;
                }
            }
        }
        return y;
    }

    // The sum at one output, and that of the magnitudes.
    std::pair<double, double> exact(int64_t image, int64_t output, const int64_t (&place)[kAxes]) const {
        const int64_t group = output / shape.group_outputs;
        double sum = has_bias ? bias[static_cast<size_t>(output)] : 0, magnitude = std::fabs(sum);
        for (int64_t channel = 0; channel < shape.group_channels; ++channel) {
            int64_t tap[kAxes];
            for (tap[0] = 0; tap[0] < shape.kernel[0]; ++tap[0]) {
                for (tap[1] = 0; tap[1] < shape.kernel[1]; ++tap[1]) {
                    for (tap[2] = 0; tap[2] < shape.kernel[2]; ++tap[2]) {
                        const int64_t from = place_of(image, group * shape.group_channels + channel, place, tap);
                        if (from < 0) continue;
                        const int64_t number = (tap[0] * shape.kernel[1] + tap[1]) * shape.kernel[2] + tap[2];
                        const double w = weight[static_cast<size_t>(output * shape.num_inputs() +
                                                                    number * shape.group_channels + channel)];
                        const double term = w * x[static_cast<size_t>(from)];
                        sum += term;
                        magnitude += std::fabs(term);
                    }
                }
            }
        }
        return {sum, magnitude};
    }

    void check_against_loops(const Floats& y) const {
        const int64_t outputs = shape.num_outputs();
        bool passed = true;
        for (int64_t image = 0; image < shape.batch; ++image) {
            for (int64_t output = 0; output < outputs; ++output) {
                for (int64_t place = 0; place < shape.out_size(); ++place) {
                    const auto axes = axes_of(place);
                    const auto [sum, magnitude] = exact(image, output, {axes[0], axes[1], axes[2]});
                    const int64_t to = place_in_y(image, output, place);
                    passed &= std::fabs(y[static_cast<size_t>(to)] - sum) <= 1e-5 * magnitude;
                }
            }
        }
        check(passed, name + " against loops");
    }
};

// Of patches: any number of channels and outputs, and weights for each group.
Case random_case(unsigned seed, bool of_patches) {
    std::mt19937 random(seed);
    const auto between = [&](int64_t low, int64_t high) {
        return low + static_cast<int64_t>(random() % static_cast<unsigned>(high - low + 1));
    };
    Case made{};
    Shape& shape = made.shape;
    // Depthwise, with channels last, several outputs of a channel, groups, and groups of which 16 outputs are whole
    // ones.
    const int kind = static_cast<int>(seed % 5);
    const bool is_long = between(0, 9) == 0, is_pointwise = of_patches && seed % 3 == 0;
    shape.batch = between(1, 3);
    shape.groups = kind < 2 ? between(1, 35) : between(1, 5);
    shape.group_channels = kind < 3 ? 1 : between(1, 6);
    shape.group_outputs = kind < 2 ? 1 : between(1, 18);
    made.one_operator = kind < 3;
    made.channels_last = kind == 1;
    if (kind == 4) {
        shape.groups = between(1, 20);
        shape.group_outputs = int64_t{1} << between(0, 4);
        shape.group_channels = between(1, shape.group_outputs);
        made.one_operator = between(0, 1) == 1;
        made.channels_last = between(0, 2) > 0;
    }
    made.of_patches = of_patches;
    if (of_patches) {
        shape.groups = kind < 3 ? 1 : between(2, 3);
        shape.group_channels = kind == 0 ? 1 : between(1, 40);
        shape.group_outputs = between(1, 40);
        made.one_operator = false;
        made.channels_last = between(0, 1) == 1;
    }
    made.has_bias = between(0, 1) == 1;
    const int first_axis = static_cast<int>(between(0, 2));
    for (int a = 0; a < kAxes; ++a) {
        shape.size[a] = shape.kernel[a] = shape.stride[a] = shape.dilation[a] = shape.out[a] = 1;
        if (a < first_axis) continue;
        shape.kernel[a] = of_patches ? between(1, 3) : between(1, a == 0 ? 3 : 7);
        shape.stride[a] = between(1, 4);
        shape.dilation[a] = between(1, 3);
        shape.before[a] = between(0, 3);
        shape.size[a] = a == 0 ? between(1, 4) : between(1, a == 2 ? (is_long ? 700 : 70) : 20);
        const int64_t behind = between(0, 3), seen = (shape.kernel[a] - 1) * shape.dilation[a] + 1;
        const int64_t padded = std::max(seen, shape.before[a] + shape.size[a] + behind);
        shape.out[a] = (padded - seen) / shape.stride[a] + 1;
        if (is_pointwise) {
            shape.kernel[a] = shape.stride[a] = 1;
            shape.before[a] = 0;
            shape.out[a] = shape.size[a];
        }
    }
    made.name = (of_patches ? "patches " : "case ") + std::to_string(seed);
    made.x = random_floats(shape.batch * shape.num_channels() * shape.image_size(), seed);
    made.weight = random_floats(shape.num_outputs() * shape.num_inputs(), seed + 1);
    made.bias = random_floats(shape.num_outputs(), seed + 2);
    return made;
}

bool same(const Floats& a, const Floats& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
    const common::CpuFlags cpu = common::detect_cpu();
    std::printf("on");
    for (const Isa isa : matmul::kIsas)
        if (matmul::can_run(isa, cpu)) std::printf(" %s", matmul::name(isa));
    std::printf("\n");
    for (unsigned seed = 0; seed < 500; ++seed) {
        const Case made = random_case(seed, false);
        common::set_num_threads(1);
        const Floats expected = made.run(Isa::reference);
        made.check_against_loops(expected);
        for (const Isa isa : matmul::kIsas) {
            if (!matmul::can_run(isa, cpu)) continue;
            for (const int threads : {1, 2, 3}) {
                if (threads > 1 && seed % 8 != 0) continue;
                common::set_num_threads(threads);
                check(same(made.run(isa), expected),
                      made.name + ": bits of " + matmul::name(isa) + " on " + std::to_string(threads) + " threads");
            }
        }
    }
    for (unsigned seed = 0; seed < 200; ++seed) {
        const Case made = random_case(seed, true);
        made.check_against_loops(made.run(Isa::reference));
        for (const Isa isa : matmul::kIsas) {
            if (!matmul::can_run(isa, cpu)) continue;
            common::set_num_threads(1);
            const Floats expected = made.run_written_out(isa);
            for (const int threads : {1, 2, 3}) {
                if (threads > 1 && seed % 4 != 0) continue;
                common::set_num_threads(threads);
                check(same(made.run(isa), expected),
                      made.name + ": bits of " + matmul::name(isa) + " on " + std::to_string(threads) + " threads");
            }
        }
    }
    return checks::summary();
}
