// All steps of a recurrent layer in one direction: the product with the hidden state, the gates, the next state.
//
// Shapes: L steps, B sequences, H hidden units, G gates times H (LSTM 4: i, f, g, o; GRU 3: r, z, n; plain 1), O what a
// step hands on: H, or of an LSTM with a projection its outputs. float32, row-major.
//
// With x of a step, biases b of the input's product and c of the state's, and u = h W^T (one `matmul::multiply`):
//   LSTM   s = (x + (b + c)) + u;  cell = sigmoid(f) cell + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(cell), projected
//   GRU    r, z as sigmoids of s;  n = tanh((x + b) + r (u + c));                h = n + z (h - n)
//   plain  h = tanh(s) or max(0, s)
// The bits do not depend on the number of threads, nor on the other sequences of a call where those of the products do
// not. Instruction sets differ by float32 rounding as in native/ops: the reference does not fuse multiply and add.
#pragma once

#include <cstdint>

#include "matmul/operators.h"
#include "recurrent/gates.h"

namespace rarefy::recurrent {

inline int64_t count_gates(Mode mode) { return mode == kLstm ? 4 : mode == kGru ? 3 : 1; }

// Those of an instruction set; throws std::invalid_argument where this build or CPU has none.
const Kernels& find_kernels(const char* isa);

struct Layer {
    Mode mode;
    const matmul::Operator* meet_hidden;    // (G, O)
    const matmul::Operator* project;        // (O, H) of an LSTM, else null
    const float *input_bias, *hidden_bias;  // (G), or null
    int64_t hidden_width() const { return meet_hidden->num_outputs() / count_gates(mode); }
};

struct Sequences {
    int64_t num_steps, num_sequences;
    const float* x;          // (L, B, G): the products with the inputs
    const int64_t* lengths;  // (B) in [0, L], the longest first; null: all have L steps
    bool reverse;            // from a sequence's last step to its first
    float* hidden;           // (B, O): the state before, and after the call that behind the last step
    float* cell;             // (B, H) of an LSTM, likewise
    float* y;                // (L, B, O): what each step hands on, zeros behind the end of a sequence
};

// Every shape is checked by the caller, and H and O are not 0.
void run(const Kernels&, const Layer&, const Sequences&);

}  // namespace rarefy::recurrent
