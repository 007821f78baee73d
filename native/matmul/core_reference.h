// What the plain C++ kernels of all encodings share: what the vector kernels must compute, and what runs on CPUs that
// have none. An encoding gives a `Stream`, made from (weights, panel), that decodes a panel block by block:
//   floats   void block(float* out): the next block, [column][output]
//   codes    void block(const uint8_t* pruned, uint8_t* out): the next block as codes, [column][output]. `pruned` holds
//            the zero points of the block's two halves, 2 x 16: the codes of what is not stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "matmul/kernels.h"

namespace rarefy::matmul::reference {

constexpr int kCodes = kBlockInputs * kPanelOutputs;

inline float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

template <class Stream>
void multiply_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    float values[kCodes];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream(w, panel);
        const int64_t left = w.num_outputs - panel * kPanelOutputs;
        const int num_outputs = static_cast<int>(left < kPanelOutputs ? left : kPanelOutputs);
        for (int64_t row = part.row_begin; row < part.row_end; ++row)
            for (int o = 0; o < num_outputs; ++o) part.y[row * part.y_stride + panel * kPanelOutputs + o] = 0.0f;
        for (int64_t block = 0; block < w.num_blocks; ++block) {
            stream.block(values);
            for (int64_t row = part.row_begin; row < part.row_end; ++row) {
                const float* x = rows.x + row * rows.stride + block * kBlockInputs;
                float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
                float sums[kPanelOutputs] = {};
                for (int i = 0; i < kBlockInputs; ++i) {
                    const int column = i ^ 1;  // the odd one of two comes first
                    for (int o = 0; o < kPanelOutputs; ++o) {
                        const double product =
                            static_cast<double>(x[column]) * static_cast<double>(values[column * kPanelOutputs + o]);
                        sums[o] = static_cast<float>(product + static_cast<double>(sums[o]));
                    }
                    if (w.scales == nullptr || i % (kBlockInputs / 2) != kBlockInputs / 2 - 1) continue;
                    const int64_t segment = (2 * block + i / (kBlockInputs / 2)) * 8 / w.steps_per_segment;
                    const uint16_t* scales = w.scales_at(w.group_place(panel, segment / w.segments_per_group));
                    for (int o = 0; o < num_outputs; ++o) y[o] = std::fma(sums[o], widen(scales[o]), y[o]);
                    std::fill(sums, sums + kPanelOutputs, 0.0f);
                }
                for (int o = 0; o < num_outputs; ++o) y[o] += sums[o];
            }
        }
    }
}

template <class Stream>
void multiply_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    uint8_t codes[kCodes];
    uint8_t zero_points[2 * kPanelOutputs];  // of each half of the block
    const int segments = 16 / w.steps_per_segment;
    const int columns = w.steps_per_segment * 4;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream(w, panel);
        const int64_t left = w.num_outputs - panel * kPanelOutputs;
        const int num_outputs = static_cast<int>(left < kPanelOutputs ? left : kPanelOutputs);
        for (int64_t row = part.row_begin; row < part.row_end; ++row)
            for (int o = 0; o < num_outputs; ++o) part.y[row * part.y_stride + panel * kPanelOutputs + o] = 0.0f;
        for (int64_t block = 0; block < w.num_blocks; ++block) {
            for (int half = 0; half < 2; ++half) {
                const int64_t segment = block * segments + (segments == 2 ? half : 0);
                const int64_t place = w.group_place(panel, segment / w.segments_per_group);
                for (int o = 0; o < kPanelOutputs; ++o)
                    zero_points[half * kPanelOutputs + o] =
                        w.zero_points == nullptr ? static_cast<uint8_t>(w.zero_point) : w.zero_points[place + o];
            }
            stream.block(zero_points, codes);
            for (int64_t row = part.row_begin; row < part.row_end; ++row) {
                const int8_t* q = rows.q + row * rows.stride + block * kBlockInputs;
                float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
                const float row_scale = rows.scales[row * rows.num_blocks + block];
                const int32_t* half_sums = rows.sums + (row * rows.num_blocks + block) * 2;
                for (int part_of_block = 0; part_of_block < segments; ++part_of_block) {
                    const int first = part_of_block * columns;
                    const int32_t sum = segments == 2 ? half_sums[part_of_block] : half_sums[0] + half_sums[1];
                    int32_t dots[kPanelOutputs] = {};
                    for (int column = first; column < first + columns; ++column)
                        for (int o = 0; o < kPanelOutputs; ++o)
                            dots[o] += q[column] * codes[column * kPanelOutputs + o];
                    const int64_t segment = block * segments + part_of_block;
                    const uint16_t* scales = w.scales_at(w.group_place(panel, segment / w.segments_per_group));
                    for (int o = 0; o < num_outputs; ++o) {
                        const int32_t level = dots[o] - zero_points[part_of_block * kPanelOutputs + o] * sum;
                        y[o] = std::fma(static_cast<float>(level), row_scale * widen(scales[o]), y[o]);
                    }
                }
            }
        }
        if (w.output_scales == nullptr) continue;
        for (int64_t row = part.row_begin; row < part.row_end; ++row) {
            float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
            for (int o = 0; o < num_outputs; ++o) y[o] *= widen(w.output_scales[panel * kPanelOutputs + o]);
        }
    }
}

}  // namespace rarefy::matmul::reference
