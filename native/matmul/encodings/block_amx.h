// AMX kernel of block sparse codes with many rows; see block.h and core_amx.h. A stored cell is a tile as it is packed,
// half a cell a shorter one.
#pragma once

#include "matmul/core_amx.h"

namespace rarefy::matmul::amx {

// Tile 0: sums; 1 and 2: activations and weights of a cell; 3 and 4: of half a cell.
inline void configure_cells(int num_rows) {
    alignas(64) TileConfig config;
    config.num_rows[0] = config.num_rows[1] = config.num_rows[3] = static_cast<uint8_t>(num_rows);
    config.num_rows[2] = kBlockInputs / 4;
    config.num_rows[4] = kBlockInputs / 8;
    config.row_bytes[0] = config.row_bytes[1] = config.row_bytes[2] = config.row_bytes[4] = 64;
    config.row_bytes[3] = kBlockInputs / 2;
    TILE_CONFIGURE(config);
}

// One segment of a cell, from column `first` on; `halves`: which halves of the cell it is. Returns what follows it.
inline const uint8_t* tile_segment(const PanelWeights& w, const Rows& rows, int64_t panel, int64_t block, int first,
                                   int halves, const uint8_t* values, int64_t row, int num_rows, __m512* totals) {
    alignas(64) int32_t dots[kTileRows][kPanelOutputs];
    const int8_t* q = rows.q + row * rows.stride + block * kBlockInputs + first;
    TILE_ZERO(0);
    if (halves == 3) {
        TILE_LOAD(1, q, rows.stride);
        TILE_LOAD(2, values, 64);
        TILE_DOT_S8_U8(0, 1, 2);
    } else {
        TILE_LOAD(3, q, rows.stride);
        TILE_LOAD(4, values, 64);
        TILE_DOT_S8_U8(0, 3, 4);
    }
    TILE_STORE(0, dots, 64);
    const Groups groups(w, w.steps_per_segment == 16 ? block : 2 * block + first / 32);
    add_segment(groups, rows, panel, block, row, num_rows, dots, totals, [&](const int32_t* half_sums) {
        return (halves & 1 ? half_sums[2 * block] : 0) + (halves & 2 ? half_sums[2 * block + 1] : 0);
    });
    return values + (halves == 3 ? kBlockInputs : kBlockInputs / 2) * kPanelOutputs;
}

inline void tile_cells(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t row,
                       int num_rows) {
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    __m512 totals[kTileRows];
    for (int r = 0; r < num_rows; ++r) totals[r] = _mm512_set1_ps(rows.starts[row + r]);
    for (int64_t k = 0; k < count; ++k) {
        const int64_t block = cell_block(cells[k]);
        const int halves = cells[k] & 3;
        if (w.steps_per_segment == 16) {
            values = tile_segment(w, rows, panel, block, first_column(cells[k]), halves, values, row, num_rows, totals);
            continue;
        }
        for (int half = 0; half < 2; ++half) {
            if (halves >> half & 1)
                values = tile_segment(w, rows, panel, block, 32 * half, 1 << half, values, row, num_rows, totals);
        }
    }
    const __m512 factor = output_factor(w, panel, true);
    for (int r = 0; r < num_rows; ++r) outputs(w, part, row + r, panel).store(_mm512_mul_ps(totals[r], factor));
}

inline void tile_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t row = part.row_begin; row < part.row_end; row += kTileRows) {
        const int num_rows = rows_left(part, row);
        configure_cells(num_rows);
        for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel)
            tile_cells(w, rows, part, panel, row, num_rows);
    }
    TILE_RELEASE();
}

}  // namespace rarefy::matmul::amx
