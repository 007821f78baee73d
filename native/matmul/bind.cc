// Python bindings of the products.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "matmul/dispatch.h"
#include "matmul/weights.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using matmul::Weights;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Bytes of array `name`, null where there is none.
std::pair<const uint8_t*, int64_t> find(const nb::dict& arrays, const char* name, nb::dlpack::dtype_code code,
                                        int bits) {
    if (!arrays.contains(name)) return {nullptr, 0};
    const auto array = nb::cast<AnyArray>(arrays[name]);
    if (array.dtype().code != static_cast<uint8_t>(code) || array.dtype().bits != bits || array.dtype().lanes != 1)
        throw std::invalid_argument(std::string(name) + " has a wrong dtype");
    static const uint8_t nothing = 0;  // arrays without elements may have no memory
    const auto* bytes = static_cast<const uint8_t*>(array.data());
    return {array.size() == 0 ? &nothing : bytes, static_cast<int64_t>(array.nbytes())};
}

Weights* prepare(const std::string& format, const std::string& isa, int64_t num_outputs, int64_t num_inputs,
                 int64_t group_size, const nb::dict& arrays) {
    const bool f32 = format == "dense-f32-v1";
    const bool bf16 = format.find("-bf16-") != std::string::npos;
    constexpr auto kUnsigned = nb::dlpack::dtype_code::UInt;
    const auto [values, values_bytes] = f32    ? find(arrays, "values", nb::dlpack::dtype_code::Float, 32)
                                        : bf16 ? find(arrays, "values", kUnsigned, 16)
                                               : find(arrays, "codes", kUnsigned, 8);
    const auto [mask, mask_bytes] = find(arrays, "mask", kUnsigned, 8);
    const auto [scales, scales_bytes] = find(arrays, "scales", kUnsigned, 16);
    const auto [zero_points, zero_points_bytes] = find(arrays, "zero_points", kUnsigned, 8);
    const matmul::PackedArrays packed{format, num_outputs, num_inputs, group_size,   values,      values_bytes,
                                      mask,   mask_bytes,  scales,     scales_bytes, zero_points, zero_points_bytes};
    const matmul::Isa runnable = matmul::runnable_isa(isa);
    const nb::gil_scoped_release unlocked;
    return new Weights(packed, runnable);
}

void multiply(const Input& x, const nb::sequence& weights, const nb::sequence& outputs) {
    std::vector<matmul::Product> products;
    const auto num_rows = static_cast<int64_t>(x.shape(0)), num_inputs = static_cast<int64_t>(x.shape(1));
    const size_t count = nb::len(weights);
    if (count != nb::len(outputs)) throw std::invalid_argument("as many outputs as weights are needed");
    products.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const auto* weight = nb::cast<const Weights*>(weights[i]);
        const auto y = nb::cast<Output>(outputs[i], false);
        if (weight == nullptr) throw std::invalid_argument("weight is None");
        if (weight->view().num_inputs != num_inputs || static_cast<int64_t>(y.shape(0)) != num_rows ||
            static_cast<int64_t>(y.shape(1)) != weight->view().num_outputs)
            throw std::invalid_argument("shapes of x, weight and output do not fit");
        products.push_back({weight, y.data()});
    }
    // The caller's sequences keep the weights and arrays alive.
    const nb::gil_scoped_release unlocked;
    matmul::multiply(x.data(), num_rows, num_inputs, products);
}

}  // namespace

void bind_matmul(nb::module_& module) {
    nb::class_<Weights>(module, "Weights")
        .def_prop_ro("nbytes", &Weights::num_bytes)
        .def_prop_ro("isa", [](const Weights& weights) { return matmul::name(weights.isa()); })
        .def_prop_ro("shape", [](const Weights& weights) {
            return std::make_pair(weights.view().num_outputs, weights.view().num_inputs);
        });
    module.def("prepare", &prepare, nb::arg("format"), nb::arg("isa"), nb::arg("num_outputs"), nb::arg("num_inputs"),
               nb::arg("group_size"), nb::arg("arrays"));
    module.def("matmul", &multiply, nb::arg("x").noconvert(), nb::arg("weights"), nb::arg("outputs"));
    module.def("kernel_list", [] {
        std::vector<std::tuple<std::string, std::string, std::string>> rows;
        for (const matmul::ListedKernel& kernel : matmul::list_kernels())
            rows.emplace_back("matmul", kernel.format, matmul::name(kernel.isa));
        return rows;
    });
}

}  // namespace rarefy
