// Register tiles of the AVX2 kernels: a few rows of activations by one panel that is expanded to plain codes or floats.
#pragma once

#include "matmul/vectors_avx2.h"

namespace rarefy::matmul::avx2 {

constexpr int kIntTileRows = 4;
constexpr int kFloatTileRows = 6;
constexpr int kIntTileBlocks = 16;
constexpr int kFloatTileBlocks = 4;

// A stretch of blocks of one panel, expanded (or dense already): what the register tiles multiply with.
struct Tile {
    const uint8_t* values;
    int64_t panel, block_begin, block_end;
};

// The outputs of kRows rows while a tile is multiplied; starts at 0 with block 0, else at y.
template <int kRows>
struct TileTotals {
    __m256 sums[kRows][kHalves];
    float* y;
    int64_t stride;
    __m256i lanes[kHalves];
    TileTotals(const PanelWeights& w, const Part& part, const Tile& tile, int64_t row)
        : y(part.y + row * part.y_stride + tile.panel * kPanelOutputs), stride(part.y_stride) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            lanes[half] = output_lanes(w, tile.panel * kPanelOutputs + 8 * half);
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                sums[r][half] = tile.block_begin == 0 ? _mm256_setzero_ps()
                                                      : _mm256_maskload_ps(y + r * stride + 8 * half, lanes[half]);
            }
        }
    }
    void store(const PanelWeights& w, const Tile& tile) const {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256 factor = output_factor(w, tile.panel, half, tile.block_end == w.num_blocks);
            UNROLL for (int r = 0; r < kRows; ++r) {
                _mm256_maskstore_ps(y + r * stride + 8 * half, lanes[half], _mm256_mul_ps(sums[r][half], factor));
            }
        }
    }
};

// Expanded codes that meet activations as bytes: 64 bytes per step. Others: 128 bytes per step, for each half columns 0
// and 2 and then columns 1 and 3 in 16 bits.
template <bool kBytes>
constexpr int kStepBytes = kBytes ? 64 : 128;

template <bool kBytes, int kRows, int kSteps>
void tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    constexpr int kSegments = 16 / kSteps;
    const int64_t first = row * rows.stride + tile.block_begin * kBlockInputs;
    const int8_t* q = rows.q + first;
    const int16_t* wide_q = kBytes ? nullptr : rows.wide_q + first;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    TileTotals<kRows> totals(w, part, tile, row);
    const uint8_t* values = tile.values;
    Groups groups(w, tile.block_begin * kSegments);
    for (int64_t segment = tile.block_begin * kSegments; segment < tile.block_end * kSegments; ++segment) {
        __m256i dots[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m256i sum = _mm256_set1_epi32(-segment_sum<kSteps>(half_sums + r * rows.num_blocks * 2, segment));
            UNROLL for (int half = 0; half < kHalves; ++half) {
                dots[r][half] = _mm256_mullo_epi32(groups.zero_points(tile.panel, half), sum);
            }
        }
        if constexpr (kBytes) {
            for (int eighth = 0; eighth < kSteps / 8; ++eighth) {
                __m256i sums[kRows][kHalves];
                UNROLL for (int r = 0; r < kRows; ++r) {
                    UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_si256(); }
                }
                UNROLL_PRODUCTS for (int step = 0; step < 8; ++step, q += 4, values += kStepBytes<kBytes>) {
                    const __m256i codes[kHalves] = {load(values), load(values + 32)};
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        const __m256i four = broadcast_u32(q + r * rows.stride);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            sums[r][half] = add_bytes(sums[r][half], codes[half], four);
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
                const __m256i codes[kHalves] = {load(values), load(values + 32)};
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m256i two = broadcast_u32(wide_q + r * rows.stride);
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(codes[half], two));
                    }
                }
            }
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256 scales = groups.scales(tile.panel, half);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256 row_scale = _mm256_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
                totals.sums[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][half]),
                                                       _mm256_mul_ps(row_scale, scales), totals.sums[r][half]);
            }
        }
        groups.advance();
    }
    totals.store(w, tile);
}

template <int kRows>
void tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    const float* x = rows.x + row * rows.stride + tile.block_begin * kBlockInputs;
    TileTotals<kRows> totals(w, part, tile, row);
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
            if (sums_go_on(w, half_of_block)) continue;
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256 scales = half_block_scales(w, tile.panel, 2 * block + half_of_block, half);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    totals.sums[r][half] = _mm256_fmadd_ps(sums[r][half], scales, totals.sums[r][half]);
                    sums[r][half] = _mm256_setzero_ps();
                }
            }
        }
    }
    totals.store(w, tile);
}

using TileFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Tile&, int64_t);

template <bool kBytes, int kSteps>
inline constexpr TileFunction kIntTiles[kIntTileRows] = {tile_int<kBytes, 1, kSteps>, tile_int<kBytes, 2, kSteps>,
                                                         tile_int<kBytes, 3, kSteps>, tile_int<kBytes, 4, kSteps>};
inline constexpr TileFunction kFloatTiles[kFloatTileRows] = {tile_float<1>, tile_float<2>, tile_float<3>,
                                                             tile_float<4>, tile_float<5>, tile_float<6>};

// Splits the rows of a part evenly.
inline void multiply_tile(const TileFunction* functions, int max_rows, const PanelWeights& w, const Rows& rows,
                          const Part& part, const Tile& tile) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + max_rows - 1) / max_rows;
    int64_t row = part.row_begin;
    for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t count = (num_rows + group) / num_groups;
        functions[count - 1](w, rows, part, tile, row);
        row += count;
    }
}

}  // namespace rarefy::matmul::avx2
