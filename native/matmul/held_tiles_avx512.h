// Tiles whose sums never leave the registers: of bytes with one zero point and one scale for each output, and of
// nibbles.
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

// The compiler knows nothing of it any more, so that it computes it where it is needed. There are as many vectors as
// registers, and those that are to hold addresses would go to the stack too.
template <class T>
inline T hidden(T value) {
    __asm__("" : "+r"(value));
    return value;
}

// What the panels hold, two steps at a time: bytes of outputs with one scale, and nibbles whose groups have scales.
struct HeldBytes {
    static constexpr bool kScaled = false;
    static constexpr int kBytes = 128, kStartShift = 0;
    // The longer the panels, the longer takes the first tile, which fetches them.
    static constexpr int64_t kFewestRowsPerBlock = 4;
    static __m512i codes(const uint8_t* from, int step) { return load(from + 64 * step); }
};
struct HeldNibbles {
    static constexpr bool kScaled = true;
    static constexpr int kBytes = 64, kStartShift = 4;
    static constexpr int64_t kFewestRowsPerBlock = 0;
    static __m512i codes(const uint8_t* from, int step) {
        const __m512i both = load(from);
        return _mm512_and_si512(step == 0 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(0x0f));
    }
};

// kRows rows by the codes of a pair of panels; kSymmetric: all zero points are the same; kFetches: these codes come
// from farther than the L2 cache.
template <class Codes, int kRows, bool kSymmetric, bool kFetches>
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
    const int32_t* starts = kSymmetric ? t->byte_starts : t->half_sums;
    const int8_t* q = t->q;
    const int8_t* const end = q + t->num_segments * kBlockInputs;
    const int64_t q_stride = hidden(t->q_stride), blocks_stride = hidden(t->num_blocks);
    Groups groups = t->groups;
    do {
        const int64_t num_blocks = hidden(blocks_stride);
        Sums dots[kRows][kPair];
        if constexpr (kSymmetric) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512i start = _mm512_set1_epi32(starts[r * num_blocks]);
                dots[r][0] = dots[r][1] = reinterpret_cast<Sums>(_mm512_srai_epi32(start, Codes::kStartShift));
            }
        } else {
            UNROLL for (int p = 0; p < kPair; ++p) {
                const __m512i zero_points = groups.zero_points(t->panel + p * t->distance);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    dots[r][p] = times(zero_points, -segment_sum<16>(starts + r * num_blocks * 2, 0));
                }
            }
        }
        const int8_t* const block_end = q + kBlockInputs;
        do {
            if (kFetches) {
                prefetch<2048>(first, Codes::kBytes);
                prefetch<2048>(second, Codes::kBytes);
            }
            UNROLL for (int step = 0; step < 2; ++step, q += 4) {
                const __m512i codes[kPair] = {Codes::codes(first, step), Codes::codes(second, step)};
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512i columns = broadcast_4(q + r * q_stride);
                    UNROLL for (int p = 0; p < kPair; ++p) { dots[r][p] = dot_4(dots[r][p], codes[p], columns); }
                }
            }
            first += Codes::kBytes;
            second += Codes::kBytes;
        } while (q != block_end);
        if constexpr (Codes::kScaled) {
            UNROLL for (int p = 0; p < kPair; ++p) {
                const __m512 scales = groups.scales(t->panel + p * t->distance);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(row_scales[r * num_blocks]), scales);
                    totals[r][p] = _mm512_fmadd_ps(to_floats(dots[r][p]), factor, totals[r][p]);
                }
            }
        } else {
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512 row_scale = _mm512_set1_ps(row_scales[r * num_blocks]);
                UNROLL for (int p = 0; p < kPair; ++p) {
                    totals[r][p] = _mm512_fmadd_ps(to_floats(dots[r][p]), row_scale, totals[r][p]);
                }
            }
        }
        if constexpr (Codes::kScaled || !kSymmetric) groups.advance();
        ++row_scales;
        starts += kSymmetric ? 1 : 2;
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

template <class Codes, int kRows, bool kSymmetric>
void held_rows(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t num_tiles, int64_t panel,
               int64_t distance, Ahead& ahead) {
    const uint8_t* const first = w.values + w.value_offsets[panel];
    const uint8_t* const second = w.values + w.value_offsets[panel + distance];
    Tiles tiles(w, rows, part, row, {panel, distance, 0, w.num_blocks}, 1, true, ahead);
    for (int64_t tile = 0; tile < num_tiles; ++tile, tiles.advance(kRows)) {
        if (ahead.is_first())
            add_held_tile<Codes, kRows, kSymmetric, true>(tiles, first, second);
        else
            add_held_tile<Codes, kRows, kSymmetric, false>(tiles, first, second);
        ahead.fetch_share();
    }
}

// Whether the walk below is for this weight and part. A segment is to be a block: halves are scaled one by one, even
// where one scale is that of all.
template <class Codes>
bool holds_tiles(const PanelWeights& w, const Part& part) {
    const int64_t num_rows = part.row_end - part.row_begin;
    return num_rows >= kFewestHeldRows && num_rows >= Codes::kFewestRowsPerBlock * w.num_blocks &&
           w.steps_per_segment == 16 && (w.output_scales == nullptr) == Codes::kScaled &&
           (w.zero_points != nullptr ? Codes::kScaled : w.zero_point == kByteZeroPoint >> Codes::kStartShift);
}

template <class Codes, bool kSymmetric>
void walk_held_tiles_as(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr TilesFunction kFunctions[] = {held_rows<Codes, kHeldRows - 1, kSymmetric>,
                                            held_rows<Codes, kHeldRows, kSymmetric>};
    walk_pairs<kHeldRows>(
        w, part, [&](int64_t row, int64_t count, int64_t tiles, int64_t panel, int64_t distance, Ahead& ahead) {
            kFunctions[count - (kHeldRows - 1)](w, rows, part, row, tiles, panel, distance, ahead);
        });
}

// Evenly split, so many rows are tiles of 5 or 6.
template <class Codes>
void walk_held_tiles(const PanelWeights& w, const Rows& rows, const Part& part) {
    if constexpr (Codes::kScaled) {
        if (w.zero_points != nullptr) return walk_held_tiles_as<Codes, false>(w, rows, part);
    }
    walk_held_tiles_as<Codes, true>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
