// Many rows in one go: what quantize_row_avx512 (kernels.h) does with each.
#pragma once

#include <cstdint>

namespace rarefy::matmul {

#if RAREFY_X86
// Rows of whole blocks that lie side by side, to rows of q that are `stride` apart; and Rows::byte_starts of them,
// unless null.
void quantize_rows_avx512(const float* x, int64_t num_rows, int64_t num_blocks, int8_t* q, int64_t stride,
                          float* scales, int32_t* sums, int32_t* byte_starts);
#endif

}  // namespace rarefy::matmul
