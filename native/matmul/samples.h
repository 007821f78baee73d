// Random packed weights for the test and the benchmark programs: the disk form of rarefy.layouts, made from a seed.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "matmul/weights.h"

namespace rarefy::matmul {

struct Sample {
    std::string format;
    int64_t num_outputs, num_inputs, group_size;
    std::vector<uint8_t> values, mask, scales, zero_points;
    // The same weight, decoded while it was made: floats, or code - zero point with its scale.
    std::vector<float> floats;
    std::vector<int> levels;
    std::vector<float> level_scales;

    bool is_integer() const { return format.find("int") != std::string::npos; }
    PackedArrays arrays() const {
        static const uint8_t nothing = 0;  // empty vectors have no memory
        const auto data = [](const std::vector<uint8_t>& bytes) { return bytes.empty() ? &nothing : bytes.data(); };
        const auto size = [](const std::vector<uint8_t>& bytes) { return static_cast<int64_t>(bytes.size()); };
        const bool masked = format.rfind("dense", 0) != 0;
        return {format,
                num_outputs,
                num_inputs,
                group_size,
                data(values),
                size(values),
                masked ? data(mask) : nullptr,
                size(mask),
                is_integer() ? data(scales) : nullptr,
                size(scales),
                zero_points.empty() ? nullptr : zero_points.data(),
                size(zero_points)};
    }
};

inline float bf16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, 4);
    return value;
}

// `density`: probability that an entry is kept, where the format has a mask.
inline Sample make_sample(const std::string& format, int64_t num_outputs, int64_t num_inputs, int64_t group_size,
                          bool symmetric, double density, unsigned seed) {
    Sample sample;
    sample.format = format;
    sample.num_outputs = num_outputs;
    sample.num_inputs = num_inputs;
    sample.group_size = sample.is_integer() ? group_size : 0;
    std::mt19937 random(seed);
    const bool masked = format.rfind("dense", 0) != 0;
    const bool f32 = format.find("f32") != std::string::npos;
    const int num_codes = format.find("int4") != std::string::npos ? 16 : 256;
    const int64_t num_groups = sample.group_size == 0 ? 1 : (num_inputs + sample.group_size - 1) / sample.group_size;
    const int64_t mask_row = (num_inputs + 7) / 8;
    const auto bf16 = [&] { return static_cast<uint16_t>((random() & 0x80ff) | (0x3e00 + (random() & 0x100))); };
    const auto append = [](std::vector<uint8_t>& bytes, const void* from, size_t size) {
        bytes.insert(bytes.end(), static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + size);
    };
    if (masked) sample.mask.assign(static_cast<size_t>(num_outputs * mask_row), 0);
    std::vector<int> zero_points(static_cast<size_t>(num_groups));
    std::vector<float> scales(static_cast<size_t>(num_groups));
    int64_t num_nibbles = 0;
    for (int64_t row = 0; row < num_outputs; ++row) {
        for (int64_t group = 0; sample.is_integer() && group < num_groups; ++group) {
            const uint16_t scale = bf16() & 0x7fff;
            append(sample.scales, &scale, 2);
            scales[static_cast<size_t>(group)] = bf16_value(scale);
            int& zero_point = zero_points[static_cast<size_t>(group)];
            zero_point = symmetric ? num_codes / 2 : static_cast<int>(random() % static_cast<unsigned>(num_codes));
            if (!symmetric) sample.zero_points.push_back(static_cast<uint8_t>(zero_point));
        }
        for (int64_t column = 0; column < num_inputs; ++column) {
            const bool kept = !masked || random() < density * 4294967296.0;
            const auto group = static_cast<size_t>(sample.group_size == 0 ? 0 : column / sample.group_size);
            if (masked && kept)
                sample.mask[static_cast<size_t>(row * mask_row + column / 8)] |= static_cast<uint8_t>(1 << column % 8);
            if (!sample.is_integer()) {
                const uint16_t bits = bf16();
                const float value = kept ? bf16_value(bits) : 0.0f;
                sample.floats.push_back(value);
                if (kept && f32) append(sample.values, &value, 4);
                if (kept && !f32) append(sample.values, &bits, 2);
                continue;
            }
            const int code = static_cast<int>(random() % static_cast<unsigned>(num_codes));
            sample.levels.push_back(kept ? code - zero_points[group] : 0);
            sample.level_scales.push_back(scales[group]);
            if (!kept) continue;
            if (num_codes == 256) {
                sample.values.push_back(static_cast<uint8_t>(code));
            } else if (num_nibbles++ % 2 == 0) {
                sample.values.push_back(static_cast<uint8_t>(code));
            } else {
                sample.values.back() |= static_cast<uint8_t>(code << 4);
            }
        }
        if (!masked) num_nibbles = 0;  // dense rows start at a byte
    }
    return sample;
}

}  // namespace rarefy::matmul
