// Where the taps of a convolution fall in memory that holds a strip of its input, padded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "direct/direct.h"

namespace rarefy::direct {

// Every size is at least 1 but batch, which may be 0, and `before`, which may be any. What lies outside of the input is
// zeros.
struct Shape {
    int64_t batch, groups, group_channels, group_outputs;
    int64_t size[kAxes], kernel[kAxes], stride[kAxes], dilation[kAxes], before[kAxes], out[kAxes];

    int64_t num_channels() const { return groups * group_channels; }
    int64_t num_outputs() const { return groups * group_outputs; }
    int64_t num_inputs() const { return kernel[0] * kernel[1] * kernel[2] * group_channels; }
    int64_t image_size() const { return size[0] * size[1] * size[2]; }
    int64_t out_size() const { return out[0] * out[1] * out[2]; }
};

// Whether 16 outputs side by side are those of whole groups, and see at most as many channels.
inline bool takes_pixels(const Shape& shape) {
    return kPanel % shape.group_outputs == 0 && shape.group_channels <= shape.group_outputs;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of numbers start + i * step, i < count, those in [0, size).
struct Inside {
    int64_t begin, end;
    Inside(int64_t start, int64_t step, int64_t count, int64_t size)
        : begin(std::min(count, start >= 0 ? 0 : ceil_div(-start, step))),
          end(std::max(begin, std::min(count, start >= size ? 0 : (size - 1 - start) / step + 1))) {}
};

// Outputs [begin, end) along one axis, and all of the others.
struct Strip {
    int64_t begin[kAxes], end[kAxes];
    int64_t length(int axis) const { return end[axis] - begin[axis]; }
};

// How an image is cut into strips along its first axis with more than one output.
class Strips {
public:
    // So that `floats(strip)` of a strip is at most `most`, if it can be.
    template <class Floats>
    Strips(const Shape& shape, int64_t most, Floats floats) : shape_(shape) {
        while (axis_ + 1 < kAxes && shape.out[axis_] == 1) ++axis_;
        int64_t low = 1, high = shape.out[axis_];
        length_ = high;
        if (floats(high) > most) {
            while (low < high) {
                const int64_t middle = low + (high - low + 1) / 2;
                floats(middle) <= most ? low = middle : high = middle - 1;
            }
            const int64_t parts = (shape.out[axis_] + low - 1) / low;
            length_ = (shape.out[axis_] + parts - 1) / parts;
        }
    }
    int axis() const { return axis_; }
    int64_t length() const { return length_; }
    int64_t count() const { return (shape_.out[axis_] + length_ - 1) / length_; }
    Strip strip(int64_t number) const;

private:
    const Shape& shape_;
    int axis_ = 0;
    int64_t length_;
};

// Inputs that `count` outputs along an axis see, from the first to the last.
inline int64_t reach(const Shape& shape, int axis, int64_t count) {
    return (count - 1) * shape.stride[axis] + (shape.kernel[axis] - 1) * shape.dilation[axis] + 1;
}

// Channels one after the other, each split by the residues of places modulo the stride of every axis (those that a tap
// meets): outputs side by side then see neighbours.
class PlanarPlan {
public:
    PlanarPlan(const Shape& shape, int axis, int64_t length);  // of strips of `length` outputs along `axis`

    // Of the taps in the order of `bands`, the row of the decoded weight: tap * channels + channel.
    std::vector<int64_t> terms;
    std::vector<Band> bands;
    std::vector<int64_t> columns;
    int64_t row_step, slice_step, channel_floats, num_floats;  // num_floats: of all channels, without kReadBeyond

    // `x`: the first channel of the group in one image, (channels, *size). `is_clear`: the zeros around are there.
    void fill(const Kernels& kernels, const Shape& shape, const Strip& strip, bool is_clear, const float* x,
              float* buffer) const;

private:
    void fill_row(const Kernels& kernels, const Shape& shape, int64_t start, bool is_clear, const float* x,
                  float* to) const;

    std::vector<int64_t> phases_[kAxes];
    int64_t lengths_[kAxes];
};

// What 16 outputs side by side see of each channel of their groups, in the order of the padded input.
class PixelPlan {
public:
    PixelPlan(const Shape& shape, int axis, int64_t length);

    // Of the taps of one channel after the other, where they lie, and the row of the decoded weight.
    std::vector<int64_t> taps, terms;
    int64_t pixel_step, row_step, slice_step, num_floats;

    // `x`: the first channel that the outputs see, in one image, (*size), its pixels `step` apart. `is_clear` as above.
    void fill(const Kernels& kernels, const Shape& shape, const Strip& strip, bool is_clear, const Spread& spread,
              const float* x, int64_t step, float* buffer) const;

private:
    int64_t lengths_[kAxes];
};

}  // namespace rarefy::direct
