// Python binding of the strided copy.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "common/unlocked.h"
#include "strided/strided.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using Source = nb::ndarray<const float, nb::device::cpu>;
using Target = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

void copy(const Source& source, const Target& target) {
    if (source.ndim() > strided::kMaxAxes) throw std::invalid_argument("the view has too many axes");
    if (source.size() != target.size()) throw std::invalid_argument("source and target differ in size");
    // What comes out of the view is limited by memory; a chunk of it is counted in an int.
    if (target.size() > (size_t{1} << 40)) throw std::invalid_argument("the view is too large");
    strided::View view{source.data(), static_cast<int>(source.ndim()), {}, {}};
    for (size_t axis = 0; axis < source.ndim(); ++axis) {
        view.sizes[axis] = static_cast<int64_t>(source.shape(axis));
        view.strides[axis] = source.stride(axis);
    }
    float* out = target.data();
    const common::Unlocked unlocked;
    strided::copy(view, out);
}

}  // namespace

void bind_strided(nb::module_& module) {
    module.def("copy_strided", &copy, nb::arg("source").noconvert(), nb::arg("target").noconvert());
}

}  // namespace rarefy
