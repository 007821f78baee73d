// Recurrent layers of every instruction set against loops in double precision, made to run under sanitizers: all arrays
// are exactly as large as they must be. Prints the failures and counts.
//
// Each step is checked from the state that the step before it gave: what is rounded to 8 bits or to bfloat16 is then
// the same number on both sides, and errors do not add up. Cells, which no step hands out, are carried in double
// precision with their error.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/cpu.h"
#include "common/pool.h"
#include "matmul/dispatch.h"
#include "matmul/samples.h"
#include "recurrent/recurrent.h"

namespace {

using namespace rarefy;
using checks::check;
using checks::check_close;
using checks::random_floats;
using matmul::Isa;
using matmul::Operator;
using matmul::Sample;
using recurrent::Mode;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

const double kEpsilon = std::ldexp(1.0, -24);

bool runs(Isa isa) { return matmul::can_run(isa, common::detect_cpu()); }

// The errors of tanh and the sigmoid, in units of the last place of the exact value.

double ulps(float found, double expected) {
    int exponent;
    std::frexp(expected, &exponent);
    return std::fabs(found - expected) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}

void check_functions(const recurrent::Kernels& kernels, const std::string& isa) {
    Floats x;
    for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 4099) {
        const auto low = static_cast<uint32_t>(bits);
        float value;
        std::memcpy(&value, &low, sizeof value);
        if (std::isfinite(value)) x.push_back(value);
    }
    for (int i = -200000; i <= 200000; ++i) x.push_back(static_cast<float>(i) * 2.0e-4f);
    const auto size = static_cast<int64_t>(x.size());
    const Floats zeros(x.size() * 3, 0.0f);
    Floats tangents(x.size()), sigmoids(x.size(), 1.0f);
    kernels.run[recurrent::kTanh]({1, size, x.data(), zeros.data(), zeros.data(), nullptr, nullptr, tangents.data()});
    // A state of 1 that the gate z keeps, where n is 0.
    Floats gates(x.size() * 3, 0.0f);
    std::copy(x.begin(), x.end(), gates.begin() + size);
    kernels.run[recurrent::kGru](
        {1, size, gates.data(), zeros.data(), zeros.data(), zeros.data(), nullptr, sigmoids.data()});
    double tangent_error = 0, sigmoid_error = 0, least = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        tangent_error = std::max(tangent_error, ulps(tangents[i], std::tanh(double(x[i]))));
        if (x[i] < -87.0f) {
            least = std::max(least, double(std::fabs(sigmoids[i])));
        } else {
            sigmoid_error = std::max(sigmoid_error, ulps(sigmoids[i], 1 / (1 + std::exp(-double(x[i])))));
        }
    }
    std::printf("%s: tanh within %.2f ulp, sigmoid within %.2f\n", isa.c_str(), tangent_error, sigmoid_error);
    check(tangent_error <= 3, isa + " tanh");
    check(sigmoid_error <= 3 && least <= 2e-38, isa + " sigmoid");
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
    const float extremes[3] = {kNan, kInfinity, -kInfinity};
    float y[3];
    kernels.run[recurrent::kTanh]({1, 3, extremes, zeros.data(), zeros.data(), nullptr, nullptr, y});
    check(std::isnan(y[0]) && y[1] == 1.0f && y[2] == -1.0f, isa + " tanh of what is not finite");
}

// A weight, or two in sequence or side by side, and what it is.
struct Weight {
    std::unique_ptr<Operator> by;
    std::vector<Sample> samples;
    enum { one, sum, chain } kind = one;

    // Shrunk by 2^-power, so that gates are not all open or shut.
    static Sample make_sample(const std::string& format, int64_t outputs, int64_t inputs, unsigned seed, int power) {
        Sample sample = matmul::make_sample({format, outputs, inputs, 64, true, 0.5, seed});
        const float factor = std::ldexp(1.0f, -power);
        for (matmul::SampleArray& array : sample.arrays) {
            const bool is_bf16 = array.element == matmul::Element::u16;
            if (!is_bf16 && array.element != matmul::Element::f32) continue;
            for (size_t at = 0; at < array.bytes.size(); at += is_bf16 ? 2 : 4) {
                if (is_bf16) {
                    uint16_t bits;
                    std::memcpy(&bits, &array.bytes[at], 2);
                    bits = static_cast<uint16_t>(bits - (power << 7));
                    std::memcpy(&array.bytes[at], &bits, 2);
                } else {
                    float value;
                    std::memcpy(&value, &array.bytes[at], 4);
                    value *= factor;
                    std::memcpy(&array.bytes[at], &value, 4);
                }
            }
        }
        for (float& value : sample.floats) value *= factor;
        for (float& value : sample.level_scales) value *= factor;
        return sample;
    }
    static Operator make_operator(const Sample& sample, Isa isa) {
        return Operator(std::make_shared<const matmul::Weights>(sample.packed(), isa));
    }

    Weight(const std::string& format, int64_t outputs, int64_t inputs, unsigned seed, Isa isa) {
        const bool is_integer = format.find("int") != std::string::npos;
        if (format == "sum") {
            kind = sum;
            samples = {make_sample("dense-int8-v1", outputs, inputs, seed, 10),
                       make_sample("bitmask-bf16-v1", outputs, inputs, seed + 1, 4)};
            by = std::make_unique<Operator>(
                Operator::sum(make_operator(samples[0], isa), make_operator(samples[1], isa)));
        } else if (format == "chain") {
            kind = chain;
            const int64_t rank = std::max<int64_t>(1, inputs / 3);
            samples = {make_sample("dense-f32-v1", rank, inputs, seed, 2),
                       make_sample("dense-f32-v1", outputs, rank, seed + 1, 2)};
            by = std::make_unique<Operator>(
                Operator::chain(make_operator(samples[0], isa), make_operator(samples[1], isa), 1));
        } else {
            samples = {make_sample(format, outputs, inputs, seed, is_integer ? 10 : 3)};
            by = std::make_unique<Operator>(make_operator(samples[0], isa));
        }
    }

    // y and its error, added.
    static void multiply(const Sample& sample, const Doubles& x, const Doubles& x_error, Doubles& y, Doubles& error) {
        const auto width = static_cast<size_t>(sample.num_inputs);
        Doubles activations;
        for (size_t begin = 0; begin < width; begin += 64) {
            const size_t end = std::min(begin + 64, width);
            float highest = 0.0f;
            for (size_t i = begin; i < end; ++i) highest = std::max(highest, std::fabs(static_cast<float>(x[i])));
            for (size_t i = begin; i < end; ++i) {
                const auto value = static_cast<float>(x[i]);
                if (!sample.levels.empty()) {
                    const double rounded = highest == 0.0f ? 0.0 : std::nearbyint(value * (127.0f / highest));
                    activations.push_back(rounded * static_cast<double>(highest / 127.0f));
                } else {
                    const bool rounds = sample.format.find("bf16") != std::string::npos;
                    activations.push_back(rounds ? matmul::rounded_to_bf16(value) : x[i]);
                }
            }
        }
        for (size_t output = 0; output < static_cast<size_t>(sample.num_outputs); ++output) {
            double magnitude = 0;
            for (size_t i = 0; i < width; ++i) {
                const size_t at = output * width + i;
                const double weight = sample.levels.empty()
                                          ? sample.floats[at]
                                          : sample.levels[at] * static_cast<double>(sample.level_scales[at]);
                y[output] += activations[i] * weight;
                magnitude += std::fabs(activations[i] * weight);
                error[output] += std::fabs(weight) * x_error[i];
            }
            error[output] += 1.01 * (static_cast<double>(width) + 8) * kEpsilon * magnitude;
        }
    }
    void multiply(const Doubles& x, const Doubles& x_error, Doubles& y, Doubles& error) const {
        y.assign(static_cast<size_t>(by->num_outputs()), 0.0);
        error.assign(y.size(), 0.0);
        if (kind == chain) {
            Doubles inside(static_cast<size_t>(samples[0].num_outputs)), inside_error(inside.size());
            multiply(samples[0], x, x_error, inside, inside_error);
            multiply(samples[1], inside, inside_error, y, error);
        } else {
            for (const Sample& sample : samples) multiply(sample, x, x_error, y, error);
        }
    }
};

struct Case {
    Mode mode;
    int64_t batch, hidden, projected, num_steps;  // projected 0: not
    bool has_lengths, reverse, has_biases;
};

struct Found {
    Floats y, hidden, cell;
    bool operator==(const Found& other) const { return y == other.y && hidden == other.hidden && cell == other.cell; }
};

struct Setup {
    Case c;
    int64_t num_gates, num_outputs;
    Weight meet_hidden;
    std::unique_ptr<Weight> project;
    Floats x, input_bias, hidden_bias, hidden, cell;
    std::vector<int64_t> lengths;

    Setup(const Case& wanted, const std::string& format, Isa isa)
        : c(wanted),
          num_gates(recurrent::count_gates(c.mode) * c.hidden),
          num_outputs(c.projected == 0 ? c.hidden : c.projected),
          meet_hidden(format, num_gates, num_outputs, 3, isa),
          x(random_floats(c.num_steps * c.batch * num_gates, 5)),
          hidden(random_floats(c.batch * num_outputs, 6)) {
        // What is multiplied with it is not seen: of floats it must not be rounded.
        if (c.projected > 0) project = std::make_unique<Weight>("dense-f32-v1", c.projected, c.hidden, 4, isa);
        if (c.mode == recurrent::kLstm) cell = random_floats(c.batch * c.hidden, 7);
        if (c.has_biases) {
            input_bias = random_floats(num_gates, 8);
            hidden_bias = random_floats(num_gates, 9);
        }
        std::mt19937 random(10);
        for (int64_t i = 0; i < c.batch; ++i) lengths.push_back(random() % static_cast<uint64_t>(c.num_steps + 1));
        std::sort(lengths.rbegin(), lengths.rend());
        if (!c.has_lengths) lengths.assign(lengths.size(), c.num_steps);
    }

    Found run(const recurrent::Kernels& kernels) const {
        Found found{Floats(static_cast<size_t>(c.num_steps * c.batch * num_outputs), std::nanf("")), hidden, cell};
        const auto bias = [&](const Floats& values) { return c.has_biases ? values.data() : nullptr; };
        const recurrent::Layer layer{c.mode, meet_hidden.by.get(), project == nullptr ? nullptr : project->by.get(),
                                     bias(input_bias), bias(hidden_bias)};
        recurrent::run(kernels, layer,
                       {c.num_steps, c.batch, x.data(), c.has_lengths ? lengths.data() : nullptr, c.reverse,
                        found.hidden.data(), c.mode == recurrent::kLstm ? found.cell.data() : nullptr, found.y.data()});
        return found;
    }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One sequence of what was found.
void check_sequence(const Setup& setup, const Found& found, int64_t sequence, const std::string& what) {
    const Case& c = setup.c;
    const auto width = static_cast<size_t>(c.hidden), outputs = static_cast<size_t>(setup.num_outputs);
    const int64_t length = setup.lengths[static_cast<size_t>(sequence)];
    const float* state = &setup.hidden[static_cast<size_t>(sequence) * outputs];
    Doubles cells(width), cell_errors(width, 0.0);
    const bool is_lstm = c.mode == recurrent::kLstm;
    if (is_lstm) std::copy_n(&setup.cell[static_cast<size_t>(sequence) * width], width, cells.begin());
    for (int64_t number = 0; number < length; ++number) {
        const int64_t step = c.reverse ? length - 1 - number : number;
        const auto row = static_cast<size_t>(step * c.batch + sequence);
        Doubles met, errors;
        setup.meet_hidden.multiply(Doubles(state, state + outputs), Doubles(outputs, 0.0), met, errors);
        Doubles hidden(width), hidden_errors(width);
        for (size_t i = 0; i < width; ++i) {
            double error = 0;
            const auto x_of = [&](size_t gate) {
                const double bias = c.has_biases ? setup.input_bias[gate * width + i] : 0.0;
                return double(setup.x[row * static_cast<size_t>(setup.num_gates) + gate * width + i]) + bias;
            };
            const auto met_of = [&](size_t gate) {
                const double value = met[gate * width + i] + (c.has_biases ? setup.hidden_bias[gate * width + i] : 0.0);
                error = std::max(
                    error, errors[gate * width + i] + 4 * kEpsilon * (std::fabs(x_of(gate)) + std::fabs(value) + 4));
                return value;
            };
            if (is_lstm) {
                const double in = sigmoid(x_of(0) + met_of(0)), forget = sigmoid(x_of(1) + met_of(1));
                const double added = in * std::tanh(x_of(2) + met_of(2)), out = sigmoid(x_of(3) + met_of(3));
                const double cell = forget * cells[i] + added;
                cell_errors[i] += (error + 16 * kEpsilon) * (2 + std::fabs(cells[i]));
                cells[i] = cell;
                hidden[i] = out * std::tanh(cell);
                hidden_errors[i] = error + cell_errors[i] + 16 * kEpsilon;
            } else if (c.mode == recurrent::kGru) {
                const double reset = sigmoid(x_of(0) + met_of(0)), keep = sigmoid(x_of(1) + met_of(1));
                const double value = met_of(2), fresh = std::tanh(x_of(2) + reset * value);
                hidden[i] = fresh + keep * (state[i] - fresh);
                hidden_errors[i] = (error + 16 * kEpsilon) * (3 + std::fabs(value) + std::fabs(state[i]));
            } else {
                const double s = x_of(0) + met_of(0);
                hidden[i] = c.mode == recurrent::kTanh ? std::tanh(s) : std::max(0.0, s);
                hidden_errors[i] = error + 8 * kEpsilon;
            }
        }
        if (setup.project != nullptr) {
            Doubles projected, projected_errors;
            setup.project->multiply(hidden, hidden_errors, projected, projected_errors);
            hidden = projected;
            hidden_errors = projected_errors;
        }
        state = &found.y[row * outputs];
        for (size_t i = 0; i < outputs; ++i) check_close(state[i], hidden[i], hidden_errors[i], what);
    }
    for (int64_t step = length; step < c.num_steps; ++step)
        for (size_t i = 0; i < outputs; ++i)
            check(found.y[static_cast<size_t>(step * c.batch + sequence) * outputs + i] == 0.0f,
                  what + " behind the end");
    const float* last = &found.hidden[static_cast<size_t>(sequence) * outputs];
    check(std::equal(last, last + outputs, state), what + ": the last state");
    for (size_t i = 0; is_lstm && i < width; ++i)
        check_close(found.cell[static_cast<size_t>(sequence) * width + i], cells[i], cell_errors[i], what + " cell");
}

void check_case(const Case& c, const std::string& format, Isa isa) {
    const recurrent::Kernels& kernels = recurrent::find_kernels(matmul::name(isa));
    const Setup setup(c, format, isa);
    const std::string what = std::string(matmul::name(isa)) + " " + format + " mode " + std::to_string(c.mode) +
                             ", batch " + std::to_string(c.batch) + ", hidden " + std::to_string(c.hidden);
    common::set_num_threads(1);
    const Found found = setup.run(kernels);
    for (int64_t sequence = 0; sequence < c.batch; ++sequence) check_sequence(setup, found, sequence, what);
    for (const int num_threads : {2, 3}) {
        common::set_num_threads(num_threads);
        check(setup.run(kernels) == found, what + ": threads change bits");
    }
    check(setup.run(kernels) == found, what + ": a second call gives other bits");
}

}  // namespace

int main() {
    std::vector<Isa> isas;
    for (const Isa isa : matmul::kIsas)
        if (runs(isa)) isas.push_back(isa);
    for (const Isa isa : isas) {
        check_functions(recurrent::find_kernels(matmul::name(isa)), matmul::name(isa));
        int number = 0;
        for (const char* format : {"dense-f32-v1", "dense-bf16-v1", "dense-int8-v1", "bitmask-int4-v1", "sum", "chain"})
            for (int mode = 0; mode < recurrent::kNumModes; ++mode)
                for (const int64_t hidden : {1, 15, 64, 100})
                    for (const int64_t batch : {1, 3, 17}) {
                        // All pairs of the choices come along, not all of them together.
                        ++number;
                        const auto choose = [&](int place) { return (number >> place & 1) == 1; };
                        const int64_t projected = mode == recurrent::kLstm && choose(0) ? (hidden + 1) / 2 : 0;
                        check_case({static_cast<Mode>(mode), batch, hidden, projected, 1 + number % 5, number % 3 != 0,
                                    choose(1), choose(2)},
                                   format, isa);
                    }
        // Gates in more than one piece.
        check_case({recurrent::kLstm, 70, 100, 0, 3, true, true, true}, "dense-f32-v1", isa);
        check_case({recurrent::kGru, 3, 0 + 130, 0, 0, false, false, true}, "dense-int8-v1", isa);
        check_case({recurrent::kGru, 0, 5, 0, 3, true, false, true}, "dense-int8-v1", isa);
    }
    std::printf("on");
    for (const Isa isa : isas) std::printf(" %s", matmul::name(isa));
    std::printf("\n");
    return checks::summary();
}
