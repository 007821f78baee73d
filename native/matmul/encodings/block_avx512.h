// AVX-512 kernels of the block sparse encodings; see block.h. Register tiles are one panel wide, since neighbouring
// panels have other cells, and many rows high.
#pragma once

#include "matmul/core_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kCellTileRows = 12;
constexpr int kFloatRunCells = 4;  // 16 KiB expanded: half of the L1 cache, beside the activations
constexpr int kIntRunCells = 16;

// Some cells of a panel that lie one after the other. The first run of a panel starts its sums.
struct Run {
    const uint8_t* values;
    const int32_t* cells;
    int64_t count, panel;
    bool is_first;
};

template <int kRows>
struct CellTotals {
    __m512 sums[kRows];
    float* y;
    int64_t stride;
    __mmask16 lanes;
    CellTotals(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row)
        : y(part.y + row * part.y_stride + run.panel * kPanelOutputs),
          stride(part.y_stride),
          lanes(output_lanes(w, run.panel)) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            sums[r] =
                run.is_first ? _mm512_set1_ps(rows.starts[row + r]) : _mm512_maskz_loadu_ps(lanes, y + r * stride);
        }
    }
    void store() const {
        UNROLL for (int r = 0; r < kRows; ++r) { _mm512_mask_storeu_ps(y + r * stride, lanes, sums[r]); }
    }
};

// Finds the group of segments that come in order, with gaps.
struct GroupFinder {
    const PanelWeights& w;
    int64_t panel, group = 0, end;
    GroupFinder(const PanelWeights& weights, int64_t of_panel)
        : w(weights), panel(of_panel), end(weights.segments_per_group) {}
    void seek(int64_t segment) {
        for (; segment >= end; end += w.segments_per_group) ++group;
    }
    int64_t offset() const { return (panel * w.num_groups + group) * kPanelOutputs; }
    __m512 scales() const { return widen_bf16(w.scales + offset()); }
};

// kRows rows by the expanded cells of a run.
template <int kRows>
void cells_tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row) {
    CellTotals<kRows> totals(w, rows, part, run, row);
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k) {
        const int32_t cell = run.cells[k];
        const float* x = rows.x + row * rows.stride + cell_block(cell) * kBlockInputs + first_column(cell);
        __m512 sums[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) { sums[r] = _mm512_setzero_ps(); }
        for (const float* const end = x + num_columns(cell); x != end; ++x, values += 64) {
            const __m512 weights = _mm512_castsi512_ps(load(values));
            UNROLL for (int r = 0; r < kRows; ++r) {
                sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * rows.stride]), weights, sums[r]);
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) { totals.sums[r] = _mm512_add_ps(totals.sums[r], sums[r]); }
    }
    totals.store();
}

// One segment of a cell: `num_steps` steps from `first` on, whose sums of q are in the given halves of the block.
template <int kRows>
inline const uint8_t* segment_int(const Rows& rows, int64_t row, int32_t cell, int first, int num_steps, int halves,
                                  const GroupFinder& groups, const uint8_t* values, __m512 (&totals)[kRows]) {
    const int64_t block = cell_block(cell);
    const int8_t* q = rows.q + row * rows.stride + block * kBlockInputs + first;
    const int32_t* half_sums = rows.sums + (row * rows.num_blocks + block) * 2;
    const int32_t first_half = -(halves & 1), second_half = -(halves >> 1);  // as masks
    Sums dots[kRows];
    if (groups.w.zero_points == nullptr) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t* sums = half_sums + r * rows.num_blocks * 2;
            const int32_t sum = (sums[0] & first_half) + (sums[1] & second_half);
            dots[r] = reinterpret_cast<Sums>(_mm512_set1_epi32(-groups.w.zero_point * sum));
        }
    } else {
        const __m512i zero_points = widen_bytes(groups.w.zero_points + groups.offset());
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t* sums = half_sums + r * rows.num_blocks * 2;
            dots[r] = times(zero_points, -((sums[0] & first_half) + (sums[1] & second_half)));
        }
    }
    for (int step = 0; step < num_steps; ++step, q += 4, values += 64) {
        const __m512i codes = load(values);
        UNROLL for (int r = 0; r < kRows; ++r) { dots[r] = dot_4(dots[r], codes, broadcast_4(q + r * rows.stride)); }
    }
    const __m512 scales = groups.scales();
    const float* row_scales = rows.scales + row * rows.num_blocks + block;
    UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks]);
        totals[r] = _mm512_fmadd_ps(to_floats(dots[r]), _mm512_mul_ps(row_scale, scales), totals[r]);
    }
    return values;
}

template <int kRows, int kSteps>
void cells_tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row) {
    CellTotals<kRows> totals(w, rows, part, run, row);
    const uint8_t* values = run.values;
    GroupFinder groups(w, run.panel);
    for (int64_t k = 0; k < run.count; ++k) {
        const int32_t cell = run.cells[k];
        if constexpr (kSteps == 16) {
            groups.seek(cell_block(cell));
            values = segment_int<kRows>(rows, row, cell, first_column(cell), num_columns(cell) / 4, cell & 3, groups,
                                        values, totals.sums);
        } else {
            for (int half = 0; half < 2; ++half) {
                if ((cell >> half & 1) == 0) continue;
                groups.seek(2 * cell_block(cell) + half);
                values = segment_int<kRows>(rows, row, cell, 32 * half, 8, 1 << half, groups, values, totals.sums);
            }
        }
    }
    totals.store();
}

using RunFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Run&, int64_t row);

inline constexpr RunFunction kCellFloatTiles[kCellTileRows] = {
    cells_tile_float<1>, cells_tile_float<2>,  cells_tile_float<3>,  cells_tile_float<4>,
    cells_tile_float<5>, cells_tile_float<6>,  cells_tile_float<7>,  cells_tile_float<8>,
    cells_tile_float<9>, cells_tile_float<10>, cells_tile_float<11>, cells_tile_float<12>};
template <int kSteps>
inline constexpr RunFunction kCellIntTiles[kCellTileRows] = {
    cells_tile_int<1, kSteps>, cells_tile_int<2, kSteps>,  cells_tile_int<3, kSteps>,  cells_tile_int<4, kSteps>,
    cells_tile_int<5, kSteps>, cells_tile_int<6, kSteps>,  cells_tile_int<7, kSteps>,  cells_tile_int<8, kSteps>,
    cells_tile_int<9, kSteps>, cells_tile_int<10, kSteps>, cells_tile_int<11, kSteps>, cells_tile_int<12, kSteps>};

inline void multiply_run(const RunFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part,
                         const Run& run) {
    for (int64_t row = part.row_begin; row < part.row_end;) {
        const int64_t left = part.row_end - row;
        const int64_t count = left < kCellTileRows ? left : kCellTileRows;
        functions[count - 1](w, rows, part, run, row);
        row += count;
    }
}

// One row by one panel. Two whole cells at a time, so that their chains of additions overlap.
inline void walk_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    const float* row_x = rows.x + part.row_begin * rows.stride;
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    __m512 total = _mm512_set1_ps(rows.starts[part.row_begin]);
    for (int64_t k = 0; k < count;) {
        const float* x = row_x + cell_block(cells[k]) * kBlockInputs + first_column(cells[k]);
        __m512 even, odd, sums = _mm512_setzero_ps();
        if (k + 1 < count && (cells[k] & cells[k + 1] & 3) == 3) {
            constexpr int kCellBytes = kIntBlockBytes * 2;
            const float* next_x = row_x + cell_block(cells[k + 1]) * kBlockInputs;
            __m512 next_sums = _mm512_setzero_ps();
            for (int pair = 0; pair < kBlockInputs / 2; ++pair, values += 64) {
                prefetch<2 * kCellBytes>(values, 64);
                prefetch<3 * kCellBytes>(values, 64);
                widen_pairs(load(values), even, odd);
                sums = _mm512_fmadd_ps(_mm512_set1_ps(x[2 * pair]), even, sums);
                sums = _mm512_fmadd_ps(_mm512_set1_ps(x[2 * pair + 1]), odd, sums);
                widen_pairs(load(values + kCellBytes), even, odd);
                next_sums = _mm512_fmadd_ps(_mm512_set1_ps(next_x[2 * pair]), even, next_sums);
                next_sums = _mm512_fmadd_ps(_mm512_set1_ps(next_x[2 * pair + 1]), odd, next_sums);
            }
            values += kCellBytes;
            total = _mm512_add_ps(_mm512_add_ps(total, sums), next_sums);
            k += 2;
            continue;
        }
        for (const float* const end = x + num_columns(cells[k]); x != end; x += 2, values += 64) {
            prefetch<4096>(values, 64);
            widen_pairs(load(values), even, odd);
            sums = _mm512_fmadd_ps(_mm512_set1_ps(x[0]), even, sums);
            sums = _mm512_fmadd_ps(_mm512_set1_ps(x[1]), odd, sums);
        }
        total = _mm512_add_ps(total, sums);
        ++k;
    }
    Lanes(w, panel, part.y + part.row_begin * part.y_stride + panel * kPanelOutputs).store(total);
}

inline void multiply_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) uint8_t expanded[kFloatRunCells * kFloatBlockBytes];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        if (part.row_end - part.row_begin == 1) {
            walk_cells_bf16(w, rows, part, panel);
            continue;
        }
        const uint8_t* values = w.values + w.value_offsets[panel];
        int64_t count;
        const int32_t* cells = panel_cells(w, panel, count);
        for (int64_t begin = 0; begin == 0 || begin < count; begin += kFloatRunCells) {
            const int64_t end = begin + kFloatRunCells < count ? begin + kFloatRunCells : count;
            uint8_t* out = expanded;
            for (int64_t k = begin; k < end; ++k) {
                for (int pair = 0; pair < num_columns(cells[k]) / 2; ++pair, values += 64, out += 128) {
                    __m512 even, odd;
                    widen_pairs(load(values), even, odd);
                    _mm512_store_ps(out, even);
                    _mm512_store_ps(out + 64, odd);
                }
            }
            multiply_run(kCellFloatTiles, w, rows, part, {expanded, cells + begin, end - begin, panel, begin == 0});
        }
    }
}

template <int kSteps>
void multiply_cells_int8_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        const uint8_t* values = w.values + w.value_offsets[panel];
        int64_t count;
        const int32_t* cells = panel_cells(w, panel, count);
        for (int64_t begin = 0; begin == 0 || begin < count; begin += kIntRunCells) {
            const int64_t end = begin + kIntRunCells < count ? begin + kIntRunCells : count;
            multiply_run(kCellIntTiles<kSteps>, w, rows, part, {values, cells + begin, end - begin, panel, begin == 0});
            for (int64_t k = begin; k < end; ++k) values += num_columns(cells[k]) * kPanelOutputs;
        }
    }
}

inline void multiply_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        multiply_cells_int8_steps<16>(w, rows, part);
    else
        multiply_cells_int8_steps<8>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
