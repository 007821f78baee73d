// Makes row panels with AVX-512.
#include "matmul/row_panels.h"

#include "matmul/transpose_avx512.h"

namespace rarefy::matmul {

void make_code_blocks_avx512(const Rows& rows, int64_t row_panel, CodeBlock* blocks) {
    using namespace avx512;
    const int64_t row = row_panel * kPanelRows, num_row_panels = rows.num_rows / kPanelRows;
    const auto distance = static_cast<int>(rows.num_blocks);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(distance));
    const __m512i sum_places = _mm512_slli_epi32(places, 1);
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
        CodeBlock& out = blocks[block * num_row_panels + row_panel];
        __m512i q[kPanelRows];
        UNROLL for (int r = 0; r < kPanelRows; ++r) {
            q[r] = load(rows.q + (row + r) * rows.stride + block * kBlockInputs);
        }
        transpose(q);
        UNROLL for (int step = 0; step < kPanelRows; ++step) { _mm512_store_si512(out.q[step], q[step]); }
        const int64_t at = row * rows.num_blocks + block;
        _mm512_store_ps(out.scales, _mm512_i32gather_ps(places, rows.scales + at, 4));
        UNROLL for (int half = 0; half < 2; ++half) {
            _mm512_store_si512(out.sums[half], _mm512_i32gather_epi32(sum_places, rows.sums + 2 * at + half, 4));
        }
    }
}

void make_pair_blocks_avx512(const Rows& rows, int64_t row_panel, PairBlock* blocks) {
    using namespace avx512;
    const int64_t num_row_panels = rows.num_rows / kPanelRows;
    const uint16_t* x = rows.bf16_x + row_panel * kPanelRows * rows.stride;
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
        PairBlock& out = blocks[block * num_row_panels + row_panel];
        for (int half = 0; half < 2; ++half) {
            __m512i pairs[kPanelRows];
            UNROLL for (int r = 0; r < kPanelRows; ++r) {
                pairs[r] = load(x + r * rows.stride + block * kBlockInputs + half * (kBlockInputs / 2));
            }
            transpose(pairs);
            UNROLL for (int i = 0; i < kPanelRows; ++i) { _mm512_store_si512(out.x[half * kPanelRows + i], pairs[i]); }
        }
    }
}

}  // namespace rarefy::matmul
