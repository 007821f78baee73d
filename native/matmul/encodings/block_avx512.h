// AVX-512 kernels of the block sparse encodings; see block.h.
#pragma once

#include "matmul/encodings/block_lanes_avx512.h"

namespace rarefy::matmul::avx512 {

// One row on its way through the cells of some panels. The values of a panel and its list begin where those of the
// panel before end: to read the offsets would be to wait for memory that nothing fetches.
struct CellWalk {
    const uint8_t* values;
    const int32_t *cell = nullptr, *end = nullptr;
    int64_t panel, panel_end;
    __m512 total = _mm512_setzero_ps();
    CellWalk(const PanelWeights& w, const Rows& rows, const Part& part, int64_t begin, int64_t last)
        : values(w.values + w.value_offsets[begin]),
          panel(begin),
          panel_end(last),
          next_list(reinterpret_cast<const int32_t*>(w.extra + w.extra_offsets[begin])) {
        if (panel == panel_end) return;
        start(w, rows, part);
        if (cell == end) finish_panel(w, rows, part);
    }
    bool has_cell() const { return panel != panel_end; }
    // To the next cell, past the end of the panel and of those that have none.
    void advance(const PanelWeights& w, const Rows& rows, const Part& part) {
        if (++cell == end) finish_panel(w, rows, part);
    }

private:
    const int32_t* next_list;

    void start(const PanelWeights& w, const Rows& rows, const Part& part) {
        cell = next_list + 1;
        end = cell + *next_list;
        next_list += list_words(*next_list);
        total = _mm512_set1_ps(rows.starts[part.row_begin]);
        // What the walk through the next panel begins with, and no stream leads to.
        if (!fetches<1>()) return;
        prefetch<0>(next_list, 192);
        if (w.scales != nullptr) prefetch<0>(w.scales_at(w.group_place(panel + 1, 0)), 256);
    }
    void finish_panel(const PanelWeights& w, const Rows& rows, const Part& part) {
        do {
            const __m512 output = _mm512_mul_ps(total, output_factor(w, panel, true));
            Lanes(w, panel, part.y + part.row_begin * part.y_stride + panel * kPanelOutputs).store(output);
            if (++panel == panel_end) return;
            start(w, rows, part);
        } while (cell == end);
    }
};

// Walks through two stretches of panels of about as many bytes, each a sequential read of memory; or through one, where
// they would be so short that fetching ahead in the first would only reach into the second. `take` takes the cells that
// one walk is at, or two are, which then have all columns.
template <class Take>
inline void walk_cells(const PanelWeights& w, const Rows& rows, const Part& part, const Take& take) {
    constexpr int64_t kShortest = 32 << 10;
    int64_t middle = part.panel_end, second_begin = part.panel_begin + part.distance;
    int64_t second_end = part.panel_end + part.distance;
    if (part.distance == 0) {
        const int64_t* const offsets = w.value_offsets;
        const int64_t begin = offsets[part.panel_begin], num_bytes = offsets[part.panel_end] - begin;
        middle = part.panel_begin;
        if (num_bytes >= 2 * kShortest)
            while (offsets[middle] - begin < num_bytes / 2) ++middle;
        second_begin = middle;
    }
    CellWalk first(w, rows, part, part.panel_begin, middle), second(w, rows, part, second_begin, second_end);
    while (first.has_cell() && second.has_cell()) {
        if ((*first.cell & *second.cell & 3) == 3) {
            take.two(first, second);
        } else {
            take.one(first);
            take.one(second);
        }
        first.advance(w, rows, part);
        second.advance(w, rows, part);
    }
    for (; first.has_cell(); first.advance(w, rows, part)) take.one(first);
    for (; second.has_cell(); second.advance(w, rows, part)) take.one(second);
}

// kWalks walks take one cell each, of so many columns, so that their chains of additions overlap.
template <int kWalks>
inline void take_cells_bf16(const uint16_t* row_x, CellWalk* const (&walks)[kWalks], int columns) {
    const uint16_t* x[kWalks];
    __m512 sums[kWalks];
    UNROLL for (int i = 0; i < kWalks; ++i) {
        x[i] = row_x + cell_block(*walks[i]->cell) * kBlockInputs + first_column(*walks[i]->cell);
        sums[i] = _mm512_setzero_ps();
    }
    for (int column = 0; column < columns; column += 2) {
        UNROLL for (int i = 0; i < kWalks; ++i) {
            const uint8_t* values = walks[i]->values + column * 32;
            if (fetches<1>()) prefetch<2048>(values, 64);
            sums[i] = add_pairs(sums[i], load(values), broadcast_pair(x[i] + column));
        }
    }
    UNROLL for (int i = 0; i < kWalks; ++i) {
        walks[i]->values += columns * 32;
        walks[i]->total = _mm512_add_ps(walks[i]->total, sums[i]);
    }
}

struct TakeBf16 {
    const uint16_t* row_x;
    void two(CellWalk& a, CellWalk& b) const { take_cells_bf16<2>(row_x, {&a, &b}, kBlockInputs); }
    void one(CellWalk& walk) const { take_cells_bf16<1>(row_x, {&walk}, num_columns(*walk.cell)); }
};

// kWalks walks take one segment each of the cells that they are at: `num_steps` steps from column `first` on, in the
// given halves of the block.
template <int kWalks, int kSteps>
inline void take_segments(const PanelWeights& w, const Rows& rows, int64_t row, CellWalk* const (&walks)[kWalks],
                          int first, int num_steps, int halves) {
    const int8_t* row_q = rows.q + row * rows.stride;
    const int8_t* q[kWalks];
    Sums evens[kWalks], odds[kWalks];
    __m512 scales[kWalks];
    UNROLL for (int i = 0; i < kWalks; ++i) {
        const int64_t block = cell_block(*walks[i]->cell);
        const SegmentGroup group(w, walks[i]->panel, kSteps == 16 ? block : 2 * block + first / 32);
        const int32_t* sums = rows.sums + (row * rows.num_blocks + block) * 2;
        const int32_t sum = (sums[0] & -(halves & 1)) + (sums[1] & -(halves >> 1));
        evens[i] = w.zero_points == nullptr ? reinterpret_cast<Sums>(_mm512_set1_epi32(-w.zero_point * sum))
                                            : times(group.zero_points(), -sum);
        odds[i] = Sums{};
        scales[i] = _mm512_mul_ps(_mm512_set1_ps(rows.scales[row * rows.num_blocks + block]), group.scales());
        q[i] = row_q + block * kBlockInputs + first;
    }
    for (int step = 0; step < num_steps; step += 2) {
        UNROLL for (int i = 0; i < kWalks; ++i) {
            const uint8_t* values = walks[i]->values + step * 64;
            if (fetches<1>()) prefetch<4096>(values, 128);
            evens[i] = dot_4(evens[i], load(values), broadcast_4(q[i] + 4 * step));
            odds[i] = dot_4(odds[i], load(values + 64), broadcast_4(q[i] + 4 * step + 4));
        }
    }
    UNROLL for (int i = 0; i < kWalks; ++i) {
        walks[i]->values += num_steps * 64;
        walks[i]->total = _mm512_fmadd_ps(to_floats(evens[i] + odds[i]), scales[i], walks[i]->total);
    }
}

// One cell each, with the same halves.
template <int kWalks, int kSteps>
inline void take_cells_int(const PanelWeights& w, const Rows& rows, const Part& part,
                           CellWalk* const (&walks)[kWalks]) {
    const int32_t cell = *walks[0]->cell;
    UNROLL for (int i = 0; i < kWalks; ++i) {
        // No hardware foresees which scales come next.
        constexpr int kCellsAhead = 5;
        if (fetches<1>() && walks[i]->end - walks[i]->cell > kCellsAhead) {
            const int64_t segment = cell_block(walks[i]->cell[kCellsAhead]) * (16 / kSteps);
            const int64_t place = SegmentGroup(w, walks[i]->panel, segment).place;
            prefetch<0>(w.scales_at(place), 64);
        }
    }
    if constexpr (kSteps == 16) {
        take_segments<kWalks, 16>(w, rows, part.row_begin, walks, first_column(cell), num_columns(cell) / 4, cell & 3);
    } else {
        for (int half = 0; half < 2; ++half)
            if (cell >> half & 1) take_segments<kWalks, 8>(w, rows, part.row_begin, walks, 32 * half, 8, 1 << half);
    }
}

template <int kSteps>
struct TakeCodes {
    const PanelWeights& w;
    const Rows& rows;
    const Part& part;
    void two(CellWalk& a, CellWalk& b) const { take_cells_int<2, kSteps>(w, rows, part, {&a, &b}); }
    void one(CellWalk& walk) const { take_cells_int<1, kSteps>(w, rows, part, {&walk}); }
};

inline void multiply_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
#if RAREFY_PASS_AMX
    if (part.row_end - part.row_begin >= kAmxRows) return tile_cells(w, rows, part, kTileCellsBf16);
#endif
    if (part.row_end - part.row_begin == 1)
        walk_cells(w, rows, part, TakeBf16{rows.bf16_x + part.row_begin * rows.stride});
    else if (rows.row_panels != nullptr)
        lanes_by_cells<PairSegment>(w, rows, part,
                                    [&](const Part& some) { many_rows_cells<true>(kCellBf16Tiles, w, rows, some); });
    else
        many_rows_cells<true>(kCellBf16Tiles, w, rows, part);
}

template <int kSteps, bool kSymmetric>
void multiply_cells_int8_as(const PanelWeights& w, const Rows& rows, const Part& part) {
    const auto tiles = [&](const Part& some) {
        many_rows_cells<false>(kCellIntTiles<kSteps, kSymmetric>, w, rows, some);
    };
    if (part.row_end - part.row_begin == 1)
        walk_cells(w, rows, part, TakeCodes<kSteps>{w, rows, part});
    else if (rows.row_panels != nullptr)
        lanes_by_cells<CodeSegment<kSymmetric>>(w, rows, part, tiles);
    else
        tiles(part);
}

inline void multiply_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
#if RAREFY_PASS_AMX
    if (part.row_end - part.row_begin >= kAmxRows) return tile_cells(w, rows, part, kTileCellsInt8);
#endif
    const bool is_symmetric = w.zero_points == nullptr;
    if (w.steps_per_segment == 16)
        (is_symmetric ? multiply_cells_int8_as<16, true> : multiply_cells_int8_as<16, false>)(w, rows, part);
    else
        (is_symmetric ? multiply_cells_int8_as<8, true> : multiply_cells_int8_as<8, false>)(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
