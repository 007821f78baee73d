#include "recurrent/request.h"

#include <stdexcept>

namespace rarefy::recurrent {
namespace {

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Layer checked(const Request& request) {
    require(0 <= request.mode && request.mode < kNumModes, "unknown mode of a recurrent layer");
    const Layer layer{static_cast<Mode>(request.mode), request.meet_hidden, request.project, nullptr, nullptr};
    const bool is_lstm = layer.mode == kLstm;
    const int64_t num_gates = layer.meet_hidden->num_outputs(), num_outputs = layer.meet_hidden->num_inputs();
    const int64_t width = layer.hidden_width();
    require(width > 0 && num_gates == width * count_gates(layer.mode) && num_outputs > 0,
            "the recurrent weight has no outputs for each gate, or no inputs");
    require(layer.project == nullptr
                ? num_outputs == width
                : is_lstm && layer.project->num_outputs() == num_outputs && layer.project->num_inputs() == width,
            "the recurrent weight, the projection and the mode do not fit");
    const auto [num_steps, num_sequences, x_width] = request.x;
    require(x_width == num_gates, "x must be as wide as the recurrent weight has outputs");
    for (const std::optional<int64_t>& bias : {request.input_bias, request.hidden_bias})
        require(!bias || *bias == num_gates, "a bias must have one value for each output of the recurrent weight");
    require(request.cell.has_value() == is_lstm, "an LSTM has cells, and nothing else has");
    require(request.hidden == std::array<int64_t, 2>{num_sequences, num_outputs} &&
                (!is_lstm || *request.cell == std::array<int64_t, 2>{num_sequences, width}),
            "a state has another shape than the layer's");
    if (!request.num_lengths) return layer;
    require(*request.num_lengths == num_sequences, "each sequence must have a length");
    int64_t longest = num_steps;
    for (int64_t i = 0; i < num_sequences; ++i) {
        const int64_t length = request.lengths[i];
        require(0 <= length && length <= longest, "lengths must not rise, nor exceed the steps");
        longest = length;
    }
    return layer;
}

}  // namespace rarefy::recurrent
