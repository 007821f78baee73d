// Damaged weights, any sizes, lengths and numbers into recurrent layers on every instruction set of this machine: they
// are refused with an exception, or all steps run without an access outside of the arrays. The same bits for every
// number of threads.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/fuzz.h"
#include "common/pool.h"
#include "matmul/damage.h"
#include "recurrent/request.h"

namespace {

using namespace rarefy;
using fuzz::Exact;
using fuzz::Input;
using matmul::Isa;
using matmul::Operator;
using recurrent::Request;
using Floats = std::vector<float>;

// More would take seconds under a sanitizer.
constexpr double kMostFloats = 1 << 17, kMostProducts = 1 << 20;

// An operator of one weight, which may be damaged, or of two. Null where it is refused.
std::unique_ptr<Operator> random_operator(Input& input, const matmul::Machine& machine, Isa isa, int64_t num_outputs,
                                          int64_t num_inputs) {
    const auto part = [&](int64_t outputs, int64_t inputs) {
        matmul::SampleSpec spec = matmul::random_spec(input, machine);
        spec.num_outputs = outputs;
        spec.num_inputs = inputs;
        const matmul::Hostile hostile(input, machine, spec, input.pick<int64_t>({0, 0, 0, 1, 2}));
        auto made = hostile.weights(isa);
        return made == nullptr ? nullptr : std::make_unique<Operator>(std::move(made));
    };
    const int64_t kind = input.between(0, 7), rank = input.between(1, 20);
    auto first = part(kind == 0 ? rank : num_outputs, num_inputs);
    if (kind > 1 || first == nullptr) return first;
    const auto second = part(num_outputs, kind == 0 ? rank : num_inputs);
    if (second == nullptr) return nullptr;
    try {
        return std::make_unique<Operator>(kind == 0 ? Operator::chain(*first, *second, 1)
                                                    : Operator::sum(*first, *second));
    } catch (const std::invalid_argument&) {
        return nullptr;  // a damaged weight has another shape
    }
}

void damage(Input& input, Request& request, std::vector<int64_t>& lengths) {
    const auto any_size = [&] { return std::max<int64_t>(0, matmul::wild_number(input)); };
    const auto axis = [&](size_t num_axes) { return static_cast<size_t>(input.bits(1)) % num_axes; };
    switch (input.between(0, 7)) {
        case 0: request.mode = static_cast<int>(input.between(-1, recurrent::kNumModes)); break;
        case 1: request.x[axis(3)] = any_size(); break;
        case 2: request.input_bias = any_size(); break;
        case 3: request.hidden_bias = any_size(); break;
        case 4: request.hidden[axis(2)] = any_size(); break;
        case 5:
            if (request.cell) (*request.cell)[axis(2)] = any_size();
            if (!request.cell || input.one_in(4)) request.cell = request.hidden;
            break;
        case 6: request.cell.reset(); break;
        default:
            if (!request.num_lengths || input.one_in(4)) lengths.resize(static_cast<size_t>(input.between(0, 40)));
            if (!lengths.empty()) lengths[axis(lengths.size())] = matmul::wild_number(input);
            request.num_lengths = static_cast<int64_t>(lengths.size());
    }
}

// What a call writes.
struct Found {
    Floats y, hidden, cell;
    bool operator==(const Found& other) const {
        const auto same = [](const Floats& a, const Floats& b) {
            return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
        };
        return same(y, other.y) && same(hidden, other.hidden) && same(cell, other.cell);
    }
};

void run(Input& input, Isa isa, const Request& request) {
    recurrent::Layer layer{};
    try {
        layer = recurrent::checked(request);
    } catch (const std::invalid_argument&) {
        return;
    }
    const int64_t num_gates = layer.meet_hidden->num_outputs(), num_outputs = layer.meet_hidden->num_inputs();
    const auto [num_steps, num_sequences, x_width] = request.x;
    const auto rows = static_cast<double>(num_steps) * static_cast<double>(num_sequences);
    if (static_cast<double>(num_steps) > 1e4 || static_cast<double>(num_sequences) > 1e4) return;
    if (rows * static_cast<double>(num_gates + num_outputs) > kMostFloats) return;
    if (rows * static_cast<double>(num_gates) * static_cast<double>(num_outputs) > kMostProducts) return;
    const auto floats = [&](int64_t count) { return fuzz::floats(input, count, false); };
    const int64_t width = layer.hidden_width();
    const Exact<float> x(floats(num_steps * num_sequences * x_width));
    const Exact<float> input_bias(floats(num_gates)), hidden_bias(floats(num_gates));
    const Floats hidden = floats(num_sequences * num_outputs);
    const Floats cell = request.cell ? floats(num_sequences * width) : Floats();
    if (request.input_bias) layer.input_bias = input_bias.data();
    if (request.hidden_bias) layer.hidden_bias = hidden_bias.data();
    const recurrent::Kernels& kernels = recurrent::find_kernels(matmul::name(isa));
    const bool reverse = input.one_in(2);
    Found expected;
    for (const int num_threads : {1, static_cast<int>(input.between(1, 4)), static_cast<int>(input.between(1, 4))}) {
        const auto num_results = static_cast<size_t>(num_steps * num_sequences * num_outputs);
        const Exact<float> y(Floats(num_results, 12345.0f)), state(hidden), cells(cell);
        common::set_num_threads(num_threads);
        recurrent::run(kernels, layer,
                       {num_steps, num_sequences, x.data(), request.lengths, reverse, state.data(),
                        request.cell ? cells.data() : nullptr, y.data()});
        const Found found{Floats(y.data(), y.data() + num_results), Floats(state.data(), state.data() + hidden.size()),
                          Floats(cells.data(), cells.data() + cell.size())};
        if (num_threads == 1) expected = found;
        if (!(found == expected)) fuzz::fail(std::string(matmul::name(isa)) + ": other bits with other threads");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const matmul::Machine machine;
    Input input(data, size);
    const Isa isa = machine.isas[static_cast<size_t>(input.bits(1)) % machine.isas.size()];
    const int mode = static_cast<int>(input.between(0, recurrent::kNumModes - 1));
    const bool is_lstm = mode == recurrent::kLstm, is_projected = is_lstm && input.one_in(2);
    const int64_t width = std::max<int64_t>(1, input.size(input.one_in(4) ? 140 : 40));
    const int64_t num_outputs = is_projected ? std::max<int64_t>(1, input.size(100)) : width;
    const int64_t num_gates = width * recurrent::count_gates(static_cast<recurrent::Mode>(mode));
    const auto meet_hidden = random_operator(input, machine, isa, num_gates, num_outputs);
    const auto project = is_projected ? random_operator(input, machine, isa, num_outputs, width) : nullptr;
    if (meet_hidden == nullptr || is_projected != (project != nullptr)) return 0;
    const int64_t num_steps = input.between(0, 9), num_sequences = input.pick<int64_t>({0, 1, 1, 2, 3, 7, 8, 17, 40});
    Request request{mode,
                    meet_hidden.get(),
                    project.get(),
                    {num_steps, num_sequences, num_gates},
                    {},
                    {},
                    {num_sequences, num_outputs},
                    {},
                    {},
                    nullptr};
    if (input.one_in(2)) request.input_bias = num_gates;
    if (input.one_in(2)) request.hidden_bias = num_gates;
    if (is_lstm) request.cell = {num_sequences, width};
    std::vector<int64_t> lengths;
    if (input.one_in(2)) {
        for (int64_t i = 0; i < num_sequences; ++i) lengths.push_back(input.between(0, num_steps));
        std::sort(lengths.begin(), lengths.end(), std::greater<>());
        request.num_lengths = num_sequences;
    }
    for (int64_t i = input.pick<int64_t>({0, 0, 0, 1, 2}); i > 0; --i) damage(input, request, lengths);
    const Exact<int64_t> exact(lengths);
    if (request.num_lengths) request.lengths = exact.data();
    run(input, isa, request);
    return 0;
}
