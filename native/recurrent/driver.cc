#include <algorithm>
#include <cstring>
#include <vector>

#include "common/pool.h"
#include "matmul/activations.h"
#include "ops/ops.h"
#include "recurrent/recurrent.h"

namespace rarefy::recurrent {
namespace {

// Products of a step below which one thread is faster: the outputs of another would have to come over for the gates.
constexpr int64_t kAloneProducts = 192 * 1024;
// Sequences of a thread that takes them through all steps, so that threads meet at the end alone.
constexpr int64_t kGroupSequences = 4;
// Gates below which another thread costs more than it saves: some us of one.
constexpr int64_t kChunkGates = 8 * 1024;

// Some sequences of a call.
struct Group {
    int64_t first, count;
};

// How many sequences of a group a step meets: the longest come first.
class Active {
public:
    Active(const Sequences& sequences, const Group& group)
        : lengths_(sequences.lengths == nullptr ? nullptr : sequences.lengths + group.first),
          size_(group.count),
          reverse_(sequences.reverse),
          count_(lengths_ == nullptr || !reverse_ ? size_ : 0) {}

    int64_t at(int64_t step) {
        if (lengths_ == nullptr) return size_;
        while (!reverse_ && count_ > 0 && lengths_[count_ - 1] <= step) --count_;
        while (reverse_ && count_ < size_ && lengths_[count_] > step) ++count_;
        return count_;
    }

private:
    const int64_t* lengths_;
    int64_t size_;
    bool reverse_;
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

void run_group(const Kernels& kernels, const Layer& layer, const Sequences& sequences, const Group& group) {
    const int64_t num_gates = layer.meet_hidden->num_outputs(), width = layer.hidden_width();
    const int64_t num_outputs = layer.meet_hidden->num_inputs(), num_sequences = group.count;
    thread_local matmul::Scratch scratch;
    const int64_t unprojected_floats = layer.project == nullptr ? 0 : num_sequences * width;
    auto* const recurrent = reinterpret_cast<float*>(
        scratch.reserve((num_sequences * num_gates + unprojected_floats + num_gates + width) * 4));
    float* const unprojected = recurrent + num_sequences * num_gates;
    float* const bias = unprojected + unprojected_floats;
    float* const hidden_bias = bias + num_gates;
    add_biases(layer, bias, hidden_bias);
    const auto run_gates = kernels.run[layer.mode];
    float* const state = sequences.hidden + group.first * num_outputs;
    float* const hidden = layer.project == nullptr ? state : unprojected;
    const std::vector<matmul::Target> meet_hidden = {{layer.meet_hidden, recurrent}};
    const std::vector<matmul::Target> project = {{layer.project, state}};
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkGates / num_gates);
    Active active(sequences, group);
    for (int64_t number = 0; number < sequences.num_steps; ++number) {
        const int64_t step = sequences.reverse ? sequences.num_steps - 1 - number : number;
        const int64_t num_rows = active.at(step), row = step * sequences.num_sequences + group.first;
        const float* const x = sequences.x + row * num_gates;
        float* const y = sequences.y + row * num_outputs;
        if (num_rows > 0) {
            matmul::multiply(state, num_rows, num_outputs, meet_hidden);
            common::parallel_for(static_cast<int>(matmul::ceil_div(num_rows, rows_per_chunk)), [&](int chunk) {
                const int64_t first = chunk * rows_per_chunk, count = std::min(rows_per_chunk, num_rows - first);
                float* const cell = layer.mode == kLstm ? sequences.cell + (group.first + first) * width : nullptr;
                run_gates({count, width, x + first * num_gates, recurrent + first * num_gates, bias, hidden_bias, cell,
                           hidden + first * width});
            });
            if (layer.project != nullptr) matmul::multiply(unprojected, num_rows, width, project);
            std::memcpy(y, state, static_cast<size_t>(num_rows * num_outputs) * sizeof(float));
        }
        std::fill(y + num_rows * num_outputs, y + num_sequences * num_outputs, 0.0f);
    }
    scratch.trim();
}

// 1 where threads are to meet in every step instead, or there is only one.
int64_t count_groups(const Layer& layer, const Sequences& sequences) {
    const int64_t num_threads = common::num_threads();
    if (num_threads == 1 || layer.meet_hidden->depends_on_rows()) return 1;
    if (layer.project != nullptr && layer.project->depends_on_rows()) return 1;
    // Sequences that differ in length are more work for the first groups than for the last.
    const int64_t wanted = sequences.lengths == nullptr ? num_threads : 2 * num_threads;
    return std::clamp<int64_t>(sequences.num_sequences / kGroupSequences, 1, wanted);
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
    const int64_t num_sequences = sequences.num_sequences;
    if (sequences.num_steps == 0 || num_sequences == 0) return;
    const int64_t products = layer.meet_hidden->num_outputs() * layer.meet_hidden->num_inputs();
    const int64_t num_groups = count_groups(layer, sequences);
    if (num_groups > 1) {
        common::parallel_for(static_cast<int>(num_groups), [&](int number) {
            const common::OneThread alone;
            const int64_t first = number * num_sequences / num_groups;
            run_group(kernels, layer, sequences, {first, (number + 1) * num_sequences / num_groups - first});
        });
    } else if (products < kAloneProducts / num_sequences) {
        const common::OneThread alone;
        run_group(kernels, layer, sequences, {0, num_sequences});
    } else {
        run_group(kernels, layer, sequences, {0, num_sequences});
    }
}

}  // namespace rarefy::recurrent
