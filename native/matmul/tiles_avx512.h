// Register tiles of the AVX-512 kernels: a few rows of activations by a few panels that are expanded to plain codes or
// floats, 64 bytes per step.
#pragma once

#include "matmul/vectors_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kTilePanels = 4;  // panels that one row walks together, and the width of a register tile
constexpr int kTileRows = 6;    // 6 rows by 4 panels fill 24 registers
constexpr int kIntTileBlocks = 8;
constexpr int kFloatTileBlocks = 2;  // either way 4 panels make 32 KiB: an expanded tile stays in the L1 cache
constexpr int kIntBlockBytes = kBlockInputs * kPanelOutputs;
constexpr int kFloatBlockBytes = kIntBlockBytes * 4;

// A stretch of blocks of some neighbouring panels, expanded (or dense already): what the register tiles multiply with.
struct Tile {
    const uint8_t* values;  // of the first panel, first block
    int64_t panel_stride;   // bytes
    int64_t panel, block_begin, block_end;
};

// kRows rows from `row` on by kPanels expanded panels; adds to y unless the tile starts at block 0.
template <int kRows, int kPanels, int kSteps>
void tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    constexpr int kSegments = 16 / kSteps;
    const int8_t* q = rows.q + row * rows.stride + tile.block_begin * kBlockInputs;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    float* y = part.y + row * part.y_stride + tile.panel * kPanelOutputs;
    const uint8_t* values = tile.values;
    Groups groups(w, tile.block_begin * kSegments);
    for (int64_t segment = tile.block_begin * kSegments; segment < tile.block_end * kSegments; ++segment) {
        Sums dots[kRows][kPanels];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t sum = segment_sum<kSteps>(half_sums + r * rows.num_blocks * 2, segment);
            UNROLL for (int p = 0; p < kPanels; ++p) dots[r][p] = times(groups.zero_points(tile.panel + p), -sum);
        }
        for (int step = 0; step < kSteps; ++step, q += 4, values += 64) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512i row_q = broadcast_4(q + r * rows.stride);
                UNROLL for (int p = 0; p < kPanels; ++p) dots[r][p] =
                    dot_4(dots[r][p], load(values + p * tile.panel_stride), row_q);
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const __m512 scales = _mm512_mul_ps(row_scale, groups.scales(tile.panel + p));
                const Lanes total(w, tile.panel + p, y + r * part.y_stride + p * kPanelOutputs);
                total.store(_mm512_fmadd_ps(to_floats(dots[r][p]), scales, total.load_unless(segment == 0)));
            }
        }
        groups.advance();
    }
}

template <int kRows, int kPanels>
void tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    const float* x = rows.x + row * rows.stride + tile.block_begin * kBlockInputs;
    float* y = part.y + row * part.y_stride + tile.panel * kPanelOutputs;
    const uint8_t* values = tile.values;
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
        __m512 sums[kRows][kPanels];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPanels; ++p) sums[r][p] = _mm512_setzero_ps();
        }
        for (int column = 0; column < kBlockInputs; ++column, ++x, values += 64) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512 row_x = _mm512_set1_ps(x[r * rows.stride]);
                UNROLL for (int p = 0; p < kPanels; ++p) {
                    const __m512i weights = load(values + p * tile.panel_stride);
                    sums[r][p] = _mm512_fmadd_ps(row_x, _mm512_castsi512_ps(weights), sums[r][p]);
                }
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const Lanes total(w, tile.panel + p, y + r * part.y_stride + p * kPanelOutputs);
                total.store(_mm512_add_ps(total.load_unless(block == 0), sums[r][p]));
            }
        }
    }
}

using TileFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Tile&, int64_t);

template <int kPanels, int kSteps>
inline constexpr TileFunction kIntTiles[kTileRows] = {tile_int<1, kPanels, kSteps>, tile_int<2, kPanels, kSteps>,
                                                      tile_int<3, kPanels, kSteps>, tile_int<4, kPanels, kSteps>,
                                                      tile_int<5, kPanels, kSteps>, tile_int<6, kPanels, kSteps>};
template <int kPanels>
inline constexpr TileFunction kFloatTiles[kTileRows] = {tile_float<1, kPanels>, tile_float<2, kPanels>,
                                                        tile_float<3, kPanels>, tile_float<4, kPanels>,
                                                        tile_float<5, kPanels>, tile_float<6, kPanels>};

inline void multiply_tile(const TileFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part,
                          const Tile& tile) {
    for (int64_t row = part.row_begin; row < part.row_end;) {
        const int64_t left = part.row_end - row;
        const int64_t count = left < kTileRows ? left : kTileRows;
        functions[count - 1](w, rows, part, tile, row);
        row += count;
    }
}

}  // namespace rarefy::matmul::avx512
