// The gates of one step of a recurrent layer, a table of functions per instruction set; recurrent.h has the formulas.
#pragma once

#include <cstdint>

namespace rarefy::recurrent {

// Numbers as in rarefy.kernels.recurrent.MODES.
enum Mode : int { kLstm = 0, kGru = 1, kTanh = 2, kRelu = 3, kNumModes = 4 };

// One step of some sequences, when the state has met its weight.
struct Gates {
    int64_t num_rows, width;   // of sequences, H
    const float* x;            // (rows, G)
    const float* recurrent;    // (rows, G)
    const float* bias;         // (G)
    const float* hidden_bias;  // (H): of a GRU what n's gate multiplies with
    float* cell;               // (rows, H) of an LSTM, in place
    float* hidden;             // (rows, H); of a GRU the state before, in place
};

// One table per instruction set; its functions are single-threaded.
struct Kernels {
    void (*run[kNumModes])(const Gates&);
};

extern const Kernels kRefKernels;
#if RAREFY_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif RAREFY_ARM
extern const Kernels kNeonKernels;
#endif

}  // namespace rarefy::recurrent
