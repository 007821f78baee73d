// Products with many rows on AMX: 16 rows of activations by one panel. The rest of the AMX kernels are the AVX-512
// ones, compiled a second time as the namespace amx (CMakeLists.txt); core_avx512.h comes here from there. A block of a
// panel, expanded to one step per vector, is exactly what a tile of weights must look like: 64 columns of codes, or 2
// tiles of 32 columns of bfloat16.
//
// Codes: the sums of a segment are integers and leave the tile for the scales, so all bits are those of AVX-512.
// bfloat16: the sums of a block leave the tile for the total. Within a block they are in another order than on AVX-512.
//
// All of this has run in the emulation of tiles_amx.h, never on hardware: nothing here is tuned.
#pragma once

#include "matmul/bf16_avx512.h"
#include "matmul/tiles_amx.h"

namespace rarefy::matmul::amx {

constexpr int kAmxRows = 8;  // fewer rows are multiplied without tiles
constexpr int kTileRows = 16;
constexpr int kTileColumns = 32;  // of bfloat16
constexpr int kCodeBlocks = 8;    // 8 KiB of expanded codes
constexpr int kPairBlocks = 8;    // 16 KiB of expanded bfloat16

// Tile 0: sums; 1: `num_rows` rows of activations, `row_bytes` of each; 2: weights.
inline void configure_tiles(int num_rows, int row_bytes) {
    alignas(64) TileConfig config;
    config.num_rows[0] = config.num_rows[1] = static_cast<uint8_t>(num_rows);
    config.num_rows[2] = static_cast<uint8_t>(row_bytes / 4);
    config.row_bytes[0] = config.row_bytes[2] = 64;
    config.row_bytes[1] = static_cast<uint16_t>(row_bytes);
    TILE_CONFIGURE(config);
}

inline int rows_left(const Part& part, int64_t row) {
    const int64_t left = part.row_end - row;
    return static_cast<int>(left < kTileRows ? left : kTileRows);
}

inline Lanes outputs(const PanelWeights& w, const Part& part, int64_t row, int64_t panel) {
    return Lanes(w, panel, part.y + row * part.y_stride + panel * kPanelOutputs);
}

// totals += what the dot products of a segment of `block` stand for; sum_of(sums of q per half block of a row): of the
// segment.
template <class SumOf>
inline void add_segment(const Groups& groups, const Rows& rows, int64_t panel, int64_t block, int64_t row, int num_rows,
                        const int32_t (*dots)[kPanelOutputs], __m512* totals, SumOf sum_of) {
    const __m512i zero_points = groups.zero_points(panel);
    const __m512 scales = groups.scales(panel);
    for (int r = 0; r < num_rows; ++r) {
        const int64_t first = (row + r) * rows.num_blocks;
        const __m512i sum = _mm512_set1_epi32(sum_of(rows.sums + 2 * first));
        const __m512i levels = _mm512_sub_epi32(load(dots[r]), _mm512_mullo_epi32(zero_points, sum));
        const __m512 row_scale = _mm512_set1_ps(rows.scales[first + block]);
        totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(levels), _mm512_mul_ps(row_scale, scales), totals[r]);
    }
}

// Rows [row, row + num_rows) by the expanded blocks [begin, end) of a panel; the sums start at 0 with block 0, else at
// y.
template <int kSteps>
void tile_codes(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t begin, int64_t end,
                const uint8_t* codes, int64_t row, int num_rows) {
    constexpr int kSegments = 16 / kSteps;
    alignas(64) int32_t dots[kTileRows][kPanelOutputs];
    __m512 totals[kTileRows];
    for (int r = 0; r < num_rows; ++r) totals[r] = outputs(w, part, row + r, panel).load_unless(begin == 0);
    const int8_t* q = rows.q + row * rows.stride + begin * kBlockInputs;
    Groups groups(w, begin * kSegments);
    for (int64_t segment = begin * kSegments; segment < end * kSegments; ++segment) {
        TILE_ZERO(0);
        TILE_LOAD(1, q, rows.stride);
        TILE_LOAD(2, codes, 64);
        TILE_DOT_S8_U8(0, 1, 2);
        TILE_STORE(0, dots, 64);
        q += 4 * kSteps;
        codes += 64 * kSteps;
        add_segment(groups, rows, panel, segment / kSegments, row, num_rows, dots, totals,
                    [&](const int32_t* half_sums) { return segment_sum<kSteps>(half_sums, segment); });
        groups.advance();
    }
    const __m512 factor = output_factor(w, panel, end == w.num_blocks);
    for (int r = 0; r < num_rows; ++r) outputs(w, part, row + r, panel).store(_mm512_mul_ps(totals[r], factor));
}

template <class Stream, int kSteps>
void tiles_int_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) uint8_t codes[kCodeBlocks * kBlockInputs * kPanelOutputs];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream;
        stream.start(w, panel);
        for (int64_t begin = 0; begin < w.num_blocks; begin += kCodeBlocks) {
            const int64_t end = begin + kCodeBlocks < w.num_blocks ? begin + kCodeBlocks : w.num_blocks;
            expand_codes<Stream, kSteps>(w, stream, panel, begin, end, codes);
            for (int64_t row = part.row_begin; row < part.row_end; row += kTileRows) {
                const int num_rows = rows_left(part, row);
                configure_tiles(num_rows, 4 * kSteps);
                tile_codes<kSteps>(w, rows, part, panel, begin, end, codes, row, num_rows);
            }
        }
    }
    TILE_RELEASE();
}

template <class Stream>
void tiles_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        tiles_int_steps<Stream, 16>(w, rows, part);
    else
        tiles_int_steps<Stream, 8>(w, rows, part);
}

// Rows [row, row + num_rows) by the blocks [begin, end) of a panel, whose steps are at `pairs`; the sums start at 0
// with block 0, else at y.
inline void tile_bf16(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t begin,
                      int64_t end, const uint8_t* pairs, int64_t row, int num_rows) {
    constexpr int kTileBytes = 16 * 64;
    alignas(64) float sums[kTileRows][kPanelOutputs];
    __m512 totals[kTileRows];
    for (int r = 0; r < num_rows; ++r) totals[r] = outputs(w, part, row + r, panel).load_unless(begin == 0);
    const uint16_t* x = rows.bf16_x + row * rows.stride + begin * kBlockInputs;
    for (int64_t block = begin; block < end; ++block) {
        TILE_ZERO(0);
        for (int half = 0; half < 2; ++half, x += kTileColumns, pairs += kTileBytes) {
            TILE_LOAD(1, x, rows.stride * 2);
            TILE_LOAD(2, pairs, 64);
            TILE_DOT_BF16(0, 1, 2);
        }
        TILE_STORE(0, sums, 64);
        for (int r = 0; r < num_rows; ++r) totals[r] = _mm512_add_ps(totals[r], _mm512_load_ps(sums[r]));
    }
    for (int r = 0; r < num_rows; ++r) outputs(w, part, row + r, panel).store(totals[r]);
}

template <class Stream>
void tiles_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) uint8_t pairs[kPairBlocks * kBlockInputs * kPanelOutputs * 2];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream;
        stream.start(w, panel);
        for (int64_t begin = 0; begin < w.num_blocks; begin += kPairBlocks) {
            const int64_t end = begin + kPairBlocks < w.num_blocks ? begin + kPairBlocks : w.num_blocks;
            expand_pairs(stream, end - begin, pairs);
            for (int64_t row = part.row_begin; row < part.row_end; row += kTileRows) {
                const int num_rows = rows_left(part, row);
                configure_tiles(num_rows, 64);
                tile_bf16(w, rows, part, panel, begin, end, pairs, row, num_rows);
            }
        }
    }
    TILE_RELEASE();
}

}  // namespace rarefy::matmul::amx
