// Random packed weights for the test and the benchmark programs: the disk form of rarefy.layouts, made from a seed.
// Every encoding has a maker, samples::<encoding>.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "matmul/packing.h"

namespace rarefy::matmul {

struct SampleSpec {
    std::string format;
    int64_t num_outputs, num_inputs;
    int64_t group_size;  // integers: columns per scale, 0: one scale per row
    bool symmetric;
    double density;  // probability that an entry is kept, where the format has zeros
    unsigned seed;
    int keep = 0, group = 64;                // of N:M; keep 0: what the density says
    int block_rows = 0, block_columns = 64;  // of blocks; 0 rows: any
    bool uneven = false;                     // other masks: each 64 columns are of another kind, see kept_of_uneven
    bool is_nm() const { return format.rfind("nm-", 0) == 0; }
    int num_kept() const { return keep > 0 ? keep : std::max(1, static_cast<int>(density * group + 0.5)); }
};

struct SampleArray {
    std::string name;
    Element element;
    std::vector<uint8_t> bytes;
};

struct Sample {
    std::string format;
    int64_t num_outputs, num_inputs;
    std::vector<SampleArray> arrays;
    std::vector<NamedInteger> integers;
    // The same weight, decoded while it was made: floats, or code - zero point with its scale.
    std::vector<float> floats;
    std::vector<int> levels;
    std::vector<float> level_scales;

    explicit Sample(const SampleSpec& spec)
        : format(spec.format), num_outputs(spec.num_outputs), num_inputs(spec.num_inputs) {}
    PackedArrays packed() const {
        static const uint8_t nothing = 0;  // empty vectors have no memory
        PackedArrays packed{format, num_outputs, num_inputs, {}, integers};
        for (const SampleArray& array : arrays)
            packed.arrays.push_back({array.name, array.element, array.bytes.empty() ? &nothing : array.bytes.data(),
                                     static_cast<int64_t>(array.bytes.size())});
        return packed;
    }
};

inline float bf16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}

// The nearest bfloat16, half to even: 8 bits of a number.
inline float rounded_to_bf16(float value) {
    int exponent;
    const double mantissa = std::frexp(static_cast<double>(value), &exponent);
    return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8));
}

// Random numbers for samples, and the parts that several encodings have.
struct SampleMaker {
    std::mt19937 random;
    explicit SampleMaker(unsigned seed) : random(seed) {}

    bool chance(double probability) { return random() < probability * 4294967296.0; }
    int below(int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); }
    // Numbers of usual sizes whose sums cancel.
    uint16_t bf16() { return static_cast<uint16_t>((random() & 0x80ff) | (0x3e00 + (random() & 0x100))); }

    static void append(std::vector<uint8_t>& bytes, const void* from, size_t size) {
        bytes.insert(bytes.end(), static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + size);
    }

    // How probable it is that an entry is kept, in a mask whose blocks have nothing, everything, one full row of 16,
    // other numbers in every row, one entry of a row, or so many as the density says.
    static double kept_of_uneven(const SampleSpec& spec, int64_t row, int64_t column) {
        switch (column / 64 % 6) {
            case 0: return 0;
            case 1: return 1;
            case 2: return row % 16 == 5 ? 1 : 0;
            case 3: return static_cast<double>(row % 16) / 40;
            case 4: return column % 64 == row % 64 ? 1 : 0;
            default: return spec.density;
        }
    }

    // 1 where an entry is kept, row by row; adds the array `mask`.
    std::vector<uint8_t> add_mask(Sample& sample, const SampleSpec& spec) {
        const int64_t row_bytes = (sample.num_inputs + 7) / 8;
        std::vector<uint8_t> kept, bytes(static_cast<size_t>(sample.num_outputs * row_bytes), 0);
        int64_t left = 0;  // entries that the group of N:M still keeps
        if (spec.is_nm()) {
            sample.integers.push_back({"keep", spec.num_kept()});
            sample.integers.push_back({"group", spec.group});
        }
        for (int64_t row = 0; row < sample.num_outputs; ++row) {
            for (int64_t column = 0; column < sample.num_inputs; ++column) {
                if (spec.is_nm()) {
                    const int64_t begin = column / spec.group * spec.group;
                    const int64_t size = std::min<int64_t>(spec.group, sample.num_inputs - begin);
                    if (column == begin) left = (spec.num_kept() * size + spec.group - 1) / spec.group;
                    kept.push_back(below(static_cast<int>(begin + size - column)) < left);
                    left -= kept.back();
                } else {
                    kept.push_back(chance(spec.uneven ? kept_of_uneven(spec, row, column) : spec.density));
                }
                bytes[static_cast<size_t>(row * row_bytes + column / 8)] |=
                    static_cast<uint8_t>(kept.back() << column % 8);
            }
        }
        sample.arrays.push_back({"mask", Element::u8, bytes});
        return kept;
    }

    // Zero point of every entry, row by row; adds `scales`, `zero_points` and group_size, and fills level_scales.
    std::vector<int> add_grid(Sample& sample, const SampleSpec& spec, int num_bits) {
        const int64_t width = spec.group_size == 0 ? sample.num_inputs : spec.group_size;
        std::vector<int> zero_points;
        SampleArray scale_array{"scales", Element::u16, {}}, zero_point_array{"zero_points", Element::u8, {}};
        for (int64_t row = 0; row < sample.num_outputs; ++row) {
            for (int64_t begin = 0; begin < sample.num_inputs || (begin == 0 && spec.group_size == 0); begin += width) {
                const uint16_t scale = bf16() & 0x7fff;
                const int zero_point = spec.symmetric ? 1 << (num_bits - 1) : below(1 << num_bits);
                append(scale_array.bytes, &scale, 2);
                zero_point_array.bytes.push_back(static_cast<uint8_t>(zero_point));
                for (int64_t i = begin; i < begin + width && i < sample.num_inputs; ++i) {
                    sample.level_scales.push_back(bf16_value(scale));
                    zero_points.push_back(zero_point);
                }
                if (width == 0) break;
            }
        }
        sample.arrays.push_back(scale_array);
        if (!spec.symmetric) sample.arrays.push_back(zero_point_array);
        sample.integers.push_back({"group_size", spec.group_size});
        return zero_points;
    }
};

// `values`: f32, or u16 for bfloat16.
inline Sample make_float_sample(const SampleSpec& spec, Element element, bool masked) {
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    std::vector<uint8_t> kept(static_cast<size_t>(spec.num_outputs * spec.num_inputs), 1);
    if (masked) kept = maker.add_mask(sample, spec);
    SampleArray values{"values", element, {}};
    for (const uint8_t is_kept : kept) {
        const uint16_t bits = maker.bf16();
        const float value = is_kept ? bf16_value(bits) : 0.0f;
        sample.floats.push_back(value);
        if (is_kept && element == Element::f32) SampleMaker::append(values.bytes, &value, 4);
        if (is_kept && element == Element::u16) SampleMaker::append(values.bytes, &bits, 2);
    }
    sample.arrays.push_back(values);
    return sample;
}

// `codes` of 2, 3, 4 or 8 bits: runs of bits, the least significant first. Dense rows start at a byte.
inline Sample make_code_sample(const SampleSpec& spec, int num_bits, bool masked) {
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    std::vector<uint8_t> kept(static_cast<size_t>(spec.num_outputs * spec.num_inputs), 1);
    if (masked) kept = maker.add_mask(sample, spec);
    const std::vector<int> zero_points = maker.add_grid(sample, spec, num_bits);
    SampleArray codes{"codes", Element::u8, {}};
    int num_bits_used = 0;  // of the last byte
    for (size_t i = 0; i < kept.size(); ++i) {
        if (!masked && i % static_cast<size_t>(spec.num_inputs) == 0) num_bits_used = 0;
        const int code = maker.below(1 << num_bits);
        sample.levels.push_back(kept[i] ? code - zero_points[i] : 0);
        for (int bit = 0; kept[i] && bit < num_bits; ++bit) {
            if (num_bits_used == 0) codes.bytes.push_back(0);
            codes.bytes.back() |= static_cast<uint8_t>((code >> bit & 1) << num_bits_used);
            num_bits_used = (num_bits_used + 1) % 8;
        }
    }
    sample.arrays.push_back(codes);
    return sample;
}

namespace samples {
#define RAREFY_ENCODING(name, ...) Sample name(const SampleSpec& spec);
#include "matmul/kernels.inc"
}  // namespace samples

// A sample in any format of the list.
inline Sample make_sample(const SampleSpec& spec) {
    struct Row {
        std::vector<std::string> formats;
        Sample (*make)(const SampleSpec&);
    };
    const Row rows[] = {
#define RAREFY_ENCODING(name, values, isas, ...) {{__VA_ARGS__}, samples::name},
#include "matmul/kernels.inc"
    };
    for (const Row& row : rows)
        for (const std::string& format : row.formats)
            if (format == spec.format) return row.make(spec);
    throw std::invalid_argument("no sample of " + spec.format);
}

}  // namespace rarefy::matmul
