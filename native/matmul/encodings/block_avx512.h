// AVX-512 kernels of the block sparse encodings; see block.h. Register tiles are one panel wide, since neighbouring
// panels have other cells, and many rows high.
#pragma once

#include "matmul/core_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kCellTileRows = 12;
// Panels that take turns with the same rows and the same stretch of blocks: activations that one of them skips another
// needs, and they stay in the L1 cache meanwhile.
constexpr int kGroupPanels = 4;
constexpr int kFloatRunBlocks = 8;
constexpr int kIntRunBlocks = 32;
constexpr int kFloatBlockBytes = kBlockInputs * kPanelOutputs * 4;

// The cells of a panel that lie in a stretch of blocks. The first run of a panel starts its sums.
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

// The group of a segment of a panel. Divided anew for each: gaps of any length are nothing that a branch could predict.
struct SegmentGroup {
    const PanelWeights& w;
    int64_t offset;
    SegmentGroup(const PanelWeights& weights, int64_t panel, int64_t segment)
        : w(weights),
          offset((panel * weights.num_groups +
                  static_cast<uint32_t>(segment) / static_cast<uint32_t>(weights.segments_per_group)) *
                 kPanelOutputs) {}
    __m512 scales() const { return widen_bf16(w.scales + offset); }
    __m512i zero_points() const { return widen_bytes(w.zero_points + offset); }
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
                                  const SegmentGroup& group, const uint8_t* values, __m512 (&totals)[kRows]) {
    const int64_t block = cell_block(cell);
    const int8_t* q = rows.q + row * rows.stride + block * kBlockInputs + first;
    const int32_t* half_sums = rows.sums + (row * rows.num_blocks + block) * 2;
    const int32_t first_half = -(halves & 1), second_half = -(halves >> 1);  // as masks
    Sums dots[kRows];
    if (group.w.zero_points == nullptr) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t* sums = half_sums + r * rows.num_blocks * 2;
            const int32_t sum = (sums[0] & first_half) + (sums[1] & second_half);
            dots[r] = reinterpret_cast<Sums>(_mm512_set1_epi32(-group.w.zero_point * sum));
        }
    } else {
        const __m512i zero_points = group.zero_points();
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t* sums = half_sums + r * rows.num_blocks * 2;
            dots[r] = times(zero_points, -((sums[0] & first_half) + (sums[1] & second_half)));
        }
    }
    for (int step = 0; step < num_steps; ++step, q += 4, values += 64) {
        const __m512i codes = load(values);
        UNROLL for (int r = 0; r < kRows; ++r) { dots[r] = dot_4(dots[r], codes, broadcast_4(q + r * rows.stride)); }
    }
    const __m512 scales = group.scales();
    const float* row_scales = rows.scales + row * rows.num_blocks + block;
    UNROLL for (int r = 0; r < kRows; ++r) {
        const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks]);
        totals[r] = _mm512_fmadd_ps(to_floats(dots[r]), _mm512_mul_ps(row_scale, scales), totals[r]);
    }
    return values;
}

template <int kRows, int kSteps>
inline const uint8_t* cell_int(const PanelWeights& w, const Rows& rows, int64_t panel, int64_t row, int32_t cell,
                               const uint8_t* values, __m512 (&totals)[kRows]) {
    if constexpr (kSteps == 16) {
        const SegmentGroup group(w, panel, cell_block(cell));
        return segment_int<kRows>(rows, row, cell, first_column(cell), num_columns(cell) / 4, cell & 3, group, values,
                                  totals);
    }
    for (int half = 0; half < 2; ++half) {
        if ((cell >> half & 1) == 0) continue;
        const SegmentGroup group(w, panel, 2 * cell_block(cell) + half);
        values = segment_int<kRows>(rows, row, cell, 32 * half, 8, 1 << half, group, values, totals);
    }
    return values;
}

template <int kRows, int kSteps>
void cells_tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row) {
    CellTotals<kRows> totals(w, rows, part, run, row);
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k)
        values = cell_int<kRows, kSteps>(w, rows, run.panel, row, run.cells[k], values, totals.sums);
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

// Every row by the runs of some panels.
inline void multiply_runs(const RunFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part,
                          const Run* runs, int num_runs) {
    for (int64_t row = part.row_begin; row < part.row_end;) {
        const int64_t left = part.row_end - row;
        const int64_t count = left < kCellTileRows ? left : kCellTileRows;
        for (int i = 0; i < num_runs; ++i)
            if (runs[i].count != 0 || runs[i].is_first) functions[count - 1](w, rows, part, runs[i], row);
        row += count;
    }
}

// Cuts the cells of a panel into runs.
struct PanelRuns {
    const uint8_t* values;
    const int32_t *cell, *end;
    int64_t panel;
    void start(const PanelWeights& w, int64_t of_panel) {
        int64_t count;
        panel = of_panel;
        values = w.values + w.value_offsets[panel];
        cell = panel_cells(w, panel, count);
        end = cell + count;
    }
    // The cells before `last_block`; `bytes_per_column`: of the packed values, which the next run comes after.
    Run next(int64_t last_block, bool is_first, int bytes_per_column) {
        Run run{values, cell, 0, panel, is_first};
        for (; cell != end && cell_block(*cell) < last_block; ++cell, ++run.count)
            values += num_columns(*cell) * bytes_per_column;
        return run;
    }
};

// One row on its way through the cells of a panel.
struct CellWalk {
    const uint8_t* values;
    const int32_t *cell, *end;
    int64_t panel;
    __m512 total;
    CellWalk(const PanelWeights& w, const Rows& rows, const Part& part, int64_t of_panel)
        : values(w.values + w.value_offsets[of_panel]),
          panel(of_panel),
          total(_mm512_set1_ps(rows.starts[part.row_begin])) {
        int64_t count;
        cell = panel_cells(w, panel, count);
        end = cell + count;
    }
    void store(const PanelWeights& w, const Part& part) const {
        Lanes(w, panel, part.y + part.row_begin * part.y_stride + panel * kPanelOutputs).store(total);
    }
};

// kWalks walks take one cell each, of so many columns, so that their chains of additions overlap.
template <int kWalks>
inline void take_cells_bf16(const float* row_x, CellWalk* const (&walks)[kWalks], int columns) {
    const float* x[kWalks];
    __m512 sums[kWalks];
    UNROLL for (int i = 0; i < kWalks; ++i) {
        x[i] = row_x + cell_block(*walks[i]->cell) * kBlockInputs + first_column(*walks[i]->cell);
        sums[i] = _mm512_setzero_ps();
    }
    for (int column = 0; column < columns; column += 2) {
        UNROLL for (int i = 0; i < kWalks; ++i) {
            const uint8_t* values = walks[i]->values + column * 32;
            prefetch<2048>(values, 64);
            __m512 even, odd;
            widen_pairs(load(values), even, odd);
            sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(x[i][column]), even, sums[i]);
            sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(x[i][column + 1]), odd, sums[i]);
        }
    }
    UNROLL for (int i = 0; i < kWalks; ++i) {
        walks[i]->values += columns * 32;
        walks[i]->total = _mm512_add_ps(walks[i]->total, sums[i]);
        ++walks[i]->cell;
    }
}

inline void finish_bf16(const float* row_x, CellWalk& walk) {
    while (walk.cell != walk.end) take_cells_bf16<1>(row_x, {&walk}, num_columns(*walk.cell));
}

template <int kPanels>
void walk_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const float* row_x = rows.x + part.row_begin * rows.stride;
    CellWalk first(w, rows, part, panel);
    if constexpr (kPanels == 2) {
        CellWalk second(w, rows, part, panel + distance);
        while (first.cell != first.end && second.cell != second.end) {
            if ((*first.cell & *second.cell & 3) == 3) {
                take_cells_bf16<2>(row_x, {&first, &second}, kBlockInputs);
            } else {
                take_cells_bf16<1>(row_x, {&first}, num_columns(*first.cell));
                take_cells_bf16<1>(row_x, {&second}, num_columns(*second.cell));
            }
        }
        finish_bf16(row_x, second);
        second.store(w, part);
    }
    finish_bf16(row_x, first);
    first.store(w, part);
}

template <int kSteps>
inline void take_cell_int(const PanelWeights& w, const Rows& rows, const Part& part, CellWalk& walk) {
    const int32_t cell = *walk.cell++;
    prefetch<4096>(walk.values, num_columns(cell) * kPanelOutputs);
    // No hardware foresees which scales come next.
    constexpr int kCellsAhead = 4;
    if (walk.end - walk.cell > kCellsAhead) {
        const int64_t segment = cell_block(walk.cell[kCellsAhead]) * (16 / kSteps);
        _mm_prefetch(reinterpret_cast<const char*>(w.scales + SegmentGroup(w, walk.panel, segment).offset),
                     _MM_HINT_T0);
    }
    __m512 totals[1] = {walk.total};
    walk.values = cell_int<1, kSteps>(w, rows, walk.panel, part.row_begin, cell, walk.values, totals);
    walk.total = totals[0];
}

template <int kPanels, int kSteps>
void walk_cells_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    CellWalk first(w, rows, part, panel);
    if constexpr (kPanels == 2) {
        CellWalk second(w, rows, part, panel + distance);
        while (first.cell != first.end && second.cell != second.end) {
            take_cell_int<kSteps>(w, rows, part, first);
            take_cell_int<kSteps>(w, rows, part, second);
        }
        while (second.cell != second.end) take_cell_int<kSteps>(w, rows, part, second);
        second.store(w, part);
    }
    while (first.cell != first.end) take_cell_int<kSteps>(w, rows, part, first);
    first.store(w, part);
}

inline uint8_t* expand_cells(const Run& run, uint8_t* out) {
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k) {
        for (int pair = 0; pair < num_columns(run.cells[k]) / 2; ++pair, values += 64, out += 128) {
            __m512 even, odd;
            widen_pairs(load(values), even, odd);
            _mm512_store_ps(out, even);
            _mm512_store_ps(out + 64, odd);
        }
    }
    return out;
}

template <bool kFloats>
void many_rows_cells(const RunFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int kRunBlocks = kFloats ? kFloatRunBlocks : kIntRunBlocks;
    alignas(64) uint8_t expanded[kFloats ? kGroupPanels * kRunBlocks * kFloatBlockBytes : 1];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kGroupPanels) {
        const int64_t left = part.panel_end - panel;
        const int num_panels = static_cast<int>(left < kGroupPanels ? left : kGroupPanels);
        PanelRuns panels[kGroupPanels];
        for (int i = 0; i < num_panels; ++i) panels[i].start(w, panel + i);
        for (int64_t block = 0; block < w.num_blocks; block += kRunBlocks) {
            Run runs[kGroupPanels];
            uint8_t* out = expanded;
            for (int i = 0; i < num_panels; ++i) {
                runs[i] = panels[i].next(block + kRunBlocks, block == 0, kFloats ? 32 : 16);
                if constexpr (kFloats) {
                    uint8_t* const begin = out;
                    out = expand_cells(runs[i], out);
                    runs[i].values = begin;
                }
            }
            multiply_runs(functions, w, rows, part, runs, num_panels);
        }
    }
}

inline void multiply_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin == 1)
        walk_panels(w, rows, part, walk_cells_bf16<2>, walk_cells_bf16<1>);
    else
        many_rows_cells<true>(kCellFloatTiles, w, rows, part);
}

template <int kSteps>
void multiply_cells_int8_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin == 1)
        walk_panels(w, rows, part, walk_cells_int<2, kSteps>, walk_cells_int<1, kSteps>);
    else
        many_rows_cells<false>(kCellIntTiles<kSteps>, w, rows, part);
}

inline void multiply_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        multiply_cells_int8_steps<16>(w, rows, part);
    else
        multiply_cells_int8_steps<8>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
