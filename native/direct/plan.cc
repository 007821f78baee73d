#include "direct/plan.h"

#include <algorithm>
#include <cstring>

namespace rarefy::direct {
namespace {

constexpr int64_t kLine = 16;  // floats

void clear(float* to, int64_t count) { std::memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

}  // namespace

Strip Strips::strip(int64_t number) const {
    Strip strip{};
    std::copy_n(shape_.out, kAxes, strip.end);
    strip.begin[axis_] = number * length_;
    strip.end[axis_] = std::min(shape_.out[axis_], strip.begin[axis_] + length_);
    return strip;
}

PlanarPlan::PlanarPlan(const Shape& shape, int axis, int64_t length) {
    // Of every tap along each axis, the place of its residue in phases_, and the steps behind it.
    std::vector<int64_t> slots[kAxes], steps[kAxes];
    for (int a = 0; a < kAxes; ++a) {
        for (int64_t tap = 0; tap < shape.kernel[a]; ++tap) {
            const int64_t place = tap * shape.dilation[a], phase = place % shape.stride[a];
            const auto found = std::find(phases_[a].begin(), phases_[a].end(), phase);
            slots[a].push_back(found - phases_[a].begin());
            steps[a].push_back(place / shape.stride[a]);
            if (found == phases_[a].end()) phases_[a].push_back(phase);
        }
        lengths_[a] = ceil_div(reach(shape, a, a == axis ? length : shape.out[a]), shape.stride[a]);
    }
    row_step = ceil_div(lengths_[2], kLine) * kLine;
    slice_step = lengths_[1] * row_step;
    const int64_t block = lengths_[0] * slice_step;
    const auto count = [&](int a) { return static_cast<int64_t>(phases_[a].size()); };
    channel_floats = count(0) * count(1) * count(2) * block;
    num_floats = shape.group_channels * channel_floats;
    for (int64_t tap = 0; tap < shape.kernel[2]; ++tap) columns.push_back(slots[2][tap] * block + steps[2][tap]);

    // Rows of taps that the same phase holds one after the other make a band.
    std::vector<std::vector<int64_t>> groups;
    for (int64_t slot = 0; slot < count(1); ++slot) {
        int64_t next = -1;
        for (int64_t tap = 0; tap < shape.kernel[1]; ++tap) {
            if (slots[1][tap] != slot) continue;
            if (steps[1][tap] != next) groups.emplace_back();
            groups.back().push_back(tap);
            next = steps[1][tap] + 1;
        }
    }
    for (int64_t channel = 0; channel < shape.group_channels; ++channel) {
        for (int64_t slice = 0; slice < shape.kernel[0]; ++slice) {
            for (const std::vector<int64_t>& rows : groups) {
                const int64_t first = rows[0];
                const int64_t base = channel * channel_floats + slots[0][slice] * count(1) * count(2) * block +
                                     steps[0][slice] * slice_step + slots[1][first] * count(2) * block +
                                     steps[1][first] * row_step;
                bands.push_back({base, static_cast<int64_t>(rows.size()), static_cast<int64_t>(terms.size())});
                for (const int64_t row : rows)
                    for (int64_t column = 0; column < shape.kernel[2]; ++column)
                        terms.push_back(((slice * shape.kernel[1] + row) * shape.kernel[2] + column) *
                                            shape.group_channels +
                                        channel);
            }
        }
    }
}

void PlanarPlan::fill_row(const Kernels& kernels, const Shape& shape, int64_t start, bool is_clear, const float* x,
                          float* to) const {
    const Inside inside(start, shape.stride[2], lengths_[2], shape.size[2]);
    if (!is_clear) clear(to, inside.begin);
    if (inside.end > inside.begin)
        kernels.gather(x + start + inside.begin * shape.stride[2], shape.stride[2], inside.end - inside.begin,
                       to + inside.begin);
    if (!is_clear) clear(to + inside.end, lengths_[2] - inside.end);
}

void PlanarPlan::fill(const Kernels& kernels, const Shape& shape, const Strip& strip, bool is_clear, const float* x,
                      float* buffer) const {
    int64_t starts[kAxes];
    for (int a = 0; a < kAxes; ++a) starts[a] = strip.begin[a] * shape.stride[a] - shape.before[a];
    for (int64_t channel = 0; channel < shape.group_channels; ++channel, x += shape.image_size()) {
        float* to = buffer + channel * channel_floats;
        for (const int64_t phase0 : phases_[0]) {
            for (const int64_t phase1 : phases_[1]) {
                for (const int64_t phase2 : phases_[2]) {
                    for (int64_t i = 0; i < lengths_[0]; ++i) {
                        const int64_t slice = starts[0] + phase0 + i * shape.stride[0];
                        for (int64_t j = 0; j < lengths_[1]; ++j, to += row_step) {
                            const int64_t row = starts[1] + phase1 + j * shape.stride[1];
                            if (slice < 0 || slice >= shape.size[0] || row < 0 || row >= shape.size[1]) {
                                if (!is_clear) clear(to, lengths_[2]);
                            } else {
                                fill_row(kernels, shape, starts[2] + phase2, is_clear,
                                         x + (slice * shape.size[1] + row) * shape.size[2], to);
                            }
                        }
                    }
                }
            }
        }
    }
}

PixelPlan::PixelPlan(const Shape& shape, int axis, int64_t length) {
    for (int a = 0; a < kAxes; ++a) lengths_[a] = reach(shape, a, a == axis ? length : shape.out[a]);
    pixel_step = shape.group_channels * kPanel;
    row_step = lengths_[2] * pixel_step;
    slice_step = lengths_[1] * row_step;
    num_floats = lengths_[0] * slice_step;
    for (int64_t channel = 0; channel < shape.group_channels; ++channel) {
        for (int64_t i = 0; i < shape.kernel[0]; ++i) {
            for (int64_t j = 0; j < shape.kernel[1]; ++j) {
                for (int64_t k = 0; k < shape.kernel[2]; ++k) {
                    taps.push_back(i * shape.dilation[0] * slice_step + j * shape.dilation[1] * row_step +
                                   k * shape.dilation[2] * pixel_step + channel * kPanel);
                    terms.push_back(((i * shape.kernel[1] + j) * shape.kernel[2] + k) * shape.group_channels + channel);
                }
            }
        }
    }
}

void PixelPlan::fill(const Kernels& kernels, const Shape& shape, const Strip& strip, bool is_clear,
                     const Spread& spread, const float* x, int64_t step, float* buffer) const {
    int64_t starts[kAxes];
    for (int a = 0; a < kAxes; ++a) starts[a] = strip.begin[a] * shape.stride[a] - shape.before[a];
    const Inside inside(starts[2], 1, lengths_[2], shape.size[2]);
    float* to = buffer;
    for (int64_t i = 0; i < lengths_[0]; ++i) {
        const int64_t slice = starts[0] + i;
        for (int64_t j = 0; j < lengths_[1]; ++j, to += row_step) {
            const int64_t row = starts[1] + j;
            if (slice < 0 || slice >= shape.size[0] || row < 0 || row >= shape.size[1]) {
                if (!is_clear) clear(to, row_step);
                continue;
            }
            if (!is_clear) clear(to, inside.begin * pixel_step);
            if (inside.end > inside.begin)
                kernels.gather_pixels(
                    x + ((slice * shape.size[1] + row) * shape.size[2] + starts[2] + inside.begin) * step, step, spread,
                    inside.end - inside.begin, to + inside.begin * pixel_step);
            if (!is_clear) clear(to + inside.end * pixel_step, (lengths_[2] - inside.end) * pixel_step);
        }
    }
}

}  // namespace rarefy::direct
