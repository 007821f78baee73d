// A convolution by packed weights, cut into tasks of the thread pool.
#pragma once

#include <cstdint>
#include <vector>

#include "direct/plan.h"
#include "matmul/operators.h"

namespace rarefy::direct {

// One operator with all outputs, or one for each group with its outputs; each has Shape::num_inputs inputs, of which
// the channel changes first and then the tap. x (B, C, *size) and y (B, O, *out), both contiguous; or, of
// channels_last, x (B, *size, C) and y (B, *out, O), which needs takes_pixels(shape).
struct Convolution {
    Shape shape;
    std::vector<const matmul::Operator*> operators;
    const float* x;
    const float* bias;  // (O), or null
    float* y;
    bool channels_last;
};

// Floats of memory that a strip of one output needs; -1 where that is beyond all reason.
int64_t count_floats(const Shape& shape);
void convolve(const Convolution& convolution);

}  // namespace rarefy::direct
