#include <algorithm>
#include <cstring>
#include <vector>

#include "common/pool.h"
#include "matmul/activations.h"
#include "ops/ops.h"
#include "recurrent/recurrent.h"

namespace rarefy::recurrent {
namespace {

// Gates below which another thread costs more than it saves: some us of one.
constexpr int64_t kChunkGates = 8 * 1024;

// How many sequences a step meets: the longest come first.
class Active {
public:
    explicit Active(const Sequences& sequences)
        : sequences_(sequences), count_(sequences.reverse ? 0 : sequences.num_sequences) {}

    int64_t at(int64_t step) {
        if (sequences_.lengths == nullptr) return sequences_.num_sequences;
        while (!sequences_.reverse && count_ > 0 && sequences_.lengths[count_ - 1] <= step) --count_;
        while (sequences_.reverse && count_ < sequences_.num_sequences && sequences_.lengths[count_] > step) ++count_;
        return count_;
    }

private:
    const Sequences& sequences_;
    int64_t count_;
};

// What the gates add, in one vector: of a GRU's n without the state's bias, which a gate multiplies.
void add_biases(const Layer& layer, float* bias, float* hidden_bias) {
    const int64_t num_gates = layer.meet_hidden->num_outputs(), width = layer.hidden_width();
    const int64_t common = layer.mode == kGru ? 2 * width : num_gates;
    const auto at = [](const float* vector, int64_t i) { return vector == nullptr ? 0.0f : vector[i]; };
    for (int64_t i = 0; i < num_gates; ++i)
        bias[i] = at(layer.input_bias, i) + (i < common ? at(layer.hidden_bias, i) : 0.0f);
    for (int64_t i = common; i < num_gates; ++i) hidden_bias[i - common] = at(layer.hidden_bias, i);
}

}  // namespace

const Kernels& find_kernels(const char* isa) {
    switch (ops::find_vectors(isa)) {
#if RAREFY_X86
        case ops::Vectors::avx512: return kAvx512Kernels;
        case ops::Vectors::avx2: return kAvx2Kernels;
#elif RAREFY_ARM
        case ops::Vectors::neon: return kNeonKernels;
#endif
        default: return kRefKernels;
    }
}

void run(const Kernels& kernels, const Layer& layer, const Sequences& sequences) {
    const int64_t num_gates = layer.meet_hidden->num_outputs(), width = layer.hidden_width();
    const int64_t num_outputs = layer.meet_hidden->num_inputs(), num_sequences = sequences.num_sequences;
    if (sequences.num_steps == 0 || num_sequences == 0) return;
    thread_local matmul::Scratch scratch;
    const int64_t state_floats = layer.project == nullptr ? 0 : num_sequences * width;
    auto* recurrent =
        reinterpret_cast<float*>(scratch.reserve((num_sequences * num_gates + state_floats + num_gates + width) * 4));
    float* const unprojected = recurrent + num_sequences * num_gates;
    float* const bias = unprojected + state_floats;
    float* const hidden_bias = bias + num_gates;
    add_biases(layer, bias, hidden_bias);
    const auto run_gates = kernels.run[layer.mode];
    float* const hidden = layer.project == nullptr ? sequences.hidden : unprojected;
    const std::vector<matmul::Target> meet_hidden = {{layer.meet_hidden, recurrent}};
    const std::vector<matmul::Target> project = {{layer.project, sequences.hidden}};
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkGates / num_gates);
    Active active(sequences);
    for (int64_t number = 0; number < sequences.num_steps; ++number) {
        const int64_t step = sequences.reverse ? sequences.num_steps - 1 - number : number;
        const int64_t num_rows = active.at(step);
        const float* const x = sequences.x + step * num_sequences * num_gates;
        float* const y = sequences.y + step * num_sequences * num_outputs;
        if (num_rows > 0) {
            matmul::multiply(sequences.hidden, num_rows, num_outputs, meet_hidden);
            common::parallel_for(static_cast<int>(matmul::ceil_div(num_rows, rows_per_chunk)), [&](int chunk) {
                const int64_t first = chunk * rows_per_chunk, count = std::min(rows_per_chunk, num_rows - first);
                float* const cell = layer.mode == kLstm ? sequences.cell + first * width : nullptr;
                run_gates({count, width, x + first * num_gates, recurrent + first * num_gates, bias, hidden_bias, cell,
                           hidden + first * width});
            });
            if (layer.project != nullptr) matmul::multiply(unprojected, num_rows, width, project);
            std::memcpy(y, sequences.hidden, static_cast<size_t>(num_rows * num_outputs) * sizeof(float));
        }
        std::fill(y + num_rows * num_outputs, y + num_sequences * num_outputs, 0.0f);
    }
    scratch.trim();
}

}  // namespace rarefy::recurrent
