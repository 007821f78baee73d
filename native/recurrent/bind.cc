// Python bindings of recurrent layers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/arrays.h"
#include "common/unlocked.h"
#include "recurrent/request.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using common::Lent;
using matmul::Operator;
using Lengths = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// The sizes of an array.
template <size_t kNumAxes>
std::array<int64_t, kNumAxes> borrow(Lent& lent, nb::handle array) {
    require(lent.borrow(array, false) && lent.ndim() == static_cast<int>(kNumAxes),
            "an array is not float32, not contiguous or has another number of axes");
    std::array<int64_t, kNumAxes> sizes;
    for (size_t axis = 0; axis < kNumAxes; ++axis) sizes[axis] = lent.shape(static_cast<int>(axis));
    return sizes;
}

// Where it is not None.
template <size_t kNumAxes>
std::optional<std::array<int64_t, kNumAxes>> borrow_if_any(Lent& lent, nb::handle array) {
    if (array.is_none()) return std::nullopt;
    return borrow<kNumAxes>(lent, array);
}

// A new array that holds the same.
nb::object copy_of(const Lent& before, Lent& after) {
    nb::object made = common::new_floats(before, before.shape(1));
    require(after.borrow(made, true), "numpy made no array");
    const auto count = static_cast<size_t>(before.shape(0) * before.shape(1));
    if (count > 0) std::memcpy(after.data(), before.data(), count * sizeof(float));
    return made;
}

nb::tuple run_recurrent(const std::string& isa, int mode, nb::handle x, nb::handle input_bias, nb::handle hidden_bias,
                        const Operator& meet_hidden, const Operator* project, nb::handle hidden, nb::handle cell,
                        const std::optional<Lengths>& lengths, bool reverse) {
    const recurrent::Kernels& kernels = recurrent::find_kernels(isa.c_str());
    Lent gates, biases[2], states[4], outputs;
    recurrent::Request request{mode, &meet_hidden, project, borrow<3>(gates, x), {}, {}, {}, {}, {}, nullptr};
    if (const auto sizes = borrow_if_any<1>(biases[0], input_bias)) request.input_bias = (*sizes)[0];
    if (const auto sizes = borrow_if_any<1>(biases[1], hidden_bias)) request.hidden_bias = (*sizes)[0];
    request.hidden = borrow<2>(states[0], hidden);
    request.cell = borrow_if_any<2>(states[2], cell);
    std::vector<int64_t> own_lengths;
    if (lengths.has_value()) {
        own_lengths = common::copied(*lengths);
        request.num_lengths = static_cast<int64_t>(own_lengths.size());
        request.lengths = own_lengths.data();
    }
    recurrent::Layer layer = recurrent::checked(request);
    if (request.input_bias) layer.input_bias = biases[0].data();
    if (request.hidden_bias) layer.hidden_bias = biases[1].data();
    nb::object last_hidden = copy_of(states[0], states[1]), last_cell = nb::none();
    if (request.cell) last_cell = copy_of(states[2], states[3]);
    nb::object y = common::new_floats(gates, static_cast<Py_ssize_t>(meet_hidden.num_inputs()));
    require(outputs.borrow(y, true), "numpy made no array");
    const recurrent::Sequences sequences{gates.shape(0),
                                         gates.shape(1),
                                         gates.data(),
                                         request.lengths,
                                         reverse,
                                         states[1].data(),
                                         request.cell ? states[3].data() : nullptr,
                                         outputs.data()};
    {
        // The caller's arguments keep weights and arrays alive.
        const common::Unlocked unlocked;
        recurrent::run(kernels, layer, sequences);
    }
    return nb::make_tuple(y, last_hidden, last_cell);
}

}  // namespace

void bind_recurrent(nb::module_& module) {
    using namespace nb::literals;
    module.def("run_recurrent", &run_recurrent, "isa"_a, "mode"_a, "x"_a, "input_bias"_a.none(), "hidden_bias"_a.none(),
               "meet_hidden"_a, "project"_a.none(), "hidden"_a, "cell"_a.none(), "lengths"_a.noconvert().none(),
               "reverse"_a);
}

}  // namespace rarefy
