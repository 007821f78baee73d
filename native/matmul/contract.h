// y = x W^T: the contract between the packing of weights, the dispatcher (dispatch.cc) and every kernel.
//
// Shapes: T rows of activations, O outputs, I inputs.
//
// A weight is cut into panels of 16 outputs (lane = output within the panel) and a panel into blocks of 64 inputs.
// Outputs and inputs are padded; padded inputs meet activations that are 0, padded outputs are not stored. What the
// bytes of a block are is the encoding's business: the head of its file in encodings/ says it. Most cut a block into
// steps, each of which expands to one vector of 64 bytes with 16 lanes of 32 bits:
//   float32        64 steps of 1 column
//   bfloat16       32 steps of 2 columns (the even one in the low half of the lane)
//   integer codes  16 steps of 4 columns (in the order of the lane's bytes)
//
// Activations that meet bfloat16 weights are rounded to bfloat16 first (kernels.h), those that meet other floats are
// not. Integer weights are unsigned codes; value = scale * (code - zero_point). Activations are quantized per row and
// block of 64 columns to [-127, 127] (kernels.h). A segment is the part of a block that lies in one weight group: the
// whole block, or each half where the group size is an odd multiple of 32. Every kernel computes
//   y = sum over segments, in order:  y = fma(float(sum code * q - zero_point * sum q), s_block * scale, y)
// or, where there are output_scales, with 1 for the scale, and then y = y * output scale,
// and float kernels
//   y = sum over blocks, in order:    y = y + (sum over columns 1, 0, 3, 2, ... 63, 62:    part = fma(x, w, part))
// or, where they have scales (lookup tables), over halves of blocks: y = fma(sum over 32 columns ..., scale, y),
// so all kernels of an encoding give the same bits, for every number of rows and threads. The odd column of two comes
// first because vdpbf16ps, which does two of these steps at once, takes it first. Three exceptions: vdpbf16ps and AMX
// count weights and sums of bfloat16 products below 2^-126 as zero; the float reference emulates fma in double
// precision and may differ in the last bit where that rounds twice; AMX sums many rows of bfloat16 weights in an order
// of its own (core_amx.h).
#pragma once

#include <cstdint>

namespace rarefy::matmul {

constexpr int kPanelOutputs = 16;
constexpr int kBlockInputs = 64;
// Rows of a Part at most: enough to pay for reading and expanding a panel.
constexpr int64_t kTaskRows = 128;
// Of codes of 8 bits without zero points of their own; of narrower ones it is a smaller power of two.
constexpr int kByteZeroPoint = 128;
// Kernels may read so many bytes beyond the end of each piece of memory that a weight allocates, and prefetch anywhere.
constexpr int kReadBeyond = 64;

// A repacked weight as the kernels see it. All pointers stay owned by Weights; null where the encoding has no use.
struct PanelWeights {
    int64_t num_outputs, num_inputs;
    int64_t num_panels, num_blocks;
    const uint8_t* values;         // aligned to 64, as is the first value of each panel
    const int64_t* value_offsets;  // bytes from `values` to each panel, (num_panels + 1)
    const uint8_t* mask;           // free for the encoding: its file says what it is
    // Of weights with scales: 16 of each group as bfloat16 bits, and the group's 16 zero points behind them, or null:
    // all are `zero_point`. (num_panels, num_groups) such pieces of group_bytes, group_stride and panel_stride bytes
    // apart; the pointers are at the first.
    const uint16_t* scales;
    const uint8_t* zero_points;
    // Where an output has one scale: (num_panels, 16), which finished sums are multiplied by, and `scales` are 1. Else
    // null.
    const uint16_t* output_scales;
    int64_t num_groups, group_bytes, group_stride, panel_stride;
    int64_t segments_per_group;
    int steps_per_segment;  // 16: a segment is a block; 8: half a block
    int zero_point;
    // Free for each encoding: its file says what they hold.
    const uint8_t* extra;          // more of each panel, aligned to 64
    const int64_t* extra_offsets;  // bytes from `extra` to each panel, (num_panels + 1)
    const uint8_t* table;          // what all panels share, aligned to 64
    int64_t parameter;
    int64_t lane_rows;  // so many rows or more are read from Rows::lanes; 0: never
    bool skips_blocks;  // kernels pass over blocks that are zero, and begin every sum with Rows::starts

    int64_t group_place(int64_t panel, int64_t group) const { return panel * panel_stride + group * group_stride; }
    const uint16_t* scales_at(int64_t place) const {
        return reinterpret_cast<const uint16_t*>(reinterpret_cast<const uint8_t*>(scales) + place);
    }
};

// Activations as the kernels see them, padded with zeros to whole blocks.
struct Rows {
    int64_t num_rows;
    int64_t stride;          // elements from row to row of x, bf16_x, q and wide_q
    const float* x;          // float kernels; of bfloat16 weights: rounded to it, and null from avx512_bf16 on
    const uint16_t* bf16_x;  // the rounded ones as they are; null before avx512
    const int8_t* q;         // integer kernels
    const int16_t* wide_q;   // codes of more than 4 bits on AVX2: per step the columns 0, 2, 1, 3
    const float* scales;     // (num_rows, num_blocks)
    const int32_t* sums;     // sum of q per half block, (num_rows, num_blocks, 2)
    int64_t num_blocks;
    const float* starts;  // (num_rows): 0, or NaN where a row holds a NaN or an infinity; for weights that skip blocks
    const void* row_panels;  // row_panels.h; null where no kernel reads them
    // From avx512 on, else null: -kByteZeroPoint times the sum of q per block, (num_rows, num_blocks).
    const int32_t* byte_starts;
    const uint8_t* lanes;  // row_panels.h; null where no kernel reads them
};

// Outputs [16 * panel_begin, 16 * panel_end) of rows [row_begin, row_end), of which the first is a multiple of 32; y is
// (T, O) with the given row stride. Where `distance` is not 0, which is for one row and from avx512 on, also those of
// the panels so much further, in the same walk.
struct Part {
    int64_t panel_begin, panel_end;
    int64_t row_begin, row_end;
    float* y;
    int64_t y_stride;
    int64_t distance;
};

// Whether kernels ask for what they will read next, or leave that to the hardware, which some processors do better
// (cpu.h). It changes no bit.
extern bool fetches_ahead;

// There is at least one block of inputs, one panel and one row.
using KernelFunction = void (*)(const PanelWeights&, const Rows&, const Part&);

}  // namespace rarefy::matmul
