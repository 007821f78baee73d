// AVX2 kernels of the block sparse encodings; see block.h.
#pragma once

#include "matmul/core_avx2.h"

namespace rarefy::matmul::avx2 {

constexpr int kCellFloatRows = 6;
constexpr int kCellIntRows = 4;
constexpr int kRunCells = 4;  // 16 KiB expanded to floats, 8 KiB to 16-bit codes

// Some cells of a panel that lie one after the other. The first run of a panel starts its sums, the last finishes them.
struct Run {
    const uint8_t* values;
    const int32_t* cells;
    int64_t count, panel;
    bool is_first, is_last;
};

template <int kRows>
struct CellTotals {
    __m256 sums[kRows][kHalves];
    float* y;
    int64_t stride;
    __m256i lanes[kHalves];
    CellTotals(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row)
        : y(part.y + row * part.y_stride + run.panel * kPanelOutputs), stride(part.y_stride) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            lanes[half] = output_lanes(w, run.panel * kPanelOutputs + 8 * half);
            UNROLL for (int r = 0; r < kRows; ++r) {
                sums[r][half] = run.is_first ? _mm256_set1_ps(rows.starts[row + r])
                                             : _mm256_maskload_ps(y + r * stride + 8 * half, lanes[half]);
            }
        }
    }
    void store(const PanelWeights& w, const Run& run) const {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256 factor = output_factor(w, run.panel, half, run.is_last);
            UNROLL for (int r = 0; r < kRows; ++r) {
                _mm256_maskstore_ps(y + r * stride + 8 * half, lanes[half], _mm256_mul_ps(sums[r][half], factor));
            }
        }
    }
};

// kRows rows by the expanded cells of a run.
template <int kRows>
void cells_tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row) {
    CellTotals<kRows> totals(w, rows, part, run, row);
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k) {
        const int32_t cell = run.cells[k];
        const float* x = rows.x + row * rows.stride + cell_block(cell) * kBlockInputs + first_column(cell);
        __m256 sums[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_ps(); }
        }
        for (const float* const end = x + num_columns(cell); x != end; x += 2, values += 128) {
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
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                totals.sums[r][half] = _mm256_add_ps(totals.sums[r][half], sums[r][half]);
            }
        }
    }
    totals.store(w, run);
}

// One segment of a cell: `num_steps` steps, with AVX-VNNI as they are packed and otherwise expanded, from column
// `first` on; `halves`: whose sums of q belong to it.
template <int kRows>
inline const uint8_t* segment_int(const PanelWeights& w, const Rows& rows, int64_t panel, int64_t row, int32_t cell,
                                  int first, int num_steps, int halves, const uint8_t* values,
                                  __m256 (&totals)[kRows][kHalves]) {
    const int64_t block = cell_block(cell);
    const int64_t at = row * rows.stride + block * kBlockInputs + first;
    const int8_t* q = rows.q + at;
    const int16_t* wide_q = kVnni ? nullptr : rows.wide_q + at;
    const int32_t* half_sums = rows.sums + (row * rows.num_blocks + block) * 2;
    const Groups groups(w, w.steps_per_segment == 16 ? block : 2 * block + first / 32);
    __m256i dots[kRows][kHalves];
    UNROLL for (int r = 0; r < kRows; ++r) {
        const int32_t* sums = half_sums + r * rows.num_blocks * 2;
        const __m256i minus = _mm256_set1_epi32(-((halves & 1 ? sums[0] : 0) + (halves & 2 ? sums[1] : 0)));
        UNROLL for (int half = 0; half < kHalves; ++half) {
            dots[r][half] = _mm256_mullo_epi32(groups.zero_points(panel, half), minus);
        }
    }
    for (int step = 0; step < (kVnni ? 1 : 2) * num_steps; ++step, values += 64) {
        const __m256i codes[kHalves] = {load(values), load(values + 32)};
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m256i some = kVnni ? broadcast_u32(q + r * rows.stride) : broadcast_u32(wide_q + r * rows.stride);
            UNROLL for (int half = 0; half < kHalves; ++half) {
                dots[r][half] = kVnni ? add_bytes(dots[r][half], codes[half], some)
                                      : _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(codes[half], some));
            }
        }
        if (kVnni)
            q += 4;
        else
            wide_q += 2;
    }
    const float* row_scales = rows.scales + row * rows.num_blocks + block;
    UNROLL for (int half = 0; half < kHalves; ++half) {
        const __m256 scales = groups.scales(panel, half);
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m256 row_scale = _mm256_set1_ps(row_scales[r * rows.num_blocks]);
            totals[r][half] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][half]), _mm256_mul_ps(row_scale, scales), totals[r][half]);
        }
    }
    return values;
}

template <int kRows>
void cells_tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row) {
    CellTotals<kRows> totals(w, rows, part, run, row);
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k) {
        const int32_t cell = run.cells[k];
        if (w.steps_per_segment == 16) {
            values = segment_int<kRows>(w, rows, run.panel, row, cell, first_column(cell), num_columns(cell) / 4,
                                        cell & 3, values, totals.sums);
            continue;
        }
        for (int half = 0; half < 2; ++half) {
            if (cell >> half & 1)
                values =
                    segment_int<kRows>(w, rows, run.panel, row, cell, 32 * half, 8, 1 << half, values, totals.sums);
        }
    }
    totals.store(w, run);
}

using RunFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Run&, int64_t row);

inline constexpr RunFunction kCellFloatTiles[kCellFloatRows] = {cells_tile_float<1>, cells_tile_float<2>,
                                                                cells_tile_float<3>, cells_tile_float<4>,
                                                                cells_tile_float<5>, cells_tile_float<6>};
inline constexpr RunFunction kCellIntTiles[kCellIntRows] = {cells_tile_int<1>, cells_tile_int<2>, cells_tile_int<3>,
                                                            cells_tile_int<4>};

inline void multiply_run(const RunFunction* functions, int max_rows, const PanelWeights& w, const Rows& rows,
                         const Part& part, const Run& run) {
    for (int64_t row = part.row_begin; row < part.row_end;) {
        const int64_t left = part.row_end - row;
        const int64_t count = left < max_rows ? left : max_rows;
        functions[count - 1](w, rows, part, run, row);
        row += count;
    }
}

// Two columns of one row by a step.
inline void add_pair(const float* x, const uint8_t* values, __m256 (&sums)[kHalves]) {
    const __m256 even_x = _mm256_broadcast_ss(x), odd_x = _mm256_broadcast_ss(x + 1);
    UNROLL for (int half = 0; half < kHalves; ++half) {
        __m256 even, odd;
        widen_pairs(load(values + 32 * half), even, odd);
        sums[half] = _mm256_fmadd_ps(odd_x, odd, sums[half]);
        sums[half] = _mm256_fmadd_ps(even_x, even, sums[half]);
    }
}

// One row by one panel. Two whole cells at a time, so that their chains of additions overlap.
inline void walk_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    const float* row_x = rows.x + part.row_begin * rows.stride;
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    Run run{values, cells, count, panel, true, true};
    CellTotals<1> totals(w, rows, part, run, part.row_begin);
    for (int64_t k = 0; k < count;) {
        constexpr int kCellBytes = kBlockInputs * kPanelOutputs * 2;
        const bool two = k + 1 < count && (cells[k] & cells[k + 1] & 3) == 3;
        const float* x = row_x + cell_block(cells[k]) * kBlockInputs + first_column(cells[k]);
        __m256 sums[2][kHalves] = {{_mm256_setzero_ps(), _mm256_setzero_ps()},
                                   {_mm256_setzero_ps(), _mm256_setzero_ps()}};
        if (two) {
            const float* next_x = row_x + cell_block(cells[k + 1]) * kBlockInputs;
            for (int pair = 0; pair < kBlockInputs / 2; ++pair, values += 64) {
                add_pair(x + 2 * pair, values, sums[0]);
                add_pair(next_x + 2 * pair, values + kCellBytes, sums[1]);
            }
            values += kCellBytes;
        } else {
            for (const float* const end = x + num_columns(cells[k]); x != end; x += 2, values += 64)
                add_pair(x, values, sums[0]);
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            totals.sums[0][half] = _mm256_add_ps(totals.sums[0][half], sums[0][half]);
            if (two) totals.sums[0][half] = _mm256_add_ps(totals.sums[0][half], sums[1][half]);
        }
        k += two ? 2 : 1;
    }
    totals.store(w, run);
}

// Cells of floats, or of codes, whose bytes 0 and 2 and then 1 and 3 of each lane become 16 bits wide.
template <bool kFloats>
const uint8_t* expand_cells(const uint8_t* values, const Run& run, uint8_t* out) {
    for (int64_t k = 0; k < run.count; ++k) {
        for (int step = 0; step < num_columns(run.cells[k]) / (kFloats ? 2 : 4); ++step, values += 64, out += 128) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256i packed = load(values + 32 * half);
                if constexpr (kFloats) {
                    __m256 even, odd;
                    widen_pairs(packed, even, odd);
                    store(out + 32 * half, _mm256_castps_si256(even));
                    store(out + 64 + 32 * half, _mm256_castps_si256(odd));
                } else {
                    store(out + 32 * half, low_bytes(packed));
                    store(out + 64 + 32 * half, high_bytes(packed));
                }
            }
        }
    }
    return values;
}

template <bool kFloats>
void multiply_panel(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    alignas(64) uint8_t expanded[kRunCells * kBlockInputs * kPanelOutputs * (kFloats ? 4 : 2)];
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    for (int64_t begin = 0; begin == 0 || begin < count; begin += kRunCells) {
        const int64_t end = begin + kRunCells < count ? begin + kRunCells : count;
        Run run{expanded, cells + begin, end - begin, panel, begin == 0, end == count};
        if constexpr (kFloats || !kVnni) {
            values = expand_cells<kFloats>(values, run, expanded);
        } else {
            run.values = values;
            for (int64_t k = begin; k < end; ++k) values += num_columns(cells[k]) * kPanelOutputs;
        }
        multiply_run(kFloats ? kCellFloatTiles : kCellIntTiles, kFloats ? kCellFloatRows : kCellIntRows, w, rows, part,
                     run);
    }
}

inline void multiply_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        if (part.row_end - part.row_begin == 1)
            walk_cells_bf16(w, rows, part, panel);
        else
            multiply_panel<true>(w, rows, part, panel);
    }
}

inline void multiply_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) multiply_panel<false>(w, rows, part, panel);
}

}  // namespace rarefy::matmul::avx2
