// Tiles whose sums never leave the registers, of bytes with one zero point and one scale for each output.
//
// A store of a register and a product compete on Zen 4: `vpdpbusd` reads three registers, and each store of 64 bytes
// takes about one product's time from it. Tiles of 8 rows by two panels add the scaled sums of a block to 16 totals, of
// which more than half lie on the stack. With 6 rows 12 totals have registers besides 12 sums of a block. Panels are
// then read for more tiles, so that they must be near.
#pragma once

#include "matmul/rows_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kHeldRows = 6;
constexpr int64_t kFewestHeldRows = 32;
constexpr int64_t kHeldRowsPerBlock = 4;  // the longer the panels, the longer takes the first tile, which fetches them

// The compiler knows nothing of it any more, so that it computes it where it is needed. There are as many vectors as
// registers, and those that are to hold addresses would go to the stack too.
template <class T>
inline T hidden(T value) {
    __asm__("" : "+r"(value));
    return value;
}

// kRows rows by the codes of a pair of panels; kFetches: these come from farther than the L2 cache.
template <int kRows, bool kFetches>
inline void add_held_tile(const Tiles& tiles, const uint8_t* first, const uint8_t* second) {
    const Tiles* t = &tiles;
    __m512 totals[kRows][kPair];
    UNROLL for (int p = 0; p < kPair; ++p) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            fetch_output(t->y[p] + r * t->y_stride);
            totals[r][p] = _mm512_setzero_ps();
        }
    }
    const float* row_scales = t->row_scales;
    const int32_t* byte_starts = t->byte_starts;
    const int8_t* q = t->q;
    const int8_t* const end = q + t->num_segments * kBlockInputs;
    const int64_t q_stride = hidden(t->q_stride), blocks_stride = hidden(t->num_blocks);
    do {
        const int64_t num_blocks = hidden(blocks_stride);
        Sums dots[kRows][kPair];
        UNROLL for (int r = 0; r < kRows; ++r) {
            dots[r][0] = dots[r][1] = reinterpret_cast<Sums>(_mm512_set1_epi32(byte_starts[r * num_blocks]));
        }
        const int8_t* const block_end = q + kBlockInputs;
        do {
            UNROLL for (int step = 0; step < 2; ++step, q += 4, first += 64, second += 64) {
                if (kFetches) {
                    prefetch<2048>(first, 64);
                    prefetch<2048>(second, 64);
                }
                const __m512i codes[kPair] = {load(first), load(second)};
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512i columns = broadcast_4(q + r * q_stride);
                    UNROLL for (int p = 0; p < kPair; ++p) { dots[r][p] = dot_4(dots[r][p], codes[p], columns); }
                }
            }
        } while (q != block_end);
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m512 row_scale = _mm512_set1_ps(row_scales[r * num_blocks]);
            UNROLL for (int p = 0; p < kPair; ++p) {
                totals[r][p] = _mm512_fmadd_ps(to_floats(dots[r][p]), row_scale, totals[r][p]);
            }
        }
        ++row_scales;
        ++byte_starts;
    } while (q != end);
    t = hidden(t);
    const int64_t y_stride = t->y_stride;
    UNROLL for (int p = 0; p < kPair; ++p) {
        const __m512 factor = _mm512_load_ps(t->factors[p]);
        const __mmask16 lanes = t->lanes[p];
        float* y = t->y[p];
        UNROLL for (int r = 0; r < kRows; ++r, y += y_stride) {
            _mm512_mask_storeu_ps(y, lanes, _mm512_mul_ps(totals[r][p], factor));
        }
    }
}

template <int kRows>
void held_rows(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t num_tiles, int64_t panel,
               int64_t distance, Ahead& ahead) {
    const uint8_t* const first = w.values + w.value_offsets[panel];
    const uint8_t* const second = w.values + w.value_offsets[panel + distance];
    Tiles tiles(w, rows, part, row, {panel, distance, 0, w.num_blocks}, 1, true, ahead);
    for (int64_t tile = 0; tile < num_tiles; ++tile, tiles.advance(kRows)) {
        if (ahead.is_first())
            add_held_tile<kRows, true>(tiles, first, second);
        else
            add_held_tile<kRows, false>(tiles, first, second);
        ahead.fetch_share();
    }
}

// Whether the walk below is for this weight and part. A segment is to be a block: halves are scaled one by one, even
// where one scale is that of all.
inline bool holds_tiles(const PanelWeights& w, const Part& part) {
    const int64_t num_rows = part.row_end - part.row_begin;
    return num_rows >= kFewestHeldRows && num_rows >= kHeldRowsPerBlock * w.num_blocks && w.steps_per_segment == 16 &&
           w.zero_points == nullptr && w.zero_point == kByteZeroPoint && w.output_scales != nullptr;
}

// Evenly split, so many rows are tiles of 5 or 6.
inline void walk_held_tiles(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr TilesFunction kFunctions[] = {held_rows<kHeldRows - 1>, held_rows<kHeldRows>};
    walk_pairs<kHeldRows>(
        w, part, [&](int64_t row, int64_t count, int64_t tiles, int64_t panel, int64_t distance, Ahead& ahead) {
            kFunctions[count - (kHeldRows - 1)](w, rows, part, row, tiles, panel, distance, ahead);
        });
}

}  // namespace rarefy::matmul::avx512
