// The kernels of N:M and of masks where their patterns matter: lists of entries, many rows, groups that keep too many;
// against the reference, which matmul_test checks. Made to run under sanitizers; prints the failures and counts.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/pool.h"
#include "matmul/checks.h"

namespace {

using namespace rarefy;
using checks::check;
using checks::described;
using checks::packed_for;
using checks::product;
using checks::random_floats;
using checks::TestedFormat;
using matmul::Isa;
using matmul::MaskedCodes;
using matmul::Sample;
using matmul::SampleSpec;
using matmul::Weights;

// Every arrangement of N:M, against the reference, whose N:M is a mask.
void test_patterns() {
    constexpr struct {
        int keep, group;
    } kPatterns[] = {{1, 64},  {3, 64},  {4, 64},  {7, 64}, {8, 64}, {9, 64},  {16, 64}, {17, 64}, {32, 64},
                     {33, 64}, {63, 64}, {64, 64}, {4, 32}, {8, 32}, {11, 32}, {2, 16},  {5, 16},  {6, 16},
                     {1, 8},   {2, 8},   {3, 8},   {4, 8},  {1, 4},  {2, 4},   {1, 2},   {1, 1},   {5, 12}};
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric;
    } kCases[] = {{1, 7, 0, true},     {17, 61, 32, false}, {16, 64, 64, false},  {33, 65, 128, true},
                  {31, 127, 0, false}, {18, 131, 32, true}, {50, 640, 64, false}, {130, 1091, 128, true}};
    for (const TestedFormat& tested : checks::tested_formats()) {
        const bool floats = tested.format == "nm-bf16-v1";  // compared with those that share their multiply-adds
        if (tested.format.rfind("nm-int", 0) != 0 && !floats) continue;
        const Isa other = floats ? Isa::avx2 : Isa::reference;
        std::vector<Isa> isas;
        for (const Isa isa : tested.isas)
            if (floats ? isa == Isa::avx512 || isa == Isa::avx512_bf16 : isa != Isa::reference) isas.push_back(isa);
        if (isas.empty()) continue;
        for (const auto& pattern : kPatterns) {
            for (const auto& c : kCases) {
                const Sample sample = matmul::make_sample({tested.format, c.outputs, c.inputs, c.group_size,
                                                           c.symmetric, 0.5, 13, pattern.keep, pattern.group});
                const Weights reference(sample.packed(), other, MaskedCodes::singles);
                const auto of_isas = packed_for(isas, sample);
                for (const int64_t num_rows : {1, 2, 5, 7, 17, 30}) {
                    const std::vector<float> x = random_floats(num_rows * c.inputs, 5);
                    common::set_num_threads(static_cast<int>(num_rows % 3 + 1));
                    const std::vector<float> expected = product(reference, x, num_rows, c.inputs);
                    for (const auto& weights : of_isas)
                        check(product(*weights, x, num_rows, c.inputs) == expected,
                              std::to_string(pattern.keep) + " of " + std::to_string(pattern.group) + ", " +
                                  described(tested.format, weights->isa(), c.outputs, c.inputs, num_rows));
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
    for (const TestedFormat& tested : checks::tested_formats()) {
        if (tested.format.rfind("bitmask-int", 0) != 0 || tested.isas.size() == 1) continue;
        const std::vector<Isa> isas(tested.isas.begin() + 1, tested.isas.end());
        for (const auto& c : kCases) {
            SampleSpec spec{tested.format, c.outputs, c.inputs, c.group_size, c.symmetric, c.density, 19};
            spec.uneven = c.uneven;
            const Sample sample = matmul::make_sample(spec);
            const Weights reference(sample.packed(), Isa::reference, MaskedCodes::singles);
            const auto of_isas = packed_for(isas, sample);
            for (const int64_t num_rows : {16, 25, 61, 128, 131}) {
                std::vector<float> x = random_floats(num_rows * c.inputs, 23);
                x[static_cast<size_t>(3 * c.inputs)] = std::numeric_limits<float>::quiet_NaN();
                common::set_num_threads(static_cast<int>(num_rows % 3 + 1));
                const std::vector<float> expected = product(reference, x, num_rows, c.inputs);
                for (const auto& weights : of_isas) {
                    const std::vector<float> y = product(*weights, x, num_rows, c.inputs);
                    bool same = true;
                    for (size_t i = 0; i < y.size(); ++i)
                        same =
                            same && (static_cast<int64_t>(i) / c.outputs == 3 ? std::isnan(y[i]) : y[i] == expected[i]);
                    check(same, described(tested.format, weights->isa(), c.outputs, c.inputs, num_rows));
                }
            }
        }
    }
}

// Masks over bfloat16 with so many rows that zeros are left out, against the same rows one by one, which meet them;
// also where a row holds a NaN and another one an infinity.
void test_float_masks_of_many_rows() {
    constexpr int64_t kMostRows = 131;
    constexpr struct {
        int64_t outputs, inputs;
        double density;
    } kCases[] = {{16, 64, 0.2}, {37, 805, 0.5}, {50, 640, 0.1}, {21, 191, 0.0}, {18, 400, 0.4}};
    for (const TestedFormat& tested : checks::tested_formats()) {
        if (tested.format != "bitmask-bf16-v1" && tested.format != "nm-bf16-v1") continue;
        std::vector<Isa> isas;
        for (const Isa isa : tested.isas)
            if (isa != Isa::amx) isas.push_back(isa);
        for (const auto& c : kCases) {
            const Sample sample = matmul::make_sample({tested.format, c.outputs, c.inputs, 0, true, c.density, 29});
            const auto of_isas = packed_for(isas, sample);
            for (const bool finite : {true, false}) {
                std::vector<float> most = random_floats(kMostRows * c.inputs, 31);
                if (!finite) {
                    most[static_cast<size_t>(3 * c.inputs)] = std::numeric_limits<float>::quiet_NaN();
                    most[static_cast<size_t>(5 * c.inputs + 7)] = std::numeric_limits<float>::infinity();
                }
                for (const auto& weights : of_isas) {
                    std::vector<float> alone;
                    for (int64_t row = 0; row < kMostRows; ++row) {
                        const std::vector<float> one(most.begin() + row * c.inputs,
                                                     most.begin() + (row + 1) * c.inputs);
                        const std::vector<float> y = product(*weights, one, 1, c.inputs);
                        alone.insert(alone.end(), y.begin(), y.end());
                    }
                    for (const int64_t num_rows : {int64_t{31}, int64_t{64}, int64_t{96}, kMostRows}) {
                        const std::vector<float> x(most.begin(), most.begin() + num_rows * c.inputs);
                        common::set_num_threads(static_cast<int>(num_rows % 3 + 1));
                        const std::vector<float> y = product(*weights, x, num_rows, c.inputs);
                        bool same = true;
                        for (size_t i = 0; i < y.size(); ++i)
                            same = same && (std::isnan(alone[i]) ? std::isnan(y[i]) : y[i] == alone[i]);
                        check(same, described(tested.format, weights->isa(), c.outputs, c.inputs, num_rows));
                    }
                }
            }
        }
    }
}

// Where a segment begins depends on what those before it keep. Rows that are 127 in one column and 0 in the others show
// each element by itself, exactly: the largest code of an activation, whose scale is 1.
void test_segments_of_masks() {
    constexpr struct {
        int64_t outputs, inputs;
    } kShapes[] = {{1, 1}, {17, 31}, {16, 64}, {33, 97}, {18, 460}};
    for (const TestedFormat& tested : checks::tested_formats()) {
        if (tested.format.rfind("bitmask-", 0) != 0) continue;
        for (const auto& shape : kShapes) {
            const auto num_columns = static_cast<size_t>(shape.inputs);
            const auto num_outputs = static_cast<size_t>(shape.outputs);
            std::vector<float> x(num_columns * num_columns, 0.0f);
            for (size_t column = 0; column < num_columns; ++column) x[column * num_columns + column] = 127.0f;
            for (const int group_size : {0, 32, 64, 96, 128}) {
                for (const double density : {-1.0, 0.0, 0.5, 1.0}) {  // -1: of another kind in each block
                    SampleSpec spec{
                        tested.format, shape.outputs, shape.inputs, group_size, group_size != 64, density, 19};
                    spec.uneven = density < 0;
                    const Sample sample = matmul::make_sample(spec);
                    for (const auto& weights : packed_for(tested.isas, sample)) {
                        for (const size_t most_rows : {size_t{1}, size_t{3}, size_t{13}, num_columns}) {
                            bool same = true;
                            for (size_t first = 0; first < num_columns; first += most_rows) {
                                const size_t last = std::min(first + most_rows, num_columns);
                                const std::vector<float> rows(x.data() + first * num_columns,
                                                              x.data() + last * num_columns);
                                const std::vector<float> y =
                                    product(*weights, rows, static_cast<int64_t>(last - first), shape.inputs);
                                for (size_t i = 0; i < y.size(); ++i) {
                                    const size_t at = i % num_outputs * num_columns + first + i / num_outputs;
                                    const float value = weights->is_integer() ? static_cast<float>(sample.levels[at]) *
                                                                                    sample.level_scales[at]
                                                                              : sample.floats[at];
                                    same = same && y[i] == 127.0f * value;
                                }
                            }
                            check(same, "each element under a mask, " + described(tested.format, weights->isa(),
                                                                                  shape.outputs, shape.inputs,
                                                                                  static_cast<int64_t>(most_rows)));
                        }
                    }
                }
            }
        }
    }
}

// Which arrangement of codes under a mask is taken: what each takes, counted from the mask bit by bit, and the rule.
void test_arrangements_of_masks() {
    const auto rule = [](int64_t singles, int64_t pairs, int64_t all, bool half_width) {  // bytes for 64 weights
        return matmul::fastest_masked_codes(64 * 1024, {singles * 1024, pairs * 1024, all * 1024}, half_width);
    };
    check(rule(24, 28, 32, true) == MaskedCodes::pairs, "half zeros, units of half the width");
    check(rule(24, 28, 32, false) == MaskedCodes::singles, "half zeros, units of full width");
    check(rule(30, 31, 32, true) == MaskedCodes::pairs, "pairs while they take less than all codes");
    check(rule(30, 32, 32, true) == MaskedCodes::all, "as many bytes and less arithmetic");
    check(rule(30, 32, 32, false) == MaskedCodes::singles, "bytes decide where arithmetic is hidden");
    check(rule(32, 34, 32, false) == MaskedCodes::all, "as many bytes for all codes as for singles");
    check(rule(18, 21, 32, false) == MaskedCodes::pairs, "more bytes are free where arithmetic takes longer");
    check(rule(18, 22, 32, false) == MaskedCodes::singles, "but not all of them");
    check(rule(12, 11, 32, false) == MaskedCodes::pairs, "fewer bytes");
    for (const bool half_width : {false, true}) {
        check(rule(24, 28, 24, half_width) == MaskedCodes::all, "half zeros, 3 bits");
        check(rule(24, 28, 16, half_width) == MaskedCodes::all, "half zeros, 2 bits");
        check(rule(14, 16, 24, half_width) == MaskedCodes::pairs, "80 % zeros, 3 bits");
        check(rule(11, 9, 16, half_width) == MaskedCodes::pairs, "nine tenths zeros, 2 bits");
    }
    check(rule(13, 14, 16, true) == MaskedCodes::all, "few bytes of pairs do not hide their arithmetic");
    check(rule(13, 14, 16, false) == MaskedCodes::pairs, "but do in units of full width");
    for (const int num_bits : {4, 3, 2}) {
        const std::string format = "bitmask-int" + std::to_string(num_bits) + "-v1";
        for (const int group_size : {0, 32, 64}) {
            for (const double density : {0.0, 0.1, 0.3, 0.5, 0.6, 0.9}) {
                constexpr int64_t kOutputs = 46, kInputs = 570, kBlocks = 9, kRowBytes = 72;
                const Sample sample = matmul::make_sample({format, kOutputs, kInputs, group_size, false, density, 19});
                const auto kept = [&](int64_t row, int64_t column) {
                    if (row >= kOutputs || column >= kInputs) return 0;
                    return sample.arrays[0].bytes[static_cast<size_t>(row * kRowBytes + column / 8)] >> column % 8 & 1;
                };
                const int64_t width = group_size == 32 ? 32 : 64;
                int64_t singles = 0, pairs = 0;
                for (int64_t panel = 0; panel < 3; ++panel) {
                    int64_t panel_singles = 0, panel_pairs = 0;
                    for (int64_t begin = 0; begin < 64 * kBlocks; begin += width) {
                        int64_t even = 0, odd = 0;
                        for (int64_t row = 16 * panel; row < 16 * panel + 16; ++row) {
                            for (int64_t column = begin; column < begin + width; ++column) {
                                (column % 8 < 4 ? even : odd) += kept(row, column);
                                if (column % 8 < 4) panel_pairs += kept(row, column) | kept(row, column + 4);
                            }
                        }
                        panel_singles += 2 * width + std::max(even, odd);
                        panel_pairs += width;
                    }
                    for (int64_t* const bytes : {&panel_singles, &panel_pairs}) *bytes = (*bytes + 63) / 64 * 64;
                    singles += panel_singles;
                    pairs += panel_pairs;
                }
                // Dense codes of fewer bits than 4 have scales and zero points in front of their groups.
                const int64_t group_bytes =
                    num_bits == 4 ? 0 : 48 * (group_size == 0 ? 1 : (kInputs + width - 1) / width);
                const int64_t all = 3 * ((kBlocks * 128 * num_bits + group_bytes + 63) / 64 * 64);
                for (const Isa isa : {Isa::avx512, Isa::amx}) {
                    if (!checks::runs(isa)) continue;
                    const auto bytes = [&](MaskedCodes masked) {
                        return Weights(sample.packed(), isa, masked).view().value_offsets[3];
                    };
                    check(bytes(MaskedCodes::singles) == singles, "bytes of singles");
                    check(bytes(MaskedCodes::pairs) == pairs, "bytes of pairs");
                    check(bytes(MaskedCodes::all) == all, "bytes of all codes");
                    const int64_t taken = bytes(MaskedCodes::fastest);
                    check(taken == singles || taken == pairs || taken == all, "one of the three");
                    check(density != 0.9 || taken == all, "few zeros: all codes");
                    check(density < (num_bits == 4 ? 0.9 : 0.5) || taken == all, "half zeros: all codes of fewer bits");
                    check(density > (num_bits == 2 ? 0.0 : 0.1) || taken == pairs, "many zeros: pairs");
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
                    if (!checks::runs(isa)) continue;
                    try {
                        const Weights weights(sample.packed(), isa);
                        check(isa < Isa::avx512 || weights.view().parameter <= 0,
                              std::string(format) + ": lists without room are refused");
                        product(weights, random_floats(192 * 3, 1), 3, 192);
                    } catch (const std::invalid_argument&) {
                        check(isa >= Isa::avx512, std::string(format) + ": others have room for every entry");
                    }
                }
            }
        }
    }
}

}  // namespace

int main() {
    test_patterns();
    test_masks_of_many_rows();
    test_float_masks_of_many_rows();
    test_segments_of_masks();
    test_arrangements_of_masks();
    test_groups_that_keep_too_many();
    return checks::summary_of_isas();
}
