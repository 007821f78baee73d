// Python bindings of recurrent layers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/arrays.h"
#include "common/unlocked.h"
#include "recurrent/recurrent.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using common::Lent;
using matmul::Operator;
using Lengths = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

void borrow(Lent& lent, nb::handle array, int num_axes) {
    require(lent.borrow(array, false) && lent.ndim() == num_axes,
            "an array is not float32, not contiguous or has another number of axes");
}

const float* borrow_bias(Lent& lent, nb::handle array, int64_t size) {
    if (array.is_none()) return nullptr;
    borrow(lent, array, 1);
    require(lent.shape(0) == size, "a bias must have one value for each output of the recurrent weight");
    return lent.data();
}

// A state (B, width) of so many sequences, and a new array that holds the same.
nb::object copy_state(Lent& before, Lent& after, nb::handle array, int64_t num_sequences, int64_t width) {
    borrow(before, array, 2);
    require(before.shape(0) == num_sequences && before.shape(1) == width, "a state has another shape than the layer's");
    nb::object made = common::new_floats(before, before.shape(1));
    require(after.borrow(made, true), "numpy made no array");
    if (num_sequences > 0)
        std::memcpy(after.data(), before.data(), static_cast<size_t>(num_sequences * width) * sizeof(float));
    return made;
}

nb::tuple run_recurrent(const std::string& isa, int mode, nb::handle x, nb::handle input_bias, nb::handle hidden_bias,
                        const Operator& meet_hidden, const Operator* project, nb::handle hidden, nb::handle cell,
                        const std::optional<Lengths>& lengths, bool reverse) {
    const recurrent::Kernels& kernels = recurrent::find_kernels(isa.c_str());
    require(0 <= mode && mode < recurrent::kNumModes, "unknown mode of a recurrent layer");
    recurrent::Layer layer{static_cast<recurrent::Mode>(mode), &meet_hidden, project, nullptr, nullptr};
    const bool is_lstm = layer.mode == recurrent::kLstm;
    const int64_t num_gates = meet_hidden.num_outputs(), num_outputs = meet_hidden.num_inputs();
    const int64_t width = layer.hidden_width();
    require(width > 0 && num_gates == width * recurrent::count_gates(layer.mode) && num_outputs > 0,
            "the recurrent weight has no outputs for each gate, or no inputs");
    require(project == nullptr ? num_outputs == width
                               : is_lstm && project->num_outputs() == num_outputs && project->num_inputs() == width,
            "the recurrent weight, the projection and the mode do not fit");
    Lent gates, biases[2], states[4], outputs;
    borrow(gates, x, 3);
    require(gates.shape(2) == num_gates, "x must be as wide as the recurrent weight has outputs");
    const int64_t num_steps = gates.shape(0), num_sequences = gates.shape(1);
    layer.input_bias = borrow_bias(biases[0], input_bias, num_gates);
    layer.hidden_bias = borrow_bias(biases[1], hidden_bias, num_gates);
    require(cell.is_none() != is_lstm, "an LSTM has cells, and nothing else has");
    nb::object last_hidden = copy_state(states[0], states[1], hidden, num_sequences, num_outputs);
    nb::object last_cell = nb::none();
    if (is_lstm) last_cell = copy_state(states[2], states[3], cell, num_sequences, width);
    if (lengths.has_value()) {
        require(static_cast<int64_t>(lengths->shape(0)) == num_sequences, "each sequence must have a length");
        int64_t longest = num_steps;
        for (int64_t i = 0; i < num_sequences; ++i) {
            const int64_t length = lengths->data()[i];
            require(0 <= length && length <= longest, "lengths must not rise, nor exceed the steps");
            longest = length;
        }
    }
    nb::object y = common::new_floats(gates, static_cast<Py_ssize_t>(num_outputs));
    require(outputs.borrow(y, true), "numpy made no array");
    const recurrent::Sequences sequences{num_steps,
                                         num_sequences,
                                         gates.data(),
                                         lengths.has_value() ? lengths->data() : nullptr,
                                         reverse,
                                         states[1].data(),
                                         is_lstm ? states[3].data() : nullptr,
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
