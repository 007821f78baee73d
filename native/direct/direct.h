// Convolutions of few outputs in a group, depthwise ones above all, by packed weights: sums over taps of the image as
// it lies, without a matrix of patches. float32.
//
// A task decodes the numbers of a panel of outputs (matmul/decode.h), copies the channels that they see, padded, into
// memory of its own, and there every tap is a constant offset. Where every channel has one output and channels lie last
// many panels are decoded first, and the image is read where it lies:
//   y[output][place] = bias, and then in order over channels and taps: y = fma(x[place + offset of the tap], w, y)
// The order is that of Correlation or PixelRow and does not depend on the instruction set, the cut into tasks or the
// threads, so neither do the bits.
//
// kernels.inc holds the arithmetic once, in terms of the vectors of ops/vec_*.h; ref.cc, avx2.cc, avx512.cc and neon.cc
// compile it for one instruction set each. driver.cc makes the tasks.
#pragma once

#include <cstdint>

namespace rarefy::direct {

// Spatial axes. Those that a convolution lacks have size and kernel 1, in front.
constexpr int kAxes = 3;
// Outputs of a panel, as in matmul/contract.h.
constexpr int kPanel = 16;
// Kernels may read so many floats beyond what they use of a buffer.
constexpr int64_t kReadBeyond = 80;

// Taps of neighbouring rows of the image: row r and column k of the band lie at buffer + base + r * row_step +
// columns[k], counted from the output's place, and their weight is number first_weight + r * num_columns + k.
struct Band {
    int64_t base, num_rows, first_weight;
};

// Outputs that see the same channels, `num_rows` rows of `width` places.
struct Correlation {
    const float* buffer;
    int64_t row_step;  // in the buffer, from a row of outputs to the next
    const Band* bands;
    int64_t num_bands;
    const int64_t* columns;
    int64_t num_columns;
    const float* weights;  // (num_outputs, weight_stride)
    int64_t weight_stride;
    const float* starts;  // (num_outputs): what the sums begin with
    int64_t num_outputs, num_rows, width;
    float* y;  // of the first output
    int64_t y_output_step, y_row_step;
};

// Rows of places, each with one output of each channel; channels lie side by side. x may be in any alignment. Of groups
// of several channels what is a channel here is what an output sees of one of them, and taps are channels of taps.
struct PixelRows {
    const float* x;
    int64_t pixel_step;                 // numbers in x from pixel to pixel
    int64_t step, row_step;             // and from place to place, and from row to row
    const int64_t *taps, *tap_weights;  // where their numbers lie from x and from `weights`
    int64_t num_taps;
    int64_t run;           // so many taps at a time are pixels side by side, as the places are; 0: they need not be
    const float* weights;  // of 16 channels (some taps, 16), aligned to 64
    int64_t panel_step;    // in the weights, to the next 16 channels
    const float* starts;   // of all channels, and of those that would fill up the last 16
    int64_t num_rows, num_places, num_channels;
    float* y;
    int64_t y_step, y_row_step;
};

// Which channels of a pixel the 16 outputs of a panel see: the first `group_outputs` of them its first `group_channels`
// channels, and so on. group_outputs divides 16, group_channels is at most as many.
struct Spread {
    int64_t group_channels, group_outputs, num_outputs;

    int64_t num_channels() const { return num_outputs / group_outputs * group_channels; }
};

struct Kernels {
    void (*correlate)(const Correlation&);
    void (*accumulate)(const PixelRows&);
    // to[i] = from[i * step]; nothing is read behind the last one.
    void (*gather)(const float* from, int64_t step, int64_t count, float* to);
    // Of pixels `step` apart: for each channel of a group 16 numbers, which the outputs see, with zeros behind.
    void (*gather_pixels)(const float* from, int64_t step, const Spread& spread, int64_t count, float* to);
};

extern const Kernels kRefKernels;
#if RAREFY_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif RAREFY_ARM
extern const Kernels kNeonKernels;
#endif

}  // namespace rarefy::direct
