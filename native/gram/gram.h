// The Gram matrix of calibration: total += x^T x for bfloat16 activations, summed in float32.
//
// x: bfloat16 bits, row-major (T, I), T tokens of I features. total: float32, row-major (I, I).
// Entries on and above the diagonal get the sum; of those below, some near the diagonal do too (tiles are computed
// whole) and the others are left as they are. A product of two bfloat16 numbers is exact in float32; subnormal inputs
// count as zero. Every entry is summed in the order of the tokens, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace rarefy::gram {

// Columns of a panel and rows of a tile: 8 x 48 sums fill 24 of the 32 vector registers.
constexpr int kPanel = 48;
constexpr int kTileRows = 8;
// Tokens per pass: a panel of them is 24 KiB and stays in the first-level cache.
constexpr int64_t kTokens = 256;

// Whether this CPU multiplies bfloat16 vectors. There is no kernel for others: torch's float32 product serves them.
bool can_run();

void add(const uint16_t* x, int64_t num_tokens, int64_t num_features, float* total);

namespace avx512 {
// Interleaves tokens in pairs: packed[h][c] holds tokens 2h (low half) and 2h + 1 of one panel's column c.
void pack_panel(const uint16_t* x, int64_t num_tokens, int64_t num_features, int64_t first_column, uint32_t* packed);
// Adds one tile: rows x columns entries at `total`, from `num_pairs` token pairs of two panels.
void add_tile(const uint32_t* left, const uint32_t* right, int64_t num_pairs, float* total, int64_t stride, int rows,
              int columns);
}  // namespace avx512

}  // namespace rarefy::gram
