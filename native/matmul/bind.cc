// Python bindings of the products.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "common/arrays.h"
#include "common/unlocked.h"
#include "matmul/dispatch.h"
#include "matmul/operators.h"
#include "matmul/weights.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using matmul::Operator;
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
Operator prepare(const std::string& format, const std::string& isa, int64_t num_outputs, int64_t num_inputs,
                 const nb::dict& integers, const nb::dict& arrays) {
    matmul::PackedArrays packed{format, num_outputs, num_inputs, {}, {}};
    for (const auto& [name, value] : integers)
        packed.integers.push_back({nb::cast<std::string>(name), nb::cast<int64_t>(value)});
    std::vector<AnyArray> kept_alive;
    std::vector<std::vector<uint8_t>> copies;  // no move of one moves its bytes
    for (const auto& [key, value] : arrays) {
        const auto array = nb::cast<AnyArray>(value);
        const auto name = nb::cast<std::string>(key);
        static const uint8_t nothing = 0;  // arrays without elements may have no memory
        const auto* bytes = array.size() == 0 ? &nothing : static_cast<const uint8_t*>(array.data());
        // The packers check these and then rely on them, while other threads may write into the array: a mask says
        // where values are read and written. Nothing of the others does.
        if (array.size() > 0 && (name == "mask" || name == "zero_points"))
            bytes = copies.emplace_back(bytes, bytes + array.nbytes()).data();
        packed.arrays.push_back({name, element_of(array.dtype()), bytes, static_cast<int64_t>(array.nbytes())});
        kept_alive.push_back(array);
    }
    const matmul::Isa runnable = matmul::runnable_isa(isa);
    const common::Unlocked unlocked;
    return Operator(std::make_shared<const Weights>(packed, runnable));
}

// The products of x with operators in one call, each a new array; none where x is not what the kernels take as it is.
std::vector<nb::object> products_of(nb::handle x, const Operator* const* operators, size_t count) {
    common::Lent rows;
    if (!rows.borrow(x, false) || rows.ndim() < 1) return {};
    const Py_ssize_t num_rows = rows.num_rows(), num_inputs = rows.shape(rows.ndim() - 1);
    std::vector<nb::object> made(count);
    const std::unique_ptr<common::Lent[]> outputs(new common::Lent[count]);
    std::vector<matmul::Target> targets(count);
    for (size_t i = 0; i < count; ++i) {
        if (operators[i]->num_inputs() != num_inputs) return {};
        made[i] = common::new_floats(rows, static_cast<Py_ssize_t>(operators[i]->num_outputs()));
        if (!outputs[i].borrow(made[i], true)) return {};
        targets[i] = {operators[i], outputs[i].data()};
    }
    const common::Unlocked unlocked;
    matmul::multiply(rows.data(), num_rows, num_inputs, targets);
    return made;
}

nb::object multiply(const Operator& by, nb::handle x) {
    const Operator* operators[] = {&by};
    std::vector<nb::object> made = products_of(x, operators, 1);
    return made.empty() ? nb::none() : std::move(made[0]);
}

// A sequence may make its items as they are asked for: only a tuple of them keeps them alive.
nb::object multiply_many(nb::handle x, const nb::sequence& sequence) {
    const nb::tuple weights(sequence);
    std::vector<const Operator*> operators;
    for (const nb::handle weight : weights) {
        const Operator* by;
        if (!nb::try_cast(weight, by) || by == nullptr) return nb::none();
        operators.push_back(by);
    }
    if (operators.empty()) return nb::none();
    std::vector<nb::object> made = products_of(x, operators.data(), operators.size());
    if (made.empty()) return nb::none();
    nb::list results;
    for (nb::object& y : made) results.append(std::move(y));
    return results;
}

void multiply_into(const Input& x, const nb::sequence& some_weights, const nb::sequence& some_outputs) {
    const nb::tuple weights(some_weights), outputs(some_outputs);
    std::vector<matmul::Target> targets;
    const auto num_rows = static_cast<int64_t>(x.shape(0)), num_inputs = static_cast<int64_t>(x.shape(1));
    const size_t count = nb::len(weights);
    if (count != nb::len(outputs)) throw std::invalid_argument("as many outputs as weights are needed");
    targets.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const auto* by = nb::cast<const Operator*>(weights[i]);
        const auto y = nb::cast<Output>(outputs[i], false);
        if (by == nullptr) throw std::invalid_argument("weight is None");
        if (by->num_inputs() != num_inputs || static_cast<int64_t>(y.shape(0)) != num_rows ||
            static_cast<int64_t>(y.shape(1)) != by->num_outputs())
            throw std::invalid_argument("shapes of x, weight and output do not fit");
        targets.push_back({by, y.data()});
    }
    const common::Unlocked unlocked;
    matmul::multiply(x.data(), num_rows, num_inputs, targets);
}

using Places = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void multiply_taps(const Input& pixels, const Places& row_starts, const Places& tap_offsets, const Operator& by,
                   const Output& y) {
    if (by.weights() == nullptr) throw std::invalid_argument("taps want one weight, not several");
    const Weights& weights = *by.weights();
    const auto num_pixels = static_cast<int64_t>(pixels.shape(0)), num_channels = static_cast<int64_t>(pixels.shape(1));
    const std::vector<int64_t> starts = common::copied(row_starts), offsets = common::copied(tap_offsets);
    const matmul::TapRows taps{starts.data(), static_cast<int64_t>(starts.size()), offsets.data(),
                               static_cast<int64_t>(offsets.size())};
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
    const common::Unlocked unlocked;
    matmul::multiply_taps(pixels.data(), num_pixels, num_channels, taps, {{&weights, y.data()}});
}

}  // namespace

void bind_matmul(nb::module_& module) {
    nb::class_<Operator>(module, "Weights")
        .def_prop_ro("nbytes", &Operator::num_bytes)
        .def_prop_ro("read_nbytes", &Operator::num_read_bytes)
        .def_prop_ro("is_integer",
                     [](const Operator& by) { return by.weights() != nullptr && by.weights()->is_integer(); })
        .def_prop_ro("isa",
                     [](const Operator& by) -> std::optional<std::string> {
                         if (by.weights() == nullptr) return std::nullopt;
                         return matmul::name(by.weights()->isa());
                     })
        .def_prop_ro("shape", [](const Operator& by) { return std::make_pair(by.num_outputs(), by.num_inputs()); })
        .def("multiply", &multiply, nb::arg("x").none());
    module.def("prepare", &prepare, nb::arg("format"), nb::arg("isa"), nb::arg("num_outputs"), nb::arg("num_inputs"),
               nb::arg("integers"), nb::arg("arrays"));
    module.def("chain", &Operator::chain, nb::arg("inner"), nb::arg("outer"), nb::arg("num_runs"));
    module.def("add", &Operator::sum, nb::arg("first"), nb::arg("second"));
    module.def("multiply", &multiply_many, nb::arg("x").none(), nb::arg("weights"));
    module.def("matmul", &multiply_into, nb::arg("x").noconvert(), nb::arg("weights"), nb::arg("outputs"));
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
