// Register tiles of the AVX2 kernels: a few rows of activations by one panel that is expanded to plain codes or floats.
#pragma once

#include "matmul/vectors_avx2.h"

namespace rarefy::matmul::avx2 {

constexpr int kIntTileRows = 6;
constexpr int kFloatTileRows = 6;
constexpr int kExpandedBytes = 1 << 14;  // of a stretch of one panel: half of an L1 cache
constexpr int kFloatTileBlocks = kExpandedBytes / (kBlockInputs * kPanelOutputs * 4);
// So many panels take turns with a stretch, whose activations stay in the L2 cache meanwhile, as do unfinished sums.
constexpr int kTilePanels = 8;

// A stretch of blocks of one panel, expanded (or dense already): what the register tiles multiply with, and what they
// share, so that little lies between two of them.
struct Tile {
    const PanelWeights& w;
    const uint8_t* values;
    int64_t panel, block_begin, block_end;
    float (*totals)[kPanelOutputs];  // of all rows of the part
    bool whole;                      // all outputs exist: a store with a mask takes 12 cycles on Zen 4
    __m256i lanes[kHalves];
    __m256 factors[kHalves];
    Tile(const PanelWeights& weights, const uint8_t* expanded, int64_t tile_panel, int64_t begin, int64_t end,
         float (*sums)[kPanelOutputs])
        : w(weights),
          values(expanded),
          panel(tile_panel),
          block_begin(begin),
          block_end(end),
          totals(sums),
          whole((panel + 1) * kPanelOutputs <= w.num_outputs) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            lanes[half] = output_lanes(w, panel * kPanelOutputs + 8 * half);
            factors[half] = output_factor(w, panel, half, true);
        }
    }
};

// The outputs of kRows rows from `row` of the part on, which start at 0 with block 0 and go to y with the last.
template <int kRows>
struct TileTotals {
    float (*sums)[kPanelOutputs];
    TileTotals(const Tile& tile, int64_t row) : sums(tile.totals + row) {
        if (tile.block_begin != 0) return;
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                _mm256_store_ps(sums[r] + 8 * half, _mm256_setzero_ps());
            }
        }
    }
    // sums * scales
    void add(int r, int half, __m256 some, __m256 scales) {
        float* const at = sums[r] + 8 * half;
        _mm256_store_ps(at, _mm256_fmadd_ps(some, scales, _mm256_load_ps(at)));
    }
    void finish(const Tile& tile, const Part& part, int64_t row) const {
        if (tile.block_end != tile.w.num_blocks) return;
        float* y = part.y + (part.row_begin + row) * part.y_stride + tile.panel * kPanelOutputs;
        UNROLL for (int r = 0; r < kRows; ++r, y += part.y_stride) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256 outputs = _mm256_mul_ps(_mm256_load_ps(sums[r] + 8 * half), tile.factors[half]);
                if (tile.whole)
                    _mm256_storeu_ps(y + 8 * half, outputs);
                else
                    _mm256_maskstore_ps(y + 8 * half, tile.lanes[half], outputs);
            }
        }
    }
};

// Expanded codes that meet activations as bytes: 64 bytes per step. Others: 128 bytes per step, for each half columns 0
// and 2 and then columns 1 and 3 in 16 bits.
template <bool kBytes>
constexpr int kStepBytes = kBytes ? 64 : 128;
template <bool kBytes>
constexpr int kIntTileBlocks = kExpandedBytes / (16 * kStepBytes<kBytes>);

// What the steps of a segment add to the dot products. As bytes without AVX-VNNI, 8 steps fit 16 bits.
template <bool kBytes, int kRows, int kSteps>
inline void add_steps(const uint8_t* values, const int8_t* q, const int16_t* wide_q, int64_t stride,
                      __m256i (&dots)[kRows][kHalves]) {
    if constexpr (kVnni) {
        UNROLL for (int step = 0; step < kSteps; ++step, q += 4, values += 64) {
            const __m256i codes[kHalves] = {load(values), load(values + 32)};
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256i four = broadcast_u32(q + r * stride);
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    dots[r][half] = add_bytes(dots[r][half], codes[half], four);
                }
            }
        }
    } else if constexpr (kBytes) {
        UNROLL for (int eighth = 0; eighth < kSteps / 8; ++eighth) {
            __m256i sums[kRows][kHalves];
            UNROLL for (int r = 0; r < kRows; ++r) {
                UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_si256(); }
            }
            UNROLL_PRODUCTS for (int step = 0; step < 8; ++step, q += 4, values += 64) {
                const __m256i codes[kHalves] = {load_once(values), load_once(values + 32)};
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m256i four = broadcast_u32(q + r * stride);
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        add_in_place_16(sums[r][half], _mm256_maddubs_epi16(codes[half], four));
                    }
                }
            }
            UNROLL for (int r = 0; r < kRows; ++r) {
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    dots[r][half] = fold(dots[r][half], sums[r][half]);
                }
            }
        }
    } else {
        UNROLL_PRODUCTS for (int step = 0; step < 2 * kSteps; ++step, wide_q += 2, values += 64) {
            const __m256i codes[kHalves] = {load_once(values), load_once(values + 32)};
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256i two = broadcast_u32(wide_q + r * stride);
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    add_in_place_32(dots[r][half], _mm256_madd_epi16(codes[half], two));
                }
            }
        }
    }
}

template <bool kBytes, int kRows, int kSteps>
void tile_int(const Tile& tile, const Groups& first_groups, const Rows& rows, const Part& part, int64_t part_row) {
    constexpr int kSegments = 16 / kSteps;
    const int64_t row = part.row_begin + part_row, first = row * rows.stride + tile.block_begin * kBlockInputs;
    const int8_t* q = rows.q + first;
    const int16_t* wide_q = kBytes ? nullptr : rows.wide_q + first;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    const uint8_t* values = tile.values;
    TileTotals<kRows> totals(tile, part_row);
    Groups groups = first_groups;
    for (int64_t segment = tile.block_begin * kSegments; segment < tile.block_end * kSegments; ++segment) {
        __m256i dots[kRows][kHalves];
        const bool same = tile.w.zero_points == nullptr;
        const __m256i minus = _mm256_set1_epi32(-tile.w.zero_point);
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t* sums = half_sums + r * rows.num_blocks * 2 + segment * (2 / kSegments);
            __m256i sum = broadcast_u32(sums);
            if constexpr (kSteps == 16) sum = _mm256_add_epi32(sum, broadcast_u32(sums + 1));
            dots[r][0] = dots[r][1] = same ? _mm256_mullo_epi32(minus, sum) : sum;
        }
        if (!same) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256i zero_points =
                    _mm256_sub_epi32(_mm256_setzero_si256(), groups.zero_points(tile.panel, half));
                UNROLL for (int r = 0; r < kRows; ++r) {
                    dots[r][half] = _mm256_mullo_epi32(zero_points, dots[r][half]);
                }
            }
        }
        add_steps<kBytes, kRows, kSteps>(values, q, wide_q, rows.stride, dots);
        values += kSteps * kStepBytes<kBytes>;
        if constexpr (kBytes)
            q += 4 * kSteps;
        else
            wide_q += 4 * kSteps;
        const __m256 scales[kHalves] = {groups.scales(tile.panel, 0), groups.scales(tile.panel, 1)};
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m256 row_scale = _mm256_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
            UNROLL for (int half = 0; half < kHalves; ++half) {
                totals.add(r, half, _mm256_cvtepi32_ps(dots[r][half]), _mm256_mul_ps(row_scale, scales[half]));
            }
        }
        groups.advance();
    }
    totals.finish(tile, part, part_row);
}

template <int kRows>
void tile_float(const Tile& tile, const Rows& rows, const Part& part, int64_t part_row) {
    const float* x = rows.x + (part.row_begin + part_row) * rows.stride + tile.block_begin * kBlockInputs;
    TileTotals<kRows> totals(tile, part_row);
    const uint8_t* values = tile.values;
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
        __m256 sums[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_ps(); }
        }
        for (int half_of_block = 0; half_of_block < 2; ++half_of_block) {
            for (int pair = 0; pair < kBlockInputs / 4; ++pair, x += 2, values += 128) {
                UNROLL for (int column = 1; column >= 0; --column) {
                    const __m256 low = _mm256_castsi256_ps(load(values + 64 * column));
                    const __m256 high = _mm256_castsi256_ps(load(values + 64 * column + 32));
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        const __m256 row_x = _mm256_broadcast_ss(x + column + r * rows.stride);
                        sums[r][0] = _mm256_fmadd_ps(row_x, low, sums[r][0]);
                        sums[r][1] = _mm256_fmadd_ps(row_x, high, sums[r][1]);
                    }
                }
            }
            if (sums_go_on(tile.w, half_of_block)) continue;
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256 scales = half_block_scales(tile.w, tile.panel, 2 * block + half_of_block, half);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    totals.add(r, half, sums[r][half], scales);
                    sums[r][half] = _mm256_setzero_ps();
                }
            }
        }
    }
    totals.finish(tile, part, part_row);
}

using IntTileFunction = void (*)(const Tile&, const Groups&, const Rows&, const Part&, int64_t row);
using FloatTileFunction = void (*)(const Tile&, const Rows&, const Part&, int64_t row);

template <bool kBytes, int kSteps>
inline constexpr IntTileFunction kIntTiles[kIntTileRows] = {tile_int<kBytes, 1, kSteps>, tile_int<kBytes, 2, kSteps>,
                                                            tile_int<kBytes, 3, kSteps>, tile_int<kBytes, 4, kSteps>,
                                                            tile_int<kBytes, 5, kSteps>, tile_int<kBytes, 6, kSteps>};
inline constexpr FloatTileFunction kFloatTiles[kFloatTileRows] = {tile_float<1>, tile_float<2>, tile_float<3>,
                                                                  tile_float<4>, tile_float<5>, tile_float<6>};

// What the next stretch is made of, as Ahead takes it: each group of rows asks for a share of it.
struct NextValues {
    const uint8_t* from;
    int64_t num_bytes;
    NextValues(const PanelWeights& w, int64_t panel, int64_t block_begin, int64_t block_end) {
        const int64_t begin = w.value_offsets[panel], size = w.value_offsets[panel + 1] - begin;
        from = w.values + begin + size * block_begin / w.num_blocks;
        num_bytes = size * (block_end - block_begin) / w.num_blocks;
    }
    void fetch(int64_t share, int64_t num_shares) const {
        const int64_t end = num_bytes * (share + 1) / num_shares;
        for (int64_t offset = num_bytes * share / num_shares / 64 * 64; offset < end; offset += 64)
            _mm_prefetch(reinterpret_cast<const char*>(from + offset), _MM_HINT_T1);
    }
};

// Splits the rows of a part evenly into groups of at most max_rows: calls run(row, rows of the group).
template <class Run>
inline void for_groups_of_rows(const Part& part, int max_rows, const NextValues& next, const Run& run) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + max_rows - 1) / max_rows;
    int64_t row = 0;
    for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t count = (num_rows + group) / num_groups;
        next.fetch(group, num_groups);
        run(row, count);
        row += count;
    }
}

}  // namespace rarefy::matmul::avx2
