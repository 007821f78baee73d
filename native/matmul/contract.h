// y = x W^T: the contract between the repacking (weights.cc), the dispatcher (dispatch.cc) and every kernel.
//
// Shapes: T rows of activations, O outputs, I inputs.
//
// A weight is cut into panels of 16 outputs; a panel into blocks of 64 inputs; a block into steps, each holding one
// vector of 64 bytes with 16 lanes of 32 bits, lane = output within the panel:
//   float32        64 steps of 1 column
//   bfloat16       32 steps of 2 columns (the even one in the low half of the lane)
//   8-bit codes    16 steps of 4 columns (in the order of the lane's bytes)
//   4-bit codes     8 vectors, each for two of these steps: low nibbles are step 2j, high nibbles are step 2j + 1
// Outputs and inputs are padded with zeros; padded inputs meet activations that are 0, padded outputs are not stored.
//
// Under a mask a step has one bit per element, in the order above (128 bytes per block), and the values of a panel are
// a stream of the kept elements in the order of the bits. 4-bit codes: two streams in the same bytes, the low nibbles
// for all even steps of the panel and the high nibbles for all odd ones, each from the first byte on.
//
// Integer weights are unsigned codes; value = scale * (code - zero_point). Activations are quantized per row and block
// of 64 columns to [-127, 127] (quantize.h). A segment is the part of a block that lies in one weight group: the whole
// block, or each half where the group size is an odd multiple of 32. Every kernel computes
//   y = sum over segments, in order:  y = fma(float(sum code * q - zero_point * sum q), s_block * scale, y)
// and float kernels
//   y = sum over blocks, in order:    y = y + (sum over columns, in order: part = fma(x, w, part))
// so all kernels of an encoding give the same bits, for every number of rows and threads. (The float reference emulates
// fma in double precision and may differ in the last bit where that rounds twice.)
#pragma once

#include <cstdint>

namespace rarefy::matmul {

constexpr int kPanelOutputs = 16;
constexpr int kBlockInputs = 64;
constexpr int kMaskBytes = 128;  // of one block of one panel
// Kernels may read so many bytes beyond the last value of a panel, and prefetch anywhere.
constexpr int kReadBeyond = 64;

// A repacked weight as the kernels see it. All pointers stay owned by Weights.
struct PanelWeights {
    int64_t num_outputs, num_inputs;
    int64_t num_panels, num_blocks;
    const uint8_t* values;         // aligned to 64, as is the first value of each panel
    const int64_t* value_offsets;  // bytes from `values` to each panel, (num_panels + 1)
    const uint8_t* mask;           // (num_panels, num_blocks, kMaskBytes) or null
    // Integers only.
    const uint16_t* scales;      // bfloat16 bits, (num_panels, num_groups, 16)
    const uint8_t* zero_points;  // (num_panels, num_groups, 16), or null: all are `zero_point`
    int64_t num_groups;
    int64_t segments_per_group;
    int steps_per_segment;  // 16: a segment is a block; 8: half a block
    int zero_point;
};

// Activations as the kernels see them, padded with zeros to whole blocks.
struct Rows {
    int64_t num_rows;
    int64_t stride;         // elements from row to row of x, q and wide_q
    const float* x;         // float kernels
    const int8_t* q;        // integer kernels
    const int16_t* wide_q;  // 8-bit codes on AVX2: per step the columns 0, 2, 1, 3
    const float* scales;    // (num_rows, num_blocks)
    const int32_t* sums;    // sum of q per half block, (num_rows, num_blocks, 2)
    int64_t num_blocks;
};

// Outputs [16 * panel_begin, 16 * panel_end) of rows [row_begin, row_end); y is (T, O) with the given row stride.
struct Part {
    int64_t panel_begin, panel_end;
    int64_t row_begin, row_end;
    float* y;
    int64_t y_stride;
};

// There is at least one block of inputs, one panel and one row.
using KernelFunction = void (*)(const PanelWeights&, const Rows&, const Part&);

}  // namespace rarefy::matmul
