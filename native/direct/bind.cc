// Python binding of convolutions with few outputs in a group.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/arrays.h"
#include "common/pool.h"
#include "common/unlocked.h"
#include "direct/driver.h"
#include "direct/patches.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using direct::kAxes;
using matmul::Operator;
using Sizes = std::vector<int64_t>;

// No product of two of them overflows.
constexpr int64_t kMostSize = int64_t{1} << 31;

// The numbers of the last axes; those in front get `missing`.
void take(const Sizes& numbers, size_t num_axes, int64_t lowest, int64_t missing, int64_t (&to)[kAxes]) {
    if (numbers.size() != num_axes) throw std::invalid_argument("a number for each spatial axis is needed");
    std::fill(to, to + kAxes, missing);
    for (size_t axis = 0; axis < num_axes; ++axis) {
        if (numbers[axis] < lowest || numbers[axis] > kMostSize)
            throw std::invalid_argument("a number is out of range");
        to[kAxes - num_axes + axis] = numbers[axis];
    }
}

// A convolution of arrays that Python holds.
struct Call {
    common::Lent image, starts, target;
    nb::object made;
    direct::Convolution c{};

    // Everything but the output, which is `out` places of each image.
    void take_inputs(nb::handle x, const nb::sequence& operators, nb::handle bias, int64_t groups, const Sizes& kernel,
                     const Sizes& stride, const Sizes& dilation, const Sizes& before, const Sizes& out,
                     bool channels_last);
    void make_output();
};

void Call::take_inputs(nb::handle x, const nb::sequence& operators, nb::handle bias, int64_t groups,
                       const Sizes& kernel, const Sizes& stride, const Sizes& dilation, const Sizes& before,
                       const Sizes& out, bool channels_last) {
    const size_t num_axes = kernel.size();
    if (num_axes < 1 || num_axes > kAxes) throw std::invalid_argument("one to three spatial axes are needed");
    if (!image.borrow(x, false) || image.ndim() != static_cast<int>(num_axes) + 2)
        throw std::invalid_argument("the input must be contiguous float32 with a batch, channels and the spatial axes");
    direct::Shape& shape = c.shape;
    const int channel_axis = channels_last ? static_cast<int>(num_axes) + 1 : 1;
    Sizes size;
    for (int axis = 1; axis < image.ndim(); ++axis)
        if (axis != channel_axis) size.push_back(image.shape(axis));
    take(size, num_axes, 1, 1, shape.size);
    take(kernel, num_axes, 1, 1, shape.kernel);
    take(stride, num_axes, 1, 1, shape.stride);
    take(dilation, num_axes, 1, 1, shape.dilation);
    take(before, num_axes, 0, 0, shape.before);
    take(out, num_axes, 1, 1, shape.out);
    const int64_t num_channels = image.shape(channel_axis);
    if (groups < 1 || groups > num_channels || num_channels % groups != 0)
        throw std::invalid_argument("the channels do not divide into the groups");
    shape.batch = image.shape(0);
    shape.groups = groups;
    shape.group_channels = num_channels / groups;
    int64_t num_outputs = 0, num_inputs = 1;
    for (const nb::handle object : operators) {
        const auto* by = nb::cast<const Operator*>(object);
        if (by == nullptr) throw std::invalid_argument("weight is None");
        c.operators.push_back(by);
        num_outputs += by->num_outputs();
    }
    if ((c.operators.size() != 1 && static_cast<int64_t>(c.operators.size()) != groups) || num_outputs == 0 ||
        num_outputs % groups != 0)
        throw std::invalid_argument("one weight or one for each group is needed, with as many outputs in each");
    shape.group_outputs = num_outputs / groups;
    for (int64_t factor : {shape.kernel[0], shape.kernel[1], shape.kernel[2], shape.group_channels}) {
        if (num_inputs > kMostSize / factor) throw std::invalid_argument("the kernel is too large");
        num_inputs *= factor;
    }
    for (const Operator* by : c.operators)
        if (by->num_inputs() != num_inputs ||
            by->num_outputs() != num_outputs / static_cast<int64_t>(c.operators.size()))
            throw std::invalid_argument("shapes of input, kernel and weight do not fit");
    if (direct::count_floats(shape) < 0) throw std::invalid_argument("the strips are too large");
    if (!bias.is_none()) {
        if (!starts.borrow(bias, false) || starts.ndim() != 1 || starts.shape(0) != num_outputs)
            throw std::invalid_argument("the bias must be contiguous float32 with a number for each output");
        c.bias = starts.data();
    }
    c.x = image.data();
    c.channels_last = channels_last;
}

void Call::make_output() {
    const int num_axes = image.ndim() - 2, last = c.channels_last ? image.ndim() - 1 : 1;
    std::vector<Py_ssize_t> sizes(static_cast<size_t>(image.ndim()));
    sizes[0] = static_cast<Py_ssize_t>(c.shape.batch);
    sizes[static_cast<size_t>(last)] = static_cast<Py_ssize_t>(c.shape.num_outputs());
    for (int axis = 0; axis < num_axes; ++axis)
        sizes[static_cast<size_t>(axis + (c.channels_last ? 1 : 2))] =
            static_cast<Py_ssize_t>(c.shape.out[kAxes - num_axes + axis]);
    made = common::new_floats(sizes.data(), image.ndim());
    if (!target.borrow(made, true)) throw std::invalid_argument("the output is not what was asked for");
    c.y = target.data();
}

nb::object convolve(nb::handle x, const nb::sequence& operators, nb::handle bias, int64_t groups, const Sizes& kernel,
                    const Sizes& stride, const Sizes& dilation, const Sizes& before, const Sizes& out,
                    bool channels_last) {
    Call call;
    call.take_inputs(x, operators, bias, groups, kernel, stride, dilation, before, out, channels_last);
    const direct::Shape& shape = call.c.shape;
    if (channels_last && (shape.group_channels != 1 || shape.group_outputs != 1 || call.c.operators.size() != 1))
        throw std::invalid_argument("with channels last every channel must have one output, of one weight");
    call.make_output();
    {
        const common::Unlocked unlocked;
        const common::OnTeam team;
        direct::convolve(call.c);
    }
    return std::move(call.made);
}

// None where a strip would need more memory than a thread should keep.
nb::object convolve_patches(nb::handle x, const nb::sequence& operators, nb::handle bias, int64_t groups,
                            const Sizes& kernel, const Sizes& stride, const Sizes& dilation, const Sizes& before,
                            const Sizes& out, bool channels_last) {
    Call call;
    call.take_inputs(x, operators, bias, groups, kernel, stride, dilation, before, out, channels_last);
    if (static_cast<int64_t>(call.c.operators.size()) != groups)
        throw std::invalid_argument("a weight for each group is needed");
    if (!direct::fits_strips(call.c)) return nb::none();
    call.make_output();
    {
        const common::Unlocked unlocked;
        const common::OnTeam team;
        direct::convolve_patches(call.c);
    }
    return std::move(call.made);
}

}  // namespace

void bind_direct(nb::module_& module) {
    module.def("convolve", &convolve, nb::arg("x"), nb::arg("weights"), nb::arg("bias").none(), nb::arg("groups"),
               nb::arg("kernel"), nb::arg("stride"), nb::arg("dilation"), nb::arg("before"), nb::arg("out"),
               nb::arg("channels_last"));
    module.def("convolve_patches", &convolve_patches, nb::arg("x"), nb::arg("weights"), nb::arg("bias").none(),
               nb::arg("groups"), nb::arg("kernel"), nb::arg("stride"), nb::arg("dilation"), nb::arg("before"),
               nb::arg("out"), nb::arg("channels_last"));
}

}  // namespace rarefy
