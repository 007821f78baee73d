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

#if RAREFY_X86
// All blocks of one row panel.
void make_code_blocks_avx512(const Rows& rows, int64_t row_panel, CodeBlock* blocks);
void make_pair_blocks_avx512(const Rows& rows, int64_t row_panel, PairBlock* blocks);
#endif

}  // namespace rarefy::matmul
