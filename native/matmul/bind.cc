// Python bindings of the products.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
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

matmul::Element element_of(const nb::dlpack::dtype& dtype) {
    using Code = nb::dlpack::dtype_code;
    constexpr struct {
        Code code;
        int bits;
        matmul::Element element;
    } kElements[] = {{Code::UInt, 8, matmul::Element::u8},   {Code::UInt, 16, matmul::Element::u16},
                     {Code::UInt, 32, matmul::Element::u32}, {Code::Int, 8, matmul::Element::i8},
                     {Code::Int, 16, matmul::Element::i16},  {Code::Int, 32, matmul::Element::i32},
                     {Code::Float, 32, matmul::Element::f32}};
    for (const auto& row : kElements)
        if (dtype.code == static_cast<uint8_t>(row.code) && dtype.bits == row.bits && dtype.lanes == 1)
            return row.element;
    return matmul::Element::other;
}

// `integers`: of the layout's metadata; truth values are 0 and 1.
Weights* prepare(const std::string& format, const std::string& isa, int64_t num_outputs, int64_t num_inputs,
                 const nb::dict& integers, const nb::dict& arrays) {
    matmul::PackedArrays packed{format, num_outputs, num_inputs, {}, {}};
    for (const auto& [name, value] : integers)
        packed.integers.push_back({nb::cast<std::string>(name), nb::cast<int64_t>(value)});
    std::vector<AnyArray> kept_alive;
    for (const auto& [name, value] : arrays) {
        const auto array = nb::cast<AnyArray>(value);
        static const uint8_t nothing = 0;  // arrays without elements may have no memory
        const auto* bytes = array.size() == 0 ? &nothing : static_cast<const uint8_t*>(array.data());
        packed.arrays.push_back(
            {nb::cast<std::string>(name), element_of(array.dtype()), bytes, static_cast<int64_t>(array.nbytes())});
        kept_alive.push_back(array);
    }
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

using Places = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void multiply_taps(const Input& pixels, const Places& row_starts, const Places& tap_offsets, const Weights& weights,
                   const Output& y) {
    const auto num_pixels = static_cast<int64_t>(pixels.shape(0)), num_channels = static_cast<int64_t>(pixels.shape(1));
    const matmul::TapRows taps{row_starts.data(), static_cast<int64_t>(row_starts.shape(0)), tap_offsets.data(),
                               static_cast<int64_t>(tap_offsets.shape(0))};
    if (!weights.is_integer() || num_channels % matmul::kBlockInputs != 0)
        throw std::invalid_argument("taps want integer weights and a multiple of 64 channels");
    if (weights.view().num_inputs != taps.num_taps * num_channels ||
        static_cast<int64_t>(y.shape(0)) != taps.num_rows ||
        static_cast<int64_t>(y.shape(1)) != weights.view().num_outputs)
        throw std::invalid_argument("shapes of pixels, taps, weight and output do not fit");
    if (taps.num_rows == 0) return;
    const auto [first_row, last_row] = std::minmax_element(taps.row_starts, taps.row_starts + taps.num_rows);
    const auto [first_tap, last_tap] = std::minmax_element(taps.tap_offsets, taps.tap_offsets + taps.num_taps);
    if (taps.num_taps > 0 && (*first_row < 0 || *last_row >= num_pixels || *first_tap < 0 || *last_tap >= num_pixels ||
                              *last_row + *last_tap >= num_pixels))
        throw std::invalid_argument("a tap lies outside of the pixels");
    const nb::gil_scoped_release unlocked;
    matmul::multiply_taps(pixels.data(), num_pixels, num_channels, taps, {{&weights, y.data()}});
}

}  // namespace

void bind_matmul(nb::module_& module) {
    nb::class_<Weights>(module, "Weights")
        .def_prop_ro("nbytes", &Weights::num_bytes)
        .def_prop_ro("is_integer", &Weights::is_integer)
        .def_prop_ro("isa", [](const Weights& weights) { return matmul::name(weights.isa()); })
        .def_prop_ro("shape", [](const Weights& weights) {
            return std::make_pair(weights.view().num_outputs, weights.view().num_inputs);
        });
    module.def("prepare", &prepare, nb::arg("format"), nb::arg("isa"), nb::arg("num_outputs"), nb::arg("num_inputs"),
               nb::arg("integers"), nb::arg("arrays"));
    module.def("matmul", &multiply, nb::arg("x").noconvert(), nb::arg("weights"), nb::arg("outputs"));
    module.def("matmul_taps", &multiply_taps, nb::arg("pixels").noconvert(), nb::arg("row_starts").noconvert(),
               nb::arg("tap_offsets").noconvert(), nb::arg("weights"), nb::arg("output").noconvert());
    module.def("kernel_list", [] {
        std::vector<std::tuple<std::string, std::string, std::string>> rows;
        for (const matmul::ListedKernel& kernel : matmul::list_kernels())
            rows.emplace_back("matmul", kernel.format, matmul::name(kernel.isa));
        return rows;
    });
}

}  // namespace rarefy
