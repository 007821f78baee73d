// Activations of 16 rows side by side, as weights have panels of 16 outputs: for kernels whose vectors hold rows.
// There, one weight is broadcast for many rows; where vectors hold outputs, every activation is.
#pragma once

#include "matmul/contract.h"

namespace rarefy::matmul {

constexpr int kPanelRows = 16;

// A block of 64 columns of a row panel. All blocks of a column stand side by side: the one of row panel p and block b
// is number b * (num_rows / 16) + p. Rows beyond the last whole panel are in none.
struct CodeBlock {
    int8_t q[kBlockInputs / 4][kPanelRows][4];
    float scales[kPanelRows];
    int32_t sums[2][kPanelRows];  // of each half
};
static_assert(sizeof(CodeBlock) % 64 == 0);

// The same of bfloat16, in pairs of columns.
struct PairBlock {
    uint16_t x[kBlockInputs / 2][kPanelRows][2];
};
static_assert(sizeof(PairBlock) % 64 == 0);

// The same for AVX2: blocks of 64 columns, and of a column all rows side by side, whole lanes of them. The codes are q
// + 128, of 32 rows in the order in which vpunpck and vpmaddubsw make vectors of 8 rows of them: 0-3, 8-11, 16-19,
// 24-27, 4-7, 12-15, 20-23, 28-31. Behind those of a block are the scales of its rows, in order.
constexpr int kLaneRows = 32;
// From column to column. An odd number of lines where there are many, so that columns do not displace each other.
constexpr int64_t lane_stride(int64_t num_rows) {
    const int64_t lanes = (num_rows + kLaneRows - 1) / kLaneRows * kLaneRows;
    return lanes <= kTaskRows ? lanes : lanes / 64 / 2 * 128 + 64 + (lanes % 128 > 64 ? 128 : 0);
}
constexpr int64_t code_lanes_bytes(int64_t stride) { return stride * (kBlockInputs + 4); }  // of a block
// Those of bfloat16 are floats, in order.
constexpr int64_t float_lanes_bytes(int64_t stride) { return stride * kBlockInputs * 4; }

#if RAREFY_X86
// 32 rows of all blocks, from `row` on.
void make_code_lanes_avx2(const Rows& rows, int64_t row, uint8_t* lanes);
void make_float_lanes_avx2(const Rows& rows, int64_t row, uint8_t* lanes);
// All blocks of one row panel.
void make_code_blocks_avx512(const Rows& rows, int64_t row_panel, CodeBlock* blocks);
void make_pair_blocks_avx512(const Rows& rows, int64_t row_panel, PairBlock* blocks);
#endif

}  // namespace rarefy::matmul
