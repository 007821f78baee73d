// Python bindings of the Gram matrix.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "common/unlocked.h"
#include "gram/gram.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using Bits = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Total = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void add_gram(const Bits& x, const Total& total) {
    if (!gram::can_run()) throw std::invalid_argument("this CPU has no bfloat16 product");
    if (total.shape(0) != x.shape(1) || total.shape(1) != x.shape(1))
        throw std::invalid_argument("total must be square, as wide as x");
    const auto num_tokens = static_cast<int64_t>(x.shape(0)), num_features = static_cast<int64_t>(x.shape(1));
    const uint16_t* bits = x.data();
    float* sums = total.data();
    const common::Unlocked unlocked;
    gram::add(bits, num_tokens, num_features, sums);
}

}  // namespace

void bind_gram(nb::module_& module) {
    module.def("gram_available", &gram::can_run);
    module.def("add_gram", &add_gram, nb::arg("x").noconvert(), nb::arg("total").noconvert());
}

}  // namespace rarefy
