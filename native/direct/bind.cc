// Python bindings of convolutions: by taps, with few outputs in a group, and by patches.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <vector>

#include "common/arrays.h"
#include "common/pool.h"
#include "common/unlocked.h"
#include "direct/patches.h"
#include "direct/request.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using Sizes = std::vector<int64_t>;

// By the taps of few outputs, or by products of patches: None then where a strip would need more memory than a thread
// should keep.
nb::object convolve(nb::handle x, const nb::sequence& weights, nb::handle bias, int64_t groups, const Sizes& kernel,
                    const Sizes& stride, const Sizes& dilation, const Sizes& before, const Sizes& out,
                    bool channels_last, bool by_patches) {
    common::Lent image, starts, target;
    if (!image.borrow(x, false)) throw std::invalid_argument("the input must be contiguous float32");
    const direct::Way way = by_patches ? direct::Way::patches : direct::Way::taps;
    direct::Request request{way, {}, {}, groups, kernel, stride, dilation, before, out, channels_last, {}};
    for (int axis = 0; axis < image.ndim(); ++axis) request.x.push_back(image.shape(axis));
    // A sequence may make its items as they are asked for: only a tuple of them keeps them alive.
    const nb::tuple kept(weights);
    for (const nb::handle weight : kept) request.operators.push_back(nb::cast<const matmul::Operator*>(weight));
    if (!bias.is_none()) {
        if (!starts.borrow(bias, false) || starts.ndim() != 1)
            throw std::invalid_argument("the bias must be contiguous float32 with one axis");
        request.num_biases = starts.shape(0);
    }
    direct::Convolution c = direct::checked(request);
    if (by_patches && !direct::fits_strips(c)) return nb::none();
    const Sizes sizes = direct::sizes_of_output(request, c);
    const std::vector<Py_ssize_t> shape(sizes.begin(), sizes.end());
    nb::object made = common::new_floats(shape.data(), static_cast<int>(shape.size()));
    if (!target.borrow(made, true)) throw std::invalid_argument("the output is not what was asked for");
    c.x = image.data();
    c.bias = bias.is_none() ? nullptr : starts.data();
    c.y = target.data();
    const common::Unlocked unlocked;
    const common::OnTeam team;
    (by_patches ? direct::convolve_patches : direct::convolve)(c);
    return made;
}

}  // namespace

void bind_direct(nb::module_& module) {
    module.def("convolve", &convolve, nb::arg("x"), nb::arg("weights"), nb::arg("bias").none(), nb::arg("groups"),
               nb::arg("kernel"), nb::arg("stride"), nb::arg("dilation"), nb::arg("before"), nb::arg("out"),
               nb::arg("channels_last"), nb::arg("by_patches"));
}

}  // namespace rarefy
