// Many rows by the cells of block sparse weights (block.h). Register tiles are one panel wide, since neighbouring
// panels have other cells, and many rows high.
#pragma once

#include "matmul/core_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kCellTileRows = 16;
// Panels that take turns with the same rows and the same stretch of blocks: activations that one of them skips another
// needs, and they stay in the L1 cache meanwhile.
constexpr int kGroupPanels = 8;
constexpr int kFloatRunBlocks = 4;
constexpr int kIntRunBlocks = 32;

// The cells of a panel that lie in a stretch of blocks. The first run of a panel starts its sums, the
// last finishes them.
struct Run {
    const uint8_t* values;
    const int32_t* cells;
    int64_t count, panel;
    bool is_first, is_last;
};

// Some rows on their way through runs of the same blocks.
struct RowGroup {
    int64_t row, block;     // the first ones
    bool fetches;           // no rows before these have brought the cells into the cache
    const int32_t* starts;  // of integers: see fill_starts
};

// The sums of kRows rows, which stay in memory while those of a cell fill the registers.
template <int kRows>
struct CellTotals {
    alignas(64) float sums[kRows][kPanelOutputs];
    float* y;
    int64_t stride;
    __mmask16 lanes;
    CellTotals(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, int64_t row)
        : y(part.y + row * part.y_stride + run.panel * kPanelOutputs),
          stride(part.y_stride),
          lanes(output_lanes(w, run.panel)) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            _mm512_store_ps(sums[r], run.is_first ? _mm512_set1_ps(rows.starts[row + r])
                                                  : _mm512_maskz_loadu_ps(lanes, y + r * stride));
        }
    }
    __m512 load(int r) const { return _mm512_load_ps(sums[r]); }
    void set(int r, __m512 sum) { _mm512_store_ps(sums[r], sum); }
    void store(const PanelWeights& w, const Run& run) const {
        const __m512 factor = output_factor(w, run.panel, run.is_last);
        UNROLL for (int r = 0; r < kRows; ++r) {
            _mm512_mask_storeu_ps(y + r * stride, lanes, _mm512_mul_ps(load(r), factor));
        }
    }
};

// Row r of a tile from two bases, so that the distances of the other rows stay in registers.
template <class T>
struct RowBases {
    const T *first, *second;
    int64_t stride;
    RowBases(const T* from, int64_t row_stride) : first(from), second(from + 8 * row_stride), stride(row_stride) {
        __asm__("" : "+r"(second));
    }
    const T* row(int r) const { return r < 8 ? first + r * stride : second + (r - 8) * stride; }
    void advance(int64_t count) {
        first += count;
        second += count;
    }
};

// The group of a segment of a panel. Divided anew for each: gaps of any length are nothing that a branch could predict.
struct SegmentGroup {
    const PanelWeights& w;
    int64_t place;
    SegmentGroup(const PanelWeights& weights, int64_t panel, int64_t segment)
        : w(weights),
          place(weights.group_place(
              panel, static_cast<uint32_t>(segment) / static_cast<uint32_t>(weights.segments_per_group))) {}
    __m512 scales() const { return widen_bf16(w.scales_at(place)); }
    __m512i zero_points() const { return widen_bytes(w.zero_points + place); }
};

// Four neighbouring lanes of activations, each for all lanes. A tile that is one panel wide would be bound by loads if
// it loaded each of them; some rows load all four at once and shuffle.
struct Four {
    const uint8_t* from;
    __m512i all;
    bool shuffles;
    Four(const void* activations, bool in_register)
        : from(static_cast<const uint8_t*>(activations)), shuffles(in_register) {
        if (shuffles) all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    template <int kIndex>
    __m512i get() const {
        if (shuffles) return _mm512_shuffle_epi32(all, static_cast<_MM_PERM_ENUM>(kIndex * 0x55));
        return broadcast_4(reinterpret_cast<const int8_t*>(from) + 4 * kIndex);
    }
};

// kRows rows by the cells of a run.
template <int kRows>
void cells_tile_bf16(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, const RowGroup& group) {
    CellTotals<kRows> totals(w, rows, part, run, group.row);
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k) {
        const int32_t cell = run.cells[k];
        const int64_t column = cell_block(cell) * kBlockInputs + first_column(cell);
        if (group.fetches) prefetch<4096>(values, num_columns(cell) * 32);
        __m512 sums[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) { sums[r] = _mm512_setzero_ps(); }
#if RAREFY_PASS_AVX512_BF16
        RowBases<uint16_t> x(rows.bf16_x + group.row * rows.stride + column, rows.stride);
        for (int left = num_columns(cell); left > 0; left -= 8, values += 256, x.advance(8)) {
            const __m512i weights[4] = {load(values), load(values + 64), load(values + 128), load(values + 192)};
            UNROLL for (int r = 0; r < kRows; ++r) {
                const Four four(x.row(r), r % 4 == 0);
                sums[r] = add_pairs(sums[r], weights[0], four.get<0>());
                sums[r] = add_pairs(sums[r], weights[1], four.get<1>());
                sums[r] = add_pairs(sums[r], weights[2], four.get<2>());
                sums[r] = add_pairs(sums[r], weights[3], four.get<3>());
            }
        }
#else
        RowBases<float> x(rows.x + group.row * rows.stride + column, rows.stride);
        for (int left = num_columns(cell); left > 0; left -= 4, values += 128, x.advance(4)) {
            __m512 weights[4];
            widen_pairs(load(values), weights[0], weights[1]);
            widen_pairs(load(values + 64), weights[2], weights[3]);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const Four four(x.row(r), r % 2 == 0);
                sums[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(four.get<1>()), weights[1], sums[r]);
                sums[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(four.get<0>()), weights[0], sums[r]);
                sums[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(four.get<3>()), weights[3], sums[r]);
                sums[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(four.get<2>()), weights[2], sums[r]);
            }
        }
#endif
        UNROLL for (int r = 0; r < kRows; ++r) { totals.set(r, _mm512_add_ps(totals.load(r), sums[r])); }
    }
    totals.store(w, run);
}

// For each row of a group and each block of a run: the sums of q over its first half, its second and both, at 1, 2 and
// 3, times `factor`.
inline void fill_starts(const Rows& rows, const RowGroup& group, int64_t num_rows, int factor, int32_t* starts) {
    const __m512i firsts = _mm512_set_epi32(6, 7, 6, 6, 4, 5, 4, 4, 2, 3, 2, 2, 0, 1, 0, 0);
    const __m512i seconds = _mm512_set_epi32(7, 7, 7, 7, 5, 5, 5, 5, 3, 3, 3, 3, 1, 1, 1, 1);
    const __m512i factors = _mm512_set1_epi32(factor);
    const int64_t num_blocks = rows.num_blocks - group.block < kIntRunBlocks ? rows.num_blocks - group.block
                                                                             : static_cast<int64_t>(kIntRunBlocks);
    for (int64_t r = 0; r < num_rows; ++r, starts += kIntRunBlocks * 4) {
        const int32_t* sums = rows.sums + ((group.row + r) * rows.num_blocks + group.block) * 2;
        for (int64_t block = 0; block < num_blocks; block += 4) {
            const int64_t left = num_blocks - block;
            const auto loaded = static_cast<__mmask16>(left >= 4 ? 0xff : (1 << 2 * left) - 1);
            const __m512i halves = _mm512_maskz_loadu_epi32(loaded, sums + 2 * block);
            const __m512i first = _mm512_permutexvar_epi32(firsts, halves);
            const __m512i both = _mm512_mask_add_epi32(first, 0x8888, first, _mm512_permutexvar_epi32(seconds, halves));
            _mm512_store_si512(starts + 4 * block, _mm512_mullo_epi32(both, factors));
        }
    }
}

// One segment of a cell: `num_steps` steps from column `first` on, whose sums of q are in the given halves of the
// block. kSymmetric: the zero point is in the sums already.
template <int kRows, bool kSymmetric>
inline const uint8_t* segment_int(const Rows& rows, const RowGroup& rows_at, int32_t cell, int first, int num_steps,
                                  int halves, const SegmentGroup& group, const uint8_t* values,
                                  CellTotals<kRows>& totals) {
    const int64_t block = cell_block(cell);
    const int32_t* starts = rows_at.starts + (block - rows_at.block) * 4 + halves;
    RowBases<int8_t> q(rows.q + rows_at.row * rows.stride + block * kBlockInputs + first, rows.stride);
    Sums dots[kRows];
    const __m512i zero_points = kSymmetric ? _mm512_setzero_si512() : group.zero_points();
    UNROLL for (int r = 0; r < kRows; ++r) {
        const int32_t start = starts[r * kIntRunBlocks * 4];
        dots[r] = kSymmetric ? reinterpret_cast<Sums>(_mm512_set1_epi32(start)) : times(zero_points, start);
    }
    for (; num_steps > 0; num_steps -= 4, q.advance(16), values += 256) {
        const __m512i codes[4] = {load(values), load(values + 64), load(values + 128), load(values + 192)};
        UNROLL for (int r = 0; r < kRows; ++r) {
            const Four four(q.row(r), r % 2 == 0);
            dots[r] = dot_4(dots[r], codes[0], four.get<0>());
            dots[r] = dot_4(dots[r], codes[1], four.get<1>());
            dots[r] = dot_4(dots[r], codes[2], four.get<2>());
            dots[r] = dot_4(dots[r], codes[3], four.get<3>());
        }
    }
    const __m512 scales = group.scales();
    const float* row_scales = rows.scales + rows_at.row * rows.num_blocks + block;
    add_scaled(group.w, [&](auto scaling) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks]);
            totals.set(r, _mm512_fmadd_ps(to_floats(dots[r]), scaling.factor(row_scale, scales), totals.load(r)));
        }
    });
    return values;
}

template <int kRows, int kSteps, bool kSymmetric>
void cells_tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Run& run, const RowGroup& group) {
    CellTotals<kRows> totals(w, rows, part, run, group.row);
    const uint8_t* values = run.values;
    for (int64_t k = 0; k < run.count; ++k) {
        const int32_t cell = run.cells[k];
        if (group.fetches) prefetch<4096>(values, num_columns(cell) * kPanelOutputs);
        if constexpr (kSteps == 16) {
            const SegmentGroup segment(w, run.panel, cell_block(cell));
            values = segment_int<kRows, kSymmetric>(rows, group, cell, first_column(cell), num_columns(cell) / 4,
                                                    cell & 3, segment, values, totals);
        } else {
            for (int half = 0; half < 2; ++half) {
                if ((cell >> half & 1) == 0) continue;
                const SegmentGroup segment(w, run.panel, 2 * cell_block(cell) + half);
                values =
                    segment_int<kRows, kSymmetric>(rows, group, cell, 32 * half, 8, 1 << half, segment, values, totals);
            }
        }
    }
    totals.store(w, run);
}

using RunFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Run&, const RowGroup&);

inline constexpr RunFunction kCellBf16Tiles[kCellTileRows] = {
    cells_tile_bf16<1>,  cells_tile_bf16<2>,  cells_tile_bf16<3>,  cells_tile_bf16<4>,
    cells_tile_bf16<5>,  cells_tile_bf16<6>,  cells_tile_bf16<7>,  cells_tile_bf16<8>,
    cells_tile_bf16<9>,  cells_tile_bf16<10>, cells_tile_bf16<11>, cells_tile_bf16<12>,
    cells_tile_bf16<13>, cells_tile_bf16<14>, cells_tile_bf16<15>, cells_tile_bf16<16>};
template <int kSteps, bool kSymmetric>
inline constexpr RunFunction kCellIntTiles[kCellTileRows] = {
    cells_tile_int<1, kSteps, kSymmetric>,  cells_tile_int<2, kSteps, kSymmetric>,
    cells_tile_int<3, kSteps, kSymmetric>,  cells_tile_int<4, kSteps, kSymmetric>,
    cells_tile_int<5, kSteps, kSymmetric>,  cells_tile_int<6, kSteps, kSymmetric>,
    cells_tile_int<7, kSteps, kSymmetric>,  cells_tile_int<8, kSteps, kSymmetric>,
    cells_tile_int<9, kSteps, kSymmetric>,  cells_tile_int<10, kSteps, kSymmetric>,
    cells_tile_int<11, kSteps, kSymmetric>, cells_tile_int<12, kSteps, kSymmetric>,
    cells_tile_int<13, kSteps, kSymmetric>, cells_tile_int<14, kSteps, kSymmetric>,
    cells_tile_int<15, kSteps, kSymmetric>, cells_tile_int<16, kSteps, kSymmetric>};

// Every row, in groups of about the same size, by the runs of some panels from `block` on.
template <bool kFloats>
void multiply_runs(const RunFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part,
                   const Run* runs, int num_runs, int64_t block) {
    alignas(64) int32_t starts[kFloats ? 1 : kCellTileRows * kIntRunBlocks * 4];
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kCellTileRows - 1) / kCellTileRows;
    RowGroup group{part.row_begin, block, true, starts};
    for (int64_t i = 0; i < num_groups; ++i) {
        const int64_t count = (num_rows + i) / num_groups;
        if constexpr (!kFloats) fill_starts(rows, group, count, w.zero_points == nullptr ? -w.zero_point : -1, starts);
        for (int run = 0; run < num_runs; ++run)
            if (runs[run].count != 0 || runs[run].is_first || runs[run].is_last)
                functions[count - 1](w, rows, part, runs[run], group);
        group.row += count;
        group.fetches = false;
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
    Run next(int64_t last_block, bool is_first, bool is_last, int bytes_per_column) {
        Run run{values, cell, 0, panel, is_first, is_last};
        for (; cell != end && cell_block(*cell) < last_block; ++cell, ++run.count)
            values += num_columns(*cell) * bytes_per_column;
        return run;
    }
};

template <bool kFloats>
void many_rows_cells(const RunFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int kRunBlocks = kFloats ? kFloatRunBlocks : kIntRunBlocks;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kGroupPanels) {
        const int64_t left = part.panel_end - panel;
        const int num_panels = static_cast<int>(left < kGroupPanels ? left : kGroupPanels);
        PanelRuns panels[kGroupPanels];
        for (int i = 0; i < num_panels; ++i) panels[i].start(w, panel + i);
        for (int64_t block = 0; block < w.num_blocks; block += kRunBlocks) {
            Run runs[kGroupPanels];
            for (int i = 0; i < num_panels; ++i)
                runs[i] = panels[i].next(block + kRunBlocks, block == 0, block + kRunBlocks >= w.num_blocks,
                                         kFloats ? 32 : 16);
            multiply_runs<kFloats>(functions, w, rows, part, runs, num_panels, block);
        }
    }
}

}  // namespace rarefy::matmul::avx512
