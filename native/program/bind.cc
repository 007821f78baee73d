// Python bindings of programs: rarefy._native.Program, with a method for each kind of step.
#include "program/program.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/arrays.h"
#include "common/unlocked.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using common::Lent;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// Float32 arrays of so many axes, for as long as this lives.
class LentList {
public:
    LentList(const nb::sequence& arrays, int num_axes, bool writable)
        : count_(nb::len(arrays)), lent_(new Lent[count_]) {
        for (size_t i = 0; i < count_; ++i)
            require(lent_[i].borrow(arrays[i], writable) && lent_[i].ndim() == num_axes,
                    "an array is not float32, not writable, not contiguous or has another number of axes");
    }
    size_t count() const { return count_; }
    const Lent& operator[](size_t index) const { return lent_[index]; }

private:
    size_t count_;
    std::unique_ptr<Lent[]> lent_;
};

class BoundProgram {
public:
    BoundProgram(const std::string& isa, const std::vector<int64_t>& widths, int output)
        : program_(ops::find_kernels(isa.c_str()), widths, output) {}
    BoundProgram(const BoundProgram&) = delete;
    BoundProgram& operator=(const BoundProgram&) = delete;

    void product(int x, const nb::sequence& weights, const nb::sequence& biases, const std::vector<int>& y) {
        program::Product step{x, {}, {}, y};
        require(nb::len(weights) == y.size() && nb::len(biases) == y.size(), "as many weights and biases as outputs");
        for (size_t i = 0; i < y.size(); ++i) {
            step.weights.push_back(nb::cast<const matmul::Operator&>(weights[i]));
            const nb::object bias = biases[i];
            step.biases.push_back(bias.is_none() ? nullptr : keep(bias, program_.width(y[i])));
        }
        program_.add(std::move(step));
    }
    void rms_norm(int x, int sum, nb::handle weight, float eps, int y) {
        const float* values = keep(weight, -1);
        program_.add(program::Norm{x, sum, values, static_cast<int64_t>(kept_.back()->shape(0)), eps, y});
    }
    void rope_store(int q, int k, int v, int layer, int rotation) {
        program_.add(program::Rope{q, k, v, layer, rotation});
    }
    void attention(int q, int layer, int64_t window, float scale, int y) {
        program_.add(program::Attention{q, layer, window, scale, y});
    }
    void gate(int gate, int up, int activation) {
        require(0 <= activation && activation < ops::kNumActivations, "unknown activation number");
        program_.add(program::Gate{gate, up, static_cast<ops::Activation>(activation)});
    }

    nb::object run(nb::handle x, const nb::sequence& cos, const nb::sequence& sin, const nb::sequence& keys,
                   const nb::sequence& values, int64_t start) const {
        Lent rows, result;
        require(rows.borrow(x, true) && rows.ndim() == 2 && rows.shape(1) == program_.width(0),
                "x must be float32, contiguous, writable and as wide as the first slot");
        const LentList cosines(cos, 2, false), sines(sin, 2, false), key_caches(keys, 4, true),
            value_caches(values, 3, true);
        program::Run run{static_cast<int64_t>(rows.shape(0)), start, rows.data(), nullptr, {}, {}};
        require(cosines.count() == sines.count(), "as many sines as cosines are needed");
        for (size_t i = 0; i < cosines.count(); ++i) {
            const Lent &c = cosines[i], &s = sines[i];
            require(c.shape(0) == s.shape(0) && c.shape(1) == s.shape(1), "cosines and sines differ in shape");
            run.rotations.push_back({c.data(), s.data(), c.shape(0), c.shape(1)});
        }
        require(key_caches.count() == value_caches.count(), "as many values as keys are needed");
        for (size_t i = 0; i < key_caches.count(); ++i) {
            const Lent &k = key_caches[i], &v = value_caches[i];
            require(k.shape(3) == ops::kKeyBlock && v.shape(0) == k.shape(0) && v.shape(2) == k.shape(2) &&
                        v.shape(1) == k.shape(1) * ops::kKeyBlock && k.shape(0) > 0 && k.shape(2) > 0,
                    "keys must be (heads, blocks, head_dim, 64) and values (heads, blocks * 64, head_dim)");
            run.layers.push_back({k.data(), v.data(), {k.shape(0), k.shape(1), k.shape(2)}});
        }
        nb::object made = common::new_floats(rows, static_cast<Py_ssize_t>(program_.width(program_.output())));
        require(result.borrow(made, true), "numpy made no array");
        run.y = result.data();
        const common::Unlocked unlocked;
        program_.run(run);
        return made;
    }

private:
    // The memory of a vector, of so many floats unless -1, which the program keeps.
    const float* keep(nb::handle vector, int64_t size) {
        auto lent = std::make_unique<Lent>();
        require(lent->borrow(vector, false) && lent->ndim() == 1 && (size < 0 || lent->shape(0) == size),
                "a vector is not float32, not contiguous or of another size");
        kept_.push_back(std::move(lent));
        return kept_.back()->data();
    }

    program::Program program_;
    std::vector<std::unique_ptr<Lent>> kept_;
};

}  // namespace

void bind_program(nb::module_& module) {
    using namespace nb::literals;
    nb::class_<BoundProgram>(module, "Program")
        .def(nb::init<const std::string&, const std::vector<int64_t>&, int>(), "isa"_a, "widths"_a, "output"_a)
        .def("product", &BoundProgram::product, "x"_a, "weights"_a, "biases"_a, "y"_a)
        .def("rms_norm", &BoundProgram::rms_norm, "x"_a, "sum"_a, "weight"_a, "eps"_a, "y"_a)
        .def("rope_store", &BoundProgram::rope_store, "q"_a, "k"_a, "v"_a, "layer"_a, "rotation"_a)
        .def("attention", &BoundProgram::attention, "q"_a, "layer"_a, "window"_a, "scale"_a, "y"_a)
        .def("gate", &BoundProgram::gate, "gate"_a, "up"_a, "activation"_a)
        .def("run", &BoundProgram::run, "x"_a, "cos"_a, "sin"_a, "keys"_a, "values"_a, "start"_a);
}

}  // namespace rarefy
