// Every listed kernel against loops in double precision, made to run under sanitizers; prints the failures and counts.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/pool.h"
#include "matmul/checks.h"

namespace {

using namespace rarefy;
using checks::check;
using checks::described;
using checks::product;
using checks::random_floats;
using checks::TestedFormat;
using matmul::Isa;
using matmul::PackedArrays;
using matmul::Sample;
using matmul::SampleArray;
using matmul::Weights;

// What the product should be, and how far float32 sums may stray from it.
struct Expected {
    std::vector<double> y, bound;
};

// As the kernels for `weights` see a row: rounded to 8 bits of every 64, or to bfloat16, or as it is.
std::vector<double> met_by(const Weights& weights, const float* x, int64_t num_inputs) {
    std::vector<double> activations;
    for (int64_t begin = 0; begin < num_inputs; begin += 64) {
        const int64_t end = std::min(begin + 64, num_inputs);
        float amax = 0.0f;
        for (int64_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(x[i]));
        const float inverse = 127.0f / amax;
        for (int64_t i = begin; i < end; ++i) {
            const double rounded = amax == 0.0f ? 0.0 : std::nearbyint(x[i] * inverse);
            const float exact = weights.is_bf16() ? matmul::rounded_to_bf16(x[i]) : x[i];
            activations.push_back(weights.is_integer() ? rounded * static_cast<double>(amax / 127.0f) : exact);
        }
    }
    return activations;
}

Expected expect(const Sample& sample, const Weights& weights, const std::vector<float>& x, int64_t num_rows) {
    const bool is_integer = weights.is_integer();
    const int64_t num_inputs = sample.num_inputs;
    const auto num_outputs = static_cast<size_t>(sample.num_outputs);
    // The outputs of an input side by side, so that the sums of all of them grow together: compilers make vectors of
    // that, of one sum after the other they may not.
    std::vector<double> columns;
    for (int64_t i = 0; i < num_inputs; ++i) {
        for (size_t output = 0; output < num_outputs; ++output) {
            const size_t at = output * static_cast<size_t>(num_inputs) + static_cast<size_t>(i);
            columns.push_back(is_integer ? sample.levels[at] * static_cast<double>(sample.level_scales[at])
                                         : sample.floats[at]);
        }
    }
    Expected expected;
    const double steps = is_integer ? num_inputs / 32 + 5 : num_inputs + 3, epsilon = std::ldexp(1.0, -24);
    for (int64_t row = 0; row < num_rows; ++row) {
        std::vector<double> sums(num_outputs, 0.0), magnitudes(num_outputs, 0.0);
        const double* column = columns.data();
        for (const double activation : met_by(weights, x.data() + row * num_inputs, num_inputs)) {
            for (size_t output = 0; output < num_outputs; ++output) {
                const double term = activation * column[output];
                sums[output] += term;
                magnitudes[output] += std::fabs(term);
            }
            column += num_outputs;
        }
        expected.y.insert(expected.y.end(), sums.begin(), sums.end());
        for (const double magnitude : magnitudes) expected.bound.push_back(1.01 * steps * epsilon * magnitude);
    }
    return expected;
}

void test_products() {
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric;
        double density;
    } kCases[] = {{1, 1, 0, true, 1.0},       {15, 63, 32, false, 0.5},   {16, 64, 64, true, 0.5},
                  {17, 65, 64, false, 0.1},   {66, 129, 96, false, 0.9},  {97, 601, 0, false, 0.5},
                  {131, 1100, 32, true, 0.3}, {40, 100, 128, true, 0.0},  {0, 64, 64, true, 0.5},
                  {5, 0, 0, true, 0.5},       {18, 4170, 0, true, 0.5},   {33, 700, 0, true, 0.2},
                  {290, 700, 96, true, 0.5},  {399, 1024, 128, true, 0.5}};
    constexpr int64_t kMostRows = 100;
    for (const TestedFormat& tested : checks::tested_formats()) {
        for (const auto& c : kCases) {
            const Sample sample =
                matmul::make_sample({tested.format, c.outputs, c.inputs, c.group_size, c.symmetric, c.density, 3});
            const auto of_isas = checks::packed_for(tested.isas, sample);
            // Fewer rows are the first of these.
            const Expected expected = expect(sample, *of_isas[0], random_floats(kMostRows * c.inputs, 5), kMostRows);
            for (const int64_t num_rows : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, int64_t{13}, kMostRows}) {
                const std::vector<float> x = random_floats(num_rows * c.inputs, 5);
                // Integers leave no freedom: every instruction set gives the bits of the reference, which is the first.
                std::vector<float> first;
                for (const auto& weights : of_isas) {
                    if (!weights->is_integer()) first.clear();
                    for (const int num_threads : {1, 3}) {
                        common::set_num_threads(num_threads);
                        const std::vector<float> y = product(*weights, x, num_rows, c.inputs);
                        bool close = true;
                        for (size_t i = 0; i < y.size(); ++i)
                            close = close && std::fabs(static_cast<double>(y[i]) - expected.y[i]) <= expected.bound[i];
                        check(close, described(tested.format, weights->isa(), c.outputs, c.inputs, num_rows));
                        if (first.empty()) first = y;
                        check(y == first, "the same bits for every number of threads, and of integers on every CPU");
                    }
                }
            }
        }
    }
}

// A weight large enough that each thread's share of one row is cut into pieces, of which others take some.
void test_pieces_of_one_row() {
    constexpr int64_t kOutputs = 1063, kInputs = 2112;
    const std::vector<float> x = random_floats(kInputs, 5);
    for (const TestedFormat& tested : checks::tested_formats()) {
        if (tested.isas.size() == 1) continue;
        const Sample sample = matmul::make_sample({tested.format, kOutputs, kInputs, 64, false, 0.5, 3});
        for (const Isa isa : tested.isas) {
            if (isa == Isa::reference) continue;
            const Weights weights(sample.packed(), isa);
            common::set_num_threads(1);
            const std::vector<float> expected = product(weights, x, 1, kInputs);
            for (const int num_threads : {2, 3, 2, 3}) {
                common::set_num_threads(num_threads);
                check(product(weights, x, 1, kInputs) == expected,
                      "pieces of one row, " + tested.format + " on " + matmul::name(isa));
                std::vector<float> twice[2] = {std::vector<float>(kOutputs), std::vector<float>(kOutputs)};
                matmul::multiply(x.data(), 1, kInputs, {{&weights, twice[0].data()}, {&weights, twice[1].data()}});
                check(twice[0] == expected && twice[1] == expected, "pieces of two products");
            }
        }
    }
}

// Weights so small that each thread has rows of its own, and so many rows that sums of bytes stay in registers: all
// give the bits of the reference with one thread.
void test_rows_of_threads() {
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric;
    } kCases[] = {
        {48, 384, 0, true}, {75, 500, 0, true}, {80, 64, 64, true}, {80, 65, 160, true}, {33, 320, 64, false}};
    constexpr int64_t kMostRows = 260;
    for (const TestedFormat& tested : checks::tested_formats()) {
        if (tested.format.rfind("dense-int", 0) != 0) continue;
        for (const auto& c : kCases) {
            const Sample sample =
                matmul::make_sample({tested.format, c.outputs, c.inputs, c.group_size, c.symmetric, 1.0, 3});
            const auto of_isas = checks::packed_for(tested.isas, sample);
            std::vector<float> x = random_floats(kMostRows * c.inputs, 5);
            x[static_cast<size_t>(40 * c.inputs)] = std::numeric_limits<float>::infinity();
            common::set_num_threads(1);
            std::vector<float> of_reference;
            for (const auto& weights : of_isas) {
                if (of_reference.empty()) of_reference = product(*weights, x, kMostRows, c.inputs);
                // Rows with a number that is not finite have nothing else, and NaN is not equal to itself.
                const auto bits_of = [](const std::vector<float>& y, size_t count) {
                    std::vector<uint32_t> bits(count);
                    std::memcpy(bits.data(), y.data(), count * 4);
                    for (size_t i = 0; i < count; ++i) bits[i] = std::isnan(y[i]) ? 0x7fc00000 : bits[i];
                    return bits;
                };
                for (const int64_t num_rows :
                     {int64_t{31}, int64_t{32}, int64_t{61}, int64_t{96}, int64_t{128}, kMostRows}) {
                    const auto count = static_cast<size_t>(num_rows * c.outputs);
                    const auto expected = bits_of(of_reference, count);
                    for (const int num_threads : {1, 2, 3, 4}) {
                        common::set_num_threads(num_threads);
                        std::vector<float> y(count + 1, 12345.0f), z(count + 1, 12345.0f);
                        matmul::multiply(x.data(), num_rows, c.inputs,
                                         {{weights.get(), y.data()}, {weights.get(), z.data()}});
                        check(
                            bits_of(y, count) == expected && bits_of(z, count) == expected,
                            "shared rows, " + described(tested.format, weights->isa(), c.outputs, c.inputs, num_rows));
                        check(y.back() == 12345.0f && z.back() == 12345.0f, "nothing is written behind outputs");
                    }
                }
                common::set_num_threads(1);
            }
        }
    }
}

bool refused(const PackedArrays& arrays) {
    try {
        const Weights weights(arrays, Isa::reference);
        return false;
    } catch (const std::invalid_argument&) {
        return true;
    }
}

void test_damaged_arrays() {
    for (const TestedFormat& tested : checks::tested_formats()) {
        const std::string& name = tested.format;
        const Sample sample = matmul::make_sample({name, 20, 70, 32, false, 0.5, 7});
        const PackedArrays good = sample.packed();
        check(!refused(good), name + " undamaged");
        const auto check_refused = [&](const std::string& what, auto&& damage) {
            PackedArrays damaged = good;
            damage(damaged);
            check(refused(damaged), name + ", " + what);
        };
        check_refused("one output more", [](PackedArrays& p) { p.num_outputs = 21; });
        check_refused("more inputs", [](PackedArrays& p) { p.num_inputs = 90; });
        check_refused("negative outputs", [](PackedArrays& p) { p.num_outputs = -1; });
        check_refused("far too many inputs", [](PackedArrays& p) { p.num_inputs = int64_t{1} << 60; });
        check_refused("far too many elements",
                      [](PackedArrays& p) { p.num_outputs = p.num_inputs = (int64_t{1} << 31) - 1; });
        check_refused("an unknown format", [](PackedArrays& p) { p.format = "dense-int3-v0"; });
        check_refused("a wrong group size", [](PackedArrays& p) { p.integers = {{"group_size", 48}}; });
        check_refused("an unknown array", [](PackedArrays& p) {
            p.arrays.push_back(p.arrays[0]);
            p.arrays.back().name = "surprise";
        });
        for (size_t i = 0; i < good.arrays.size(); ++i) {
            const std::string& array = good.arrays[i].name;
            check_refused(array + " one byte shorter", [&](PackedArrays& p) { p.arrays[i].num_bytes -= 1; });
            check_refused(array + " one byte longer", [&](PackedArrays& p) { p.arrays[i].num_bytes += 1; });
            check_refused(array + " without memory", [&](PackedArrays& p) { p.arrays[i].bytes = nullptr; });
            check_refused(array + " of another dtype",
                          [&](PackedArrays& p) { p.arrays[i].element = matmul::Element::other; });
            if (array == "zero_points") continue;  // without them the grid is symmetric
            check_refused(array + " missing",
                          [&](PackedArrays& p) { p.arrays.erase(p.arrays.begin() + static_cast<std::ptrdiff_t>(i)); });
        }
        // Copies of exactly the right size, so that the sanitizer sees a read behind an array.
        std::mt19937 random(11);
        for (int round = 0; round < 60; ++round) {
            Sample changed = sample;
            SampleArray& array = changed.arrays[random() % changed.arrays.size()];
            array.bytes[random() % array.bytes.size()] = static_cast<uint8_t>(random());
            if (random() % 4 == 0) array.bytes.resize(random() % array.bytes.size());
            array.bytes.shrink_to_fit();
            for (matmul::NamedInteger& integer : changed.integers)
                if (random() % 8 == 0) integer.value = static_cast<int64_t>(random() % 200) - 20;
            for (const Isa isa : matmul::kIsas) {
                if (!checks::runs(isa)) continue;
                try {
                    const Weights weights(changed.packed(), isa);
                    product(weights, random_floats(70 * 5, 1), 5, 70);
                    product(weights, random_floats(70, 1), 1, 70);
                } catch (const std::invalid_argument&) {
                    continue;
                }
            }
        }
    }
}

void test_non_finite_rows() {
    std::vector<float> x = random_floats(3 * 130, 2);
    x[130 + 129] = std::numeric_limits<float>::quiet_NaN();
    x[2 * 130] = 1e-42f;
    for (const TestedFormat& tested : checks::tested_formats()) {
        const Sample sample = matmul::make_sample({tested.format, 20, 130, 64, true, 0.5, 9});
        for (const Isa isa : tested.isas) {
            const std::vector<float> y = product(Weights(sample.packed(), isa), x, 3, 130);
            for (size_t i = 0; i < 20; ++i)
                check(std::isfinite(y[i]) && std::isnan(y[20 + i]) && std::isfinite(y[40 + i]), "NaN stays in its row");
        }
    }
}

// Rows of taps are the same rows as those written out, to the last bit, over more than one piece of them.
void test_taps() {
    constexpr int64_t kChannels = 128, kPixels = 1500, kRows = 1400;
    const std::vector<int64_t> offsets = {0, 1, 40, 99};
    const auto num_inputs = kChannels * static_cast<int64_t>(offsets.size());
    const std::vector<float> pixels = random_floats(kPixels * kChannels, 5);
    std::vector<int64_t> starts;
    std::vector<float> x;
    for (int64_t row = 0; row < kRows; ++row) {
        starts.push_back((row * 7) % (kPixels - 99));
        for (const int64_t offset : offsets) {
            const auto from = pixels.begin() + (starts.back() + offset) * kChannels;
            x.insert(x.end(), from, from + kChannels);
        }
    }
    const matmul::TapRows taps{starts.data(), kRows, offsets.data(), static_cast<int64_t>(offsets.size())};
    for (const TestedFormat& tested : checks::tested_formats()) {
        const Sample sample = matmul::make_sample({tested.format, 20, num_inputs, 64, false, 0.5, 3});
        for (const Isa isa : tested.isas) {
            const Weights weights(sample.packed(), isa);
            if (!weights.is_integer()) break;
            std::vector<float> y(static_cast<size_t>(kRows * 20 + 1), 12345.0f);
            matmul::multiply_taps(pixels.data(), kPixels, kChannels, taps, {{&weights, y.data()}});
            check(y.back() == 12345.0f, "nothing is written behind the outputs of taps");
            y.pop_back();
            check(y == product(weights, x, kRows, num_inputs), tested.format + " taps on " + matmul::name(isa));
        }
    }
}

}  // namespace

int main() {
    test_products();
    test_pieces_of_one_row();
    test_rows_of_threads();
    test_damaged_arrays();
    test_non_finite_rows();
    test_taps();
    return checks::summary_of_isas();
}
