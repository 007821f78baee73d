// Copies a strided view of float32 numbers into contiguous memory, over the thread pool: the patches of a convolution,
// and its outputs with the channels in front.
//
// The view has num_axes axes, the last one changing first in `out`; an entry lies at the sum of index * stride, counted
// in numbers, and every stride may be 0 (the same numbers again). Patches of an image whose channels lie last have long
// runs of neighbouring numbers, which are copied as such. Where neighbours lie along another axis than the last one,
// the two are transposed in tiles.
#pragma once

#include <cstdint>

namespace rarefy::strided {

constexpr int kMaxAxes = 16;

struct View {
    const float* data;
    int num_axes;  // at most kMaxAxes
    int64_t sizes[kMaxAxes];
    int64_t strides[kMaxAxes];
};

// `out` holds as many numbers as the view has entries.
void copy(View view, float* out);

// to[i * to_step + j] = from[j * from_step + i] for i < height and j < width, by the calling thread alone.
void transpose(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t height, int64_t width);

}  // namespace rarefy::strided
