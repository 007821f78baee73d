#include "direct/request.h"

#include <algorithm>
#include <stdexcept>

namespace rarefy::direct {
namespace {

using matmul::Operator;
using Sizes = std::vector<int64_t>;

// No product of two of them overflows, nor the sum of two such products.
constexpr int64_t kMostSize = (int64_t{1} << 31) - 1;
// Of what may be added to and multiplied by small numbers.
constexpr double kMostFloats = double(int64_t{1} << 60);

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// Floats that all outputs of a group see, padded: the driver counts them before it cuts strips.
double floats_seen(const Shape& shape) {
    double floats = kPanel * static_cast<double>(shape.group_channels);
    for (int axis = 0; axis < kAxes; ++axis)
        floats *= static_cast<double>(reach(shape, axis, shape.out[axis]) + kPanel);
    return floats;
}

// The numbers of the last axes; those in front get `missing`.
void take(const Sizes& numbers, size_t num_axes, int64_t lowest, int64_t missing, int64_t (&to)[kAxes]) {
    require(numbers.size() == num_axes, "a number for each spatial axis is needed");
    std::fill(to, to + kAxes, missing);
    for (size_t axis = 0; axis < num_axes; ++axis) {
        require(numbers[axis] >= lowest && numbers[axis] <= kMostSize, "a number is out of range");
        to[kAxes - num_axes + axis] = numbers[axis];
    }
}

}  // namespace

Convolution checked(const Request& request) {
    const size_t num_axes = request.kernel.size();
    require(num_axes >= 1 && num_axes <= kAxes, "one to three spatial axes are needed");
    require(request.x.size() == num_axes + 2, "the input must have a batch, channels and the spatial axes");
    Convolution c{};
    Shape& shape = c.shape;
    Sizes size(request.x.begin() + 1, request.x.end());
    const auto channels = request.channels_last ? size.end() - 1 : size.begin();
    const int64_t num_channels = *channels;
    size.erase(channels);
    take(size, num_axes, 1, 1, shape.size);
    take(request.kernel, num_axes, 1, 1, shape.kernel);
    take(request.stride, num_axes, 1, 1, shape.stride);
    take(request.dilation, num_axes, 1, 1, shape.dilation);
    take(request.before, num_axes, 0, 0, shape.before);
    take(request.out, num_axes, 1, 1, shape.out);
    const int64_t groups = request.groups;
    require(groups >= 1 && groups <= num_channels && num_channels % groups == 0,
            "the channels do not divide into the groups");
    shape.batch = request.x[0];
    shape.groups = groups;
    shape.group_channels = num_channels / groups;
    c.operators = request.operators;
    c.channels_last = request.channels_last;
    int64_t num_outputs = 0, num_inputs = 1;
    for (const Operator* by : c.operators) {
        require(by != nullptr, "weight is None");
        num_outputs += by->num_outputs();
    }
    const auto num_operators = static_cast<int64_t>(c.operators.size());
    const bool is_direct = request.way == Way::taps;
    require(
        ((is_direct && num_operators == 1) || num_operators == groups) && num_outputs > 0 && num_outputs % groups == 0,
        "one weight or one for each group is needed, with as many outputs in each");
    shape.group_outputs = num_outputs / groups;
    for (int64_t factor : {shape.kernel[0], shape.kernel[1], shape.kernel[2], shape.group_channels}) {
        require(num_inputs <= kMostSize / factor, "the kernel is too large");
        num_inputs *= factor;
    }
    for (const Operator* by : c.operators)
        require(by->num_inputs() == num_inputs && by->num_outputs() == num_outputs / num_operators,
                "shapes of input, kernel and weight do not fit");
    require(!is_direct || !c.channels_last || takes_pixels(shape),
            "with channels last the outputs of a group must divide 16, and no fewer than its channels");
    require(floats_seen(shape) <= kMostFloats, "the outputs lie too far from each other");
    require(!is_direct || count_floats(shape) >= 0, "the strips are too large");
    require(!request.num_biases || *request.num_biases == num_outputs, "the bias must have a number for each output");
    return c;
}

std::vector<int64_t> sizes_of_output(const Request& request, const Convolution& checked) {
    std::vector<int64_t> sizes = {checked.shape.batch};
    sizes.insert(sizes.end(), request.out.begin(), request.out.end());
    sizes.insert(request.channels_last ? sizes.end() : sizes.begin() + 1, checked.shape.num_outputs());
    return sizes;
}

}  // namespace rarefy::direct
