// NEON kernels of the block sparse encodings; see block.h.
#pragma once

#include "matmul/core_neon.h"

namespace rarefy::matmul::neon {

// kRows rows by the cells of a panel.
template <int kRows>
void cells_tile_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t row) {
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    Floats totals[kRows][kQuarters];
    UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int i = 0; i < kQuarters; ++i) { totals[r][i] = vdupq_n_f32(rows.starts[row + r]); }
    }
    for (int64_t k = 0; k < count; ++k) {
        const int32_t cell = cells[k];
        const float* x = rows.x + row * rows.stride + cell_block(cell) * kBlockInputs + first_column(cell);
        Floats sums[kRows][kQuarters];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int i = 0; i < kQuarters; ++i) { sums[r][i] = vdupq_n_f32(0.0f); }
        }
        for (const float* const end = x + num_columns(cell); x != end; x += 2, values += 64) {
            Floats even[kQuarters], odd[kQuarters];
            UNROLL for (int i = 0; i < kQuarters; ++i) { widen_pairs(load(values + 16 * i), even[i], odd[i]); }
            add_pair(x, rows.stride, even, odd, sums);
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int i = 0; i < kQuarters; ++i) { totals[r][i] = vaddq_f32(totals[r][i], sums[r][i]); }
        }
    }
    store_totals(w, part, {panel, 0, w.num_blocks}, row, totals);
}

// One segment of a cell: `num_steps` steps from column `first` on; `halves`: whose sums of q belong to it.
template <int kRows>
inline const uint8_t* segment_int(const PanelWeights& w, const Rows& rows, int64_t panel, int64_t row, int32_t cell,
                                  int first, int num_steps, int halves, const uint8_t* values,
                                  Floats (&totals)[kRows][kQuarters]) {
    const int64_t block = cell_block(cell);
    const int8_t* q = rows.q + row * rows.stride + block * kBlockInputs + first;
    const int32_t* half_sums = rows.sums + (row * rows.num_blocks + block) * 2;
    const Groups groups(w, w.steps_per_segment == 16 ? block : 2 * block + first / 32);
    int32x4_t dots[kRows][kQuarters];
    UNROLL for (int r = 0; r < kRows; ++r) {
        const int32_t* sums = half_sums + r * rows.num_blocks * 2;
        const int32_t sum = (halves & 1 ? sums[0] : 0) + (halves & 2 ? sums[1] : 0);
        UNROLL for (int i = 0; i < kQuarters; ++i) { dots[r][i] = start_dot<false>(groups, panel, i, sum); }
    }
    for (int pair = 0; pair < num_steps / 2; ++pair, q += 8, values += 128) {
        Bytes even[kQuarters], odd[kQuarters];
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            even[i] = load(values + 16 * i);
            odd[i] = load(values + 64 + 16 * i);
        }
        add_pair<false>(q, rows.stride, even, odd, dots);
    }
    const float* row_scales = rows.scales + row * rows.num_blocks + block;
    UNROLL for (int i = 0; i < kQuarters; ++i) {
        const Floats scales = groups.scales(panel, i);
        UNROLL for (int r = 0; r < kRows; ++r) {
            totals[r][i] = vfmaq_f32(totals[r][i], vcvtq_f32_s32(dots[r][i]),
                                     vmulq_n_f32(scales, row_scales[r * rows.num_blocks]));
        }
    }
    return values;
}

template <int kRows>
void cells_tile_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t row) {
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    Floats totals[kRows][kQuarters];
    UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int i = 0; i < kQuarters; ++i) { totals[r][i] = vdupq_n_f32(rows.starts[row + r]); }
    }
    for (int64_t k = 0; k < count; ++k) {
        const int32_t cell = cells[k];
        if (w.steps_per_segment == 16) {
            values = segment_int<kRows>(w, rows, panel, row, cell, first_column(cell), num_columns(cell) / 4, cell & 3,
                                        values, totals);
            continue;
        }
        for (int half = 0; half < 2; ++half) {
            if (cell >> half & 1)
                values = segment_int<kRows>(w, rows, panel, row, cell, 32 * half, 8, 1 << half, values, totals);
        }
    }
    store_totals(w, part, {panel, 0, w.num_blocks}, row, totals);
}

inline void multiply_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        for_each_tile(part, [&](int64_t row, auto count) {
            cells_tile_float<decltype(count)::value>(w, rows, part, panel, row);
        });
    }
}

inline void multiply_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        for_each_tile(
            part, [&](int64_t row, auto count) { cells_tile_int<decltype(count)::value>(w, rows, part, panel, row); });
    }
}

}  // namespace rarefy::matmul::neon
