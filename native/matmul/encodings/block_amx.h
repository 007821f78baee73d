// AMX kernels of the block sparse encodings with many rows; see block.h and core_amx.h. A stored cell of codes is a
// tile as it is packed, half a cell a shorter one; half a cell of bfloat16 is a tile. A cell meets up to four tiles of
// rows.
//
// Codes give the bits of AVX-512. bfloat16: tiles hold the sums of a panel, which add in an order of their own.
#pragma once

#include "matmul/core_amx.h"

namespace rarefy::matmul::amx {

// Tiles 0 to 3: sums of the tiles of rows; 4: activations of one of them; 5: weights; 6 and 7: the same of half a cell
// of codes.
inline TileConfig cell_shapes(const int* heights) {
    TileConfig config;
    for (int t = 0; t < kMaxTiles; ++t) set_shape(config, t, heights[t], 64);
    set_shape(config, 4, heights[0], 64);
    set_shape(config, 5, kTileRows, 64);
    set_shape(config, 6, heights[0], 32);
    set_shape(config, 7, kTileRows / 2, 64);
    return config;
}

enum class Cell { codes, half_codes, half_pairs };

// Tiles 0 to 3 += the tiles of rows whose columns are at x(t), by a tile of weights.
template <Cell kCell, int kTiles, class X>
inline void multiply_cell(const X& x, int64_t stride_bytes, const uint8_t* values) {
#define MULTIPLY_CELL(DOT, ROWS, WEIGHTS)    \
    TILE_LOAD(WEIGHTS, values, 64);          \
    TILE_LOAD(ROWS, x(0), stride_bytes);     \
    DOT(0, ROWS, WEIGHTS);                   \
    if constexpr (kTiles > 1) {              \
        TILE_LOAD(ROWS, x(1), stride_bytes); \
        DOT(1, ROWS, WEIGHTS);               \
    }                                        \
    if constexpr (kTiles > 2) {              \
        TILE_LOAD(ROWS, x(2), stride_bytes); \
        DOT(2, ROWS, WEIGHTS);               \
        TILE_LOAD(ROWS, x(3), stride_bytes); \
        DOT(3, ROWS, WEIGHTS);               \
    }
    if constexpr (kCell == Cell::codes) {
        MULTIPLY_CELL(TILE_DOT_S8_U8, 4, 5)
    } else if constexpr (kCell == Cell::half_codes) {
        MULTIPLY_CELL(TILE_DOT_S8_U8, 6, 7)
    } else {
        MULTIPLY_CELL(TILE_DOT_BF16, 4, 5)
    }
#undef MULTIPLY_CELL
}

// Calls take(block, halves, first half) for what lies in one group of weights each: whole cells of a list, or halves.
template <class Take>
inline void walk_segments(const PanelWeights& w, int64_t panel, bool by_halves, const Take& take) {
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    for (int64_t k = 0; k < count; ++k) {
        const int64_t block = cell_block(cells[k]);
        const int halves = cells[k] & 3;
        if (!by_halves) {
            take(block, halves, first_column(cells[k]) / 32);
            continue;
        }
        for (int half = 0; half < 2; ++half)
            if (halves >> half & 1) take(block, 1 << half, half);
    }
}

// The sums of a panel and a group of rows, with what they begin with.
template <int kTiles>
struct CellSums {
    alignas(64) float totals[kTiles][1][kTileRows][kPanelOutputs];
    CellSums(const Rows& rows, const TiledRows& group) {
        for (int t = 0; t < kTiles; ++t)
            for (int r = 0; r < group.heights[t]; ++r)
                _mm512_store_ps(totals[t][0][r], _mm512_set1_ps(rows.starts[group.rows[t] + r]));
    }
    void store(const PanelWeights& w, const Part& part, const TiledRows& group, int64_t panel, __m512 factor) const {
        for (int t = 0; t < kTiles; ++t)
            for (int r = 0; r < group.heights[t]; ++r)
                output_row(w, part, group.rows[t] + r, panel)
                    .store(_mm512_mul_ps(_mm512_load_ps(totals[t][0][r]), factor));
    }
};

template <int kTiles>
void tile_cells_int8(const PanelWeights& w, const Rows& rows, const Part& part, const TiledRows& group, int64_t panel) {
    // Of so many segments, and of as many before: while tiles multiply the next ones, vectors scale these.
    constexpr int kTogether = 2;
    alignas(64) int32_t dots[2 * kTogether][kTiles][1][kTileRows][kPanelOutputs];
    struct Segment {
        int64_t block;
        int halves, first;
    } segments[2 * kTogether];
    CellSums<kTiles> sums(rows, group);
    int64_t num_segments = 0, num_added = 0;
    const auto add = [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        Segment these[kCount];
        __m512 scales[kCount][1];
        __m512i zero_points[kCount];
        const int32_t (*some[kCount])[1][kTileRows][kPanelOutputs];
        bool are_whole = true;
        UNROLL for (int i = 0; i < kCount; ++i) {
            const int64_t place = (num_added + i) % (2 * kTogether);
            these[i] = segments[place];
            some[i] = dots[place];
            are_whole &= these[i].halves == 3;
            const Groups groups(w, w.steps_per_segment == 16 ? these[i].block : 2 * these[i].block + these[i].first);
            scales[i][0] = groups.scales(panel);
            zero_points[i] = groups.zero_points(panel);
        }
        const auto scale = [&](const auto& start) {
            add_segments<kCount, kTiles, 1>(w, rows, group, scales, some, sums.totals, start,
                                            [&](int i) { return these[i].block; });
        };
        const auto sum_of_codes = [&](int64_t row, int i) {
            const int32_t* half_sums = rows.sums + (row * rows.num_blocks + these[i].block) * 2;
            return (these[i].halves & 1 ? half_sums[0] : 0) + (these[i].halves & 2 ? half_sums[1] : 0);
        };
        if (w.zero_points != nullptr) {
            scale([&](int64_t row, int i, int, __m512i codes) {
                const __m512i sum = _mm512_set1_epi32(sum_of_codes(row, i));
                return _mm512_sub_epi32(codes, _mm512_mullo_epi32(zero_points[i], sum));
            });
        } else if (are_whole && w.zero_point == kByteZeroPoint) {
            scale([&](int64_t row, int i, int, __m512i codes) {
                const int32_t* starts = rows.byte_starts + row * rows.num_blocks;
                return _mm512_add_epi32(codes, _mm512_set1_epi32(starts[these[i].block]));
            });
        } else {
            scale([&](int64_t row, int i, int, __m512i codes) {
                return _mm512_sub_epi32(codes, _mm512_set1_epi32(w.zero_point * sum_of_codes(row, i)));
            });
        }
        num_added += kCount;
    };
    const uint8_t* values = w.values + w.value_offsets[panel];
    walk_segments(w, panel, w.steps_per_segment == 8, [&](int64_t block, int halves, int first) {
        const int8_t* q = rows.q + block * kBlockInputs + first * 32;
        const auto x = [&](int t) { return q + group.rows[t] * rows.stride; };
        zero_sums<kTiles>();
        if (halves == 3)
            multiply_cell<Cell::codes, kTiles>(x, rows.stride, values);
        else
            multiply_cell<Cell::half_codes, kTiles>(x, rows.stride, values);
        const int64_t place = num_segments++ % (2 * kTogether);
        store_sums<kTiles>([&](int t) { return dots[place][t][0]; }, 64);
        segments[place] = {block, halves, first};
        if (num_segments - num_added == 2 * kTogether) add(std::integral_constant<int, kTogether>());
        values += (halves == 3 ? kBlockInputs : kBlockInputs / 2) * kPanelOutputs;
    });
    while (num_segments - num_added >= kTogether) add(std::integral_constant<int, kTogether>());
    if (num_added < num_segments) add(std::integral_constant<int, 1>());
    sums.store(w, part, group, panel, output_factor(w, panel, true));
}

template <int kTiles>
void tile_cells_bf16(const PanelWeights& w, const Rows& rows, const Part& part, const TiledRows& group, int64_t panel) {
    CellSums<kTiles> sums(rows, group);
    const auto at = [&](int t) { return sums.totals[t][0]; };
    load_sums<kTiles>(at, 64);
    const uint8_t* values = w.values + w.value_offsets[panel];
    walk_segments(w, panel, true, [&](int64_t block, int, int first) {
        const uint16_t* columns = rows.bf16_x + block * kBlockInputs + first * kTileColumns;
        multiply_cell<Cell::half_pairs, kTiles>([&](int t) { return columns + group.rows[t] * rows.stride; },
                                                rows.stride * 2, values);
        values += kTileBytes;
    });
    store_sums<kTiles>(at, 64);
    sums.store(w, part, group, panel, _mm512_set1_ps(1.0f));
}

using TileCells = void (*)(const PanelWeights&, const Rows&, const Part&, const TiledRows&, int64_t panel);

// `functions`: for 1, 2 and 4 tiles of rows.
inline void tile_cells(const PanelWeights& w, const Rows& rows, const Part& part, const TileCells (&functions)[3]) {
    ConfiguredTiles tiles(cell_shapes);
    walk_tiled_rows<kMaxTiles, true>(part, [&](const TiledRows& group) {
        tiles.configure(group);
        for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel)
            functions[group.num_tiles / 2](w, rows, part, group, panel);
    });
}

inline constexpr TileCells kTileCellsInt8[3] = {tile_cells_int8<1>, tile_cells_int8<2>, tile_cells_int8<4>};
inline constexpr TileCells kTileCellsBf16[3] = {tile_cells_bf16<1>, tile_cells_bf16<2>, tile_cells_bf16<4>};

}  // namespace rarefy::matmul::amx
