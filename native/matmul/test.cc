// Every listed kernel against loops in double precision, made to run under sanitizers; prints the failures and counts.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/cpu.h"
#include "common/pool.h"
#include "matmul/dispatch.h"
#include "matmul/samples.h"
#include "matmul/weights.h"

namespace {

using namespace rarefy;
using matmul::Isa;
using matmul::PackedArrays;
using matmul::Sample;
using matmul::SampleArray;
using matmul::SampleSpec;
using matmul::Weights;

int num_checks = 0;
int num_failures = 0;

void check(bool passed, const std::string& what) {
    ++num_checks;
    if (passed) return;
    ++num_failures;
    std::printf("FAILED: %s\n", what.c_str());
}

bool runs(Isa isa) { return matmul::can_run(isa, common::detect_cpu()); }

std::vector<float> random_rows(int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(count));
    for (float& value : x) value = normal(random);
    return x;
}

std::vector<float> product(const Weights& weights, const std::vector<float>& x, int64_t num_rows, int64_t num_inputs) {
    // One element more than needed, to see that nothing is written behind the last output.
    const auto size = static_cast<size_t>(num_rows * weights.view().num_outputs);
    std::vector<float> y(size + 1, 12345.0f);
    matmul::multiply(x.data(), num_rows, num_inputs, {{&weights, y.data()}});
    check(y.back() == 12345.0f, "nothing is written behind the outputs");
    y.pop_back();
    return y;
}

// What the product should be, and how far float32 sums may stray from it.
struct Expected {
    std::vector<double> y, bound;
};

Expected expect(const Sample& sample, const Weights& weights, const std::vector<float>& x, int64_t num_rows) {
    const bool is_integer = weights.is_integer();
    Expected expected;
    const int64_t num_inputs = sample.num_inputs;
    const double epsilon = std::ldexp(1.0, -24);
    for (int64_t row = 0; row < num_rows; ++row) {
        std::vector<double> activations;
        for (int64_t begin = 0; begin < num_inputs; begin += 64) {
            const int64_t end = std::min(begin + 64, num_inputs);
            float amax = 0.0f;
            for (int64_t i = begin; i < end; ++i)
                amax = std::max(amax, std::fabs(x[static_cast<size_t>(row * num_inputs + i)]));
            const float inverse = 127.0f / amax;
            for (int64_t i = begin; i < end; ++i) {
                const float value = x[static_cast<size_t>(row * num_inputs + i)];
                const double rounded = amax == 0.0f ? 0.0 : std::nearbyint(value * inverse);
                const float exact = weights.is_bf16() ? matmul::rounded_to_bf16(value) : value;
                activations.push_back(is_integer ? rounded * static_cast<double>(amax / 127.0f) : exact);
            }
        }
        const double steps = is_integer ? num_inputs / 32 + 5 : num_inputs + 3;
        for (int64_t output = 0; output < sample.num_outputs; ++output) {
            double sum = 0, magnitude = 0;
            for (int64_t i = 0; i < num_inputs; ++i) {
                const auto at = static_cast<size_t>(output * num_inputs + i);
                const double weight =
                    is_integer ? sample.levels[at] * static_cast<double>(sample.level_scales[at]) : sample.floats[at];
                sum += activations[static_cast<size_t>(i)] * weight;
                magnitude += std::fabs(activations[static_cast<size_t>(i)] * weight);
            }
            expected.y.push_back(sum);
            expected.bound.push_back(1.01 * steps * epsilon * magnitude);
        }
    }
    return expected;
}

void test_products() {
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric;
        double density;
    } kCases[] = {{1, 1, 0, true, 1.0},       {15, 63, 32, false, 0.5},  {16, 64, 64, true, 0.5},
                  {17, 65, 64, false, 0.1},   {66, 129, 96, false, 0.9}, {97, 601, 0, false, 0.5},
                  {131, 1100, 32, true, 0.3}, {40, 100, 128, true, 0.0}, {0, 64, 64, true, 0.5},
                  {5, 0, 0, true, 0.5},       {18, 4170, 0, true, 0.5},  {33, 700, 0, true, 0.2}};
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (!runs(kernel.isa)) continue;
        for (const auto& c : kCases) {
            const Sample sample =
                matmul::make_sample({kernel.format, c.outputs, c.inputs, c.group_size, c.symmetric, c.density, 3});
            const Weights weights(sample.packed(), kernel.isa);
            for (const int64_t num_rows : {0, 1, 2, 7, 13, 100}) {
                const std::vector<float> x = random_rows(num_rows * c.inputs, 5);
                const Expected expected = expect(sample, weights, x, num_rows);
                // Integers leave no freedom: every instruction set gives the bits of the reference.
                std::vector<float> first;
                if (weights.is_integer())
                    first = product(Weights(sample.packed(), Isa::reference), x, num_rows, c.inputs);
                for (const int num_threads : {1, 3}) {
                    common::set_num_threads(num_threads);
                    const std::vector<float> y = product(weights, x, num_rows, c.inputs);
                    bool close = true;
                    for (size_t i = 0; i < y.size(); ++i)
                        close = close && std::fabs(static_cast<double>(y[i]) - expected.y[i]) <= expected.bound[i];
                    check(close, kernel.format + " on " + matmul::name(kernel.isa) + ", " + std::to_string(c.outputs) +
                                     " x " + std::to_string(c.inputs) + ", rows " + std::to_string(num_rows));
                    if (first.empty()) first = y;
                    check(y == first, "the same bits for every number of threads, and of integers on every CPU");
                }
            }
        }
    }
}

// A weight large enough that each thread's share of one row is cut into pieces, of which others take some.
void test_pieces_of_one_row() {
    constexpr int64_t kOutputs = 1063, kInputs = 2112;
    const std::vector<float> x = random_rows(kInputs, 5);
    std::string format;
    std::vector<Sample> samples;
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (!runs(kernel.isa) || kernel.isa == Isa::reference) continue;
        if (kernel.format != format)
            samples.assign(1, matmul::make_sample({kernel.format, kOutputs, kInputs, 64, false, 0.5, 3}));
        format = kernel.format;
        const Weights weights(samples[0].packed(), kernel.isa);
        common::set_num_threads(1);
        const std::vector<float> expected = product(weights, x, 1, kInputs);
        for (const int num_threads : {2, 3, 2, 3}) {
            common::set_num_threads(num_threads);
            check(product(weights, x, 1, kInputs) == expected,
                  "pieces of one row, " + kernel.format + " on " + matmul::name(kernel.isa));
            std::vector<float> twice[2] = {std::vector<float>(kOutputs), std::vector<float>(kOutputs)};
            matmul::multiply(x.data(), 1, kInputs, {{&weights, twice[0].data()}, {&weights, twice[1].data()}});
            check(twice[0] == expected && twice[1] == expected, "pieces of two products");
        }
    }
}

// Every arrangement of N:M, against the reference, whose N:M is a mask.
void test_patterns() {
    constexpr struct {
        int keep, group;
    } kPatterns[] = {{1, 64},  {3, 64},  {4, 64},  {7, 64},  {8, 64}, {9, 64},  {16, 64}, {17, 64},
                     {32, 64}, {33, 64}, {63, 64}, {64, 64}, {4, 32}, {11, 32}, {2, 16},  {5, 16},
                     {1, 8},   {3, 8},   {1, 4},   {2, 4},   {1, 2},  {1, 1},   {5, 12}};
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric;
    } kCases[] = {{1, 7, 0, true},     {17, 61, 32, false}, {16, 64, 64, false},  {33, 65, 128, true},
                  {31, 127, 0, false}, {18, 131, 32, true}, {50, 640, 64, false}, {130, 1091, 128, true}};
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        const bool floats = kernel.format == "nm-bf16-v1";  // compared with those that share their multiply-adds
        const bool lists = kernel.isa == Isa::avx512 || kernel.isa == Isa::avx512_bf16;
        if (!runs(kernel.isa) || kernel.isa == Isa::reference) continue;
        if (kernel.format.rfind("nm-int", 0) != 0 && !(floats && lists)) continue;
        const Isa other = floats ? Isa::avx2 : Isa::reference;
        for (const auto& pattern : kPatterns) {
            for (const auto& c : kCases) {
                const Sample sample = matmul::make_sample({kernel.format, c.outputs, c.inputs, c.group_size,
                                                           c.symmetric, 0.5, 13, pattern.keep, pattern.group});
                const Weights weights(sample.packed(), kernel.isa), reference(sample.packed(), other);
                for (const int64_t num_rows : {1, 2, 5, 17, 30}) {
                    const std::vector<float> x = random_rows(num_rows * c.inputs, 5);
                    common::set_num_threads(static_cast<int>(num_rows % 3 + 1));
                    check(product(weights, x, num_rows, c.inputs) == product(reference, x, num_rows, c.inputs),
                          kernel.format + " on " + matmul::name(kernel.isa) + ", " + std::to_string(pattern.keep) +
                              " of " + std::to_string(pattern.group) + ", " + std::to_string(c.outputs) + " x " +
                              std::to_string(c.inputs) + ", rows " + std::to_string(num_rows));
                }
            }
        }
    }
}

// Masks with so many rows that lists are made of them: panels of few entries, of blocks of every kind, and beside
// panels that are dense; a NaN in a row.
void test_masks_of_many_rows() {
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric, uneven;
        double density;
    } kCases[] = {
        {16, 64, 64, true, false, 0.2},     {37, 805, 64, true, true, 0.2},   {37, 805, 128, false, true, 0.1},
        {150, 700, 0, true, false, 0.05},   {33, 520, 64, false, true, 0.01}, {21, 191, 0, true, false, 0.0},
        {49, 1089, 128, true, false, 0.35}, {20, 449, 32, false, true, 0.1},  {18, 400, 64, true, false, 0.9}};
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (kernel.format.rfind("bitmask-int", 0) != 0 || !runs(kernel.isa) || kernel.isa == Isa::reference) continue;
        for (const auto& c : kCases) {
            SampleSpec spec{kernel.format, c.outputs, c.inputs, c.group_size, c.symmetric, c.density, 19};
            spec.uneven = c.uneven;
            Sample sample = matmul::make_sample(spec);
            const Weights weights(sample.packed(), kernel.isa), reference(sample.packed(), Isa::reference);
            for (const int64_t num_rows : {16, 25, 61, 128, 131}) {
                std::vector<float> x = random_rows(num_rows * c.inputs, 23);
                x[static_cast<size_t>(3 * c.inputs)] = std::numeric_limits<float>::quiet_NaN();
                common::set_num_threads(static_cast<int>(num_rows % 3 + 1));
                const std::vector<float> y = product(weights, x, num_rows, c.inputs);
                const std::vector<float> first = product(reference, x, num_rows, c.inputs);
                bool same = true;
                for (size_t i = 0; i < y.size(); ++i)
                    same = same && (static_cast<int64_t>(i) / c.outputs == 3 ? std::isnan(y[i]) : y[i] == first[i]);
                check(same, kernel.format + " on " + matmul::name(kernel.isa) + ", " + std::to_string(c.outputs) +
                                " x " + std::to_string(c.inputs) + ", rows " + std::to_string(num_rows));
            }
        }
    }
}

// Masks over bfloat16 with so many rows that zeros are left out, against the same rows one by one, which meet them;
// also where a row holds a NaN and another one an infinity.
void test_float_masks_of_many_rows() {
    constexpr struct {
        int64_t outputs, inputs;
        double density;
    } kCases[] = {{16, 64, 0.2}, {37, 805, 0.5}, {50, 640, 0.1}, {21, 191, 0.0}, {18, 400, 0.4}};
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        const bool masked = kernel.format == "bitmask-bf16-v1" || kernel.format == "nm-bf16-v1";
        if (!masked || !runs(kernel.isa) || kernel.isa == Isa::amx) continue;
        for (const auto& c : kCases) {
            const Weights weights(
                matmul::make_sample({kernel.format, c.outputs, c.inputs, 0, true, c.density, 29}).packed(), kernel.isa);
            for (const int64_t num_rows : {31, 64, 96, 131}) {
                for (const bool finite : {true, false}) {
                    std::vector<float> x = random_rows(num_rows * c.inputs, 31);
                    if (!finite) {
                        x[static_cast<size_t>(3 * c.inputs)] = std::numeric_limits<float>::quiet_NaN();
                        x[static_cast<size_t>(5 * c.inputs + 7)] = std::numeric_limits<float>::infinity();
                    }
                    common::set_num_threads(static_cast<int>(num_rows % 3 + 1));
                    const std::vector<float> y = product(weights, x, num_rows, c.inputs);
                    bool same = true;
                    for (int64_t row = 0; row < num_rows; ++row) {
                        const std::vector<float> one(x.begin() + row * c.inputs, x.begin() + (row + 1) * c.inputs);
                        const std::vector<float> alone = product(weights, one, 1, c.inputs);
                        for (int64_t i = 0; i < c.outputs; ++i) {
                            const float a = y[static_cast<size_t>(row * c.outputs + i)],
                                        b = alone[static_cast<size_t>(i)];
                            same = same && (std::isnan(b) ? std::isnan(a) : a == b);
                        }
                    }
                    check(same, kernel.format + " on " + matmul::name(kernel.isa) + ", " + std::to_string(c.outputs) +
                                    " x " + std::to_string(c.inputs) + ", rows " + std::to_string(num_rows));
                }
            }
        }
    }
}

// As many entries as there should be, but a group has one too many and another one too few.
void test_groups_that_keep_too_many() {
    for (const char* const format : {"nm-int3-v1", "nm-int4-v1", "nm-int8-v1"}) {
        for (const int group : {64, 32, 16, 4}) {
            for (const int keep : {1, group / 4, group / 2}) {
                const SampleSpec spec{format, 20, 192, 64, false, 0.5, 17, keep, group};
                Sample sample = matmul::make_sample(spec);
                std::vector<uint8_t>& mask = sample.arrays[0].bytes;
                const auto kept = [&](int column) { return mask[24 * 7 + column / 8] >> column % 8 & 1; };
                int from = 0, to = group;  // row 7: an entry of the first group moves to the second
                while (!kept(from)) ++from;
                while (kept(to)) ++to;
                mask[24 * 7 + from / 8] ^= static_cast<uint8_t>(1 << from % 8);
                mask[24 * 7 + to / 8] ^= static_cast<uint8_t>(1 << to % 8);
                for (const Isa isa : matmul::kIsas) {
                    if (!runs(isa)) continue;
                    try {
                        const Weights weights(sample.packed(), isa);
                        check(isa < Isa::avx512 || weights.view().mask != nullptr,
                              std::string(format) + ": lists without room are refused");
                        product(weights, random_rows(192 * 3, 1), 3, 192);
                    } catch (const std::invalid_argument&) {
                        check(isa >= Isa::avx512, std::string(format) + ": others have room for every entry");
                    }
                }
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
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (kernel.isa != Isa::reference) continue;
        const Sample sample = matmul::make_sample({kernel.format, 20, 70, 32, false, 0.5, 7});
        const PackedArrays good = sample.packed();
        const std::string& name = kernel.format;
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
                if (!runs(isa)) continue;
                try {
                    const Weights weights(changed.packed(), isa);
                    product(weights, random_rows(70 * 5, 1), 5, 70);
                    product(weights, random_rows(70, 1), 1, 70);
                } catch (const std::invalid_argument&) {
                    continue;
                }
            }
        }
    }
}

void test_non_finite_rows() {
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (!runs(kernel.isa)) continue;
        const Sample sample = matmul::make_sample({kernel.format, 20, 130, 64, true, 0.5, 9});
        const Weights weights(sample.packed(), kernel.isa);
        std::vector<float> x = random_rows(3 * 130, 2);
        x[130 + 129] = std::numeric_limits<float>::quiet_NaN();
        x[2 * 130] = 1e-42f;
        const std::vector<float> y = product(weights, x, 3, 130);
        for (size_t i = 0; i < 20; ++i)
            check(std::isfinite(y[i]) && std::isnan(y[20 + i]) && std::isfinite(y[40 + i]), "NaN stays in its row");
    }
}

void test_pool() {
    for (const int num_threads : {1, 2, 5, 2}) {
        common::set_num_threads(num_threads);
        for (int round = 0; round < 2000; ++round) {
            const int num_chunks = round % 40;
            std::vector<int> runs_of_chunk(static_cast<size_t>(num_chunks), 0);
            common::parallel_for(num_chunks, [&](int chunk) { ++runs_of_chunk[static_cast<size_t>(chunk)]; });
            check(runs_of_chunk == std::vector<int>(static_cast<size_t>(num_chunks), 1), "every chunk runs once");
            if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the workers sleep
        }
    }
    std::vector<std::thread> callers;
    std::atomic<int> total{0};
    for (int i = 0; i < 3; ++i) {
        callers.emplace_back([&] {
            for (int round = 0; round < 500; ++round) common::parallel_for(7, [&](int) { ++total; });
        });
    }
    for (std::thread& caller : callers) caller.join();
    check(total == 3 * 500 * 7, "callers that meet each other");
    total = 0;
    common::parallel_for(5, [&](int) { common::parallel_for(6, [&](int) { ++total; }); });
    check(total == 5 * 6, "a job within a job");
    for (int round = 0; round < 100; ++round) {
        total = 0;
        std::string caught;
        try {
            common::parallel_for(20, [&](int chunk) {
                ++total;
                if (chunk % 7 == 3) throw std::runtime_error("chunk");
            });
        } catch (const std::runtime_error& error) {
            caught = error.what();
        }
        check(caught == "chunk" && total == 20, "the others run when chunks throw, and the caller learns of it");
    }
    total = 0;
    common::parallel_for(20, [&](int) { ++total; });
    check(total == 20, "a job after one that threw");
    check(common::measure_fork_join() > 0, "fork and join take time");
}

// Rows of taps are the same rows as those written out, to the last bit, over more than one piece of them.
void test_taps() {
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (!runs(kernel.isa)) continue;
        constexpr int64_t kChannels = 128, kPixels = 1500, kRows = 1400;
        const std::vector<int64_t> offsets = {0, 1, 40, 99};
        const auto num_inputs = kChannels * static_cast<int64_t>(offsets.size());
        const Sample sample = matmul::make_sample({kernel.format, 20, num_inputs, 64, false, 0.5, 3});
        const Weights weights(sample.packed(), kernel.isa);
        if (!weights.is_integer()) continue;
        const std::vector<float> pixels = random_rows(kPixels * kChannels, 5);
        std::vector<int64_t> starts;
        std::vector<float> x;
        for (int64_t row = 0; row < kRows; ++row) {
            starts.push_back((row * 7) % (kPixels - 99));
            for (const int64_t offset : offsets) {
                const auto from = pixels.begin() + (starts.back() + offset) * kChannels;
                x.insert(x.end(), from, from + kChannels);
            }
        }
        std::vector<float> y(static_cast<size_t>(kRows * 20 + 1), 12345.0f);
        const matmul::TapRows taps{starts.data(), kRows, offsets.data(), static_cast<int64_t>(offsets.size())};
        matmul::multiply_taps(pixels.data(), kPixels, kChannels, taps, {{&weights, y.data()}});
        check(y.back() == 12345.0f, "nothing is written behind the outputs of taps");
        y.pop_back();
        check(y == product(weights, x, kRows, num_inputs), kernel.format + " taps on " + matmul::name(kernel.isa));
    }
}

}  // namespace

int main() {
    test_pool();
    test_products();
    test_pieces_of_one_row();
    test_patterns();
    test_masks_of_many_rows();
    test_float_masks_of_many_rows();
    test_groups_that_keep_too_many();
    test_damaged_arrays();
    test_non_finite_rows();
    test_taps();
    std::printf("%d checks, %d failures, on", num_checks, num_failures);
    for (const Isa isa : matmul::kIsas)
        if (runs(isa)) std::printf(" %s", matmul::name(isa));
    std::printf("\n");
    return num_failures == 0 ? 0 : 1;
}
