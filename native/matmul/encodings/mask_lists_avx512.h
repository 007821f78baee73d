// Many rows by weights with many zeros, under a mask or as zero points: what is kept is listed anew in every call, as
// N:M weights are in memory (nm_avx512.h), for as many rows as pay for it. A dense product of a block of 64 columns
// takes 16 steps, whatever the zeros; with lists it takes a quarter of the most entries that one of the 16 outputs
// keeps. Each step gathers first, though, from the activations of the block, and costs one and a half times as much.
//
// The order of an output's entries is free, for a block's sum is one of integers: all bits are those of dense products.
#pragma once

#include "matmul/encodings/lists_avx512.h"

namespace rarefy::matmul::avx512 {

#if !RAREFY_PASS_AMX  // many rows in tiles are faster dense

constexpr int kMaskedBlocks = 8;  // of a stretch: its activations stay in the L1 cache
constexpr int kMaskedPanels = 8;  // that take turns with them, where their lists have room
constexpr int kMaskedRows = 12;   // of a register tile
constexpr int kFewestRows = 16;   // split into tiles of no less than kFewestTileRows
constexpr int kFewestTileRows = 8;

// The lists of a block of a panel: what the sums start from, the scales, and for each step the columns and the levels,
// which are codes less the zero point. Activations are moved to [1, 255], where they are the unsigned side of the
// products; what the sums start from takes the move back. Places beyond an output's entries have level 0.
constexpr int64_t kListHead = 128, kListStep = 128;
constexpr int64_t kMaxListBytes = kListHead + 16 * kListStep;
constexpr int64_t kMaskedBytes = 64 << 10;  // of a tile

// Fills in the steps, and returns their end. The first 16 * kQuarters bytes of each list are in use.
template <int kQuarters>
inline uint8_t* put_steps(const __m512i* columns, const __m512i* levels, int num_steps, uint8_t* out) {
    __m512i step_columns[4 * kQuarters], step_levels[4 * kQuarters];
    steps_of_lists<kQuarters>([&](int output) { return columns[output]; }, step_columns);
    steps_of_lists<kQuarters>([&](int output) { return levels[output]; }, step_levels);
    const __m512i moved_by = _mm512_set1_epi8(static_cast<char>(128));
    Sums moved{};
    UNROLL for (int step = 0; step < 4 * kQuarters; ++step) {
        _mm512_store_si512(out + kListHead + step * kListStep, step_columns[step]);
        _mm512_store_si512(out + kListHead + step * kListStep + 64, step_levels[step]);
        moved = dot_4(moved, moved_by, step_levels[step]);
    }
    _mm512_store_si512(out, reinterpret_cast<__m512i>(-moved));
    return out + kListHead + num_steps * kListStep;
}

// The lists of the next block of a stream. `num_steps` becomes how many steps they take.
template <class Stream>
inline uint8_t* put_lists(Stream& stream, __m512i zero_points, __m512 scales, int& num_steps, uint8_t* out) {
    const __m512i pruned = pruned_codes<Stream>(zero_points), zeros = every_byte(zero_points);
    __m512i steps[16], outputs[16], columns[16];
    begin_segment(stream, kBlockInputs);
    stream.fetch(16);
    UNROLL for (int pair = 0; pair < 8; ++pair) {
        stream.next(pruned, steps[2 * pair], steps[2 * pair + 1]);
        if constexpr (Stream::kOddShift != 0)
            steps[2 * pair + 1] = _mm512_srli_epi16(steps[2 * pair + 1], Stream::kOddShift);
    }
    UNROLL for (int step = 0; step < 16; ++step) { steps[step] = _mm512_sub_epi8(steps[step], zeros); }
    steps_of_lists<4>([&](int step) { return steps[step]; }, outputs);  // which transposes
    alignas(64) static constexpr uint8_t kColumns[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    // A free place has column 64: as the index of two vectors it means zero in the second, as that of one column 0.
    const __m512i all_columns = load(kColumns), free_place = _mm512_set1_epi8(64);
    __m512i all_free = free_place;
    UNROLL for (int output = 0; output < 16; ++output) {
        const __mmask64 kept = _mm512_test_epi8_mask(outputs[output], outputs[output]);
        columns[output] = _mm512_mask_compress_epi8(free_place, kept, all_columns);
        all_free = _mm512_and_si512(all_free, columns[output]);
        outputs[output] = _mm512_permutex2var_epi8(outputs[output], columns[output], _mm512_setzero_si512());
    }
    const uint64_t used = _cvtmask64_u64(_mm512_testn_epi8_mask(all_free, free_place));
    num_steps = (static_cast<int>(_mm_popcnt_u64(used)) + 3) / 4;
    _mm512_store_ps(out + 64, scales);
    if (num_steps <= 4) return put_steps<1>(columns, outputs, num_steps, out);
    if (num_steps <= 8) return put_steps<2>(columns, outputs, num_steps, out);
    return put_steps<4>(columns, outputs, num_steps, out);
}

// Some panels and blocks with their lists, in order: those of a panel come together.
struct MaskedTile {
    const uint8_t* lists;
    int64_t panel, num_panels;
    int64_t block, num_blocks;
    int num_steps[kMaskedPanels][kMaskedBlocks];
    // Sums that are not finished, (rows of the part, kMaskedPanels from first_panel on, kPanelOutputs). Rows of y that
    // lie a power of two apart would push each other out of the caches between two stretches of blocks.
    float* unfinished;
    int64_t first_panel;
};

// kRows rows from `row` on by a tile.
template <int kRows>
void masked_tile(const PanelWeights& w, const Rows& rows, const Part& part, const MaskedTile& tile, int64_t row) {
    alignas(64) uint8_t moved_q[kMaskedBlocks][kRows][64];
    float row_scales[kMaskedBlocks][kRows];
    const __m512i moved_by = _mm512_set1_epi8(static_cast<char>(128));
    for (int r = 0; r < kRows; ++r) {
        const int8_t* q = rows.q + (row + r) * rows.stride + tile.block * kBlockInputs;
        const float* scales = rows.scales + (row + r) * rows.num_blocks + tile.block;
        for (int64_t i = 0; i < tile.num_blocks; ++i) {
            _mm512_store_si512(moved_q[i][r], _mm512_xor_si512(load(q + i * kBlockInputs), moved_by));
            row_scales[i][r] = scales[i];
        }
    }
    const uint8_t* from = tile.lists;
    for (int64_t p = 0; p < tile.num_panels; ++p) {
        const bool finishes = tile.block + tile.num_blocks == w.num_blocks;
        float* const y = part.y + row * part.y_stride + (tile.panel + p) * kPanelOutputs;
        const int64_t place = (row - part.row_begin) * kMaskedPanels + tile.panel + p - tile.first_panel;
        float* const unfinished = tile.unfinished + place * kPanelOutputs;
        constexpr int64_t kStride = kMaskedPanels * kPanelOutputs;
        __m512 totals[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) {
            totals[r] = tile.block == 0 ? _mm512_setzero_ps() : _mm512_load_ps(unfinished + r * kStride);
            if (finishes) _mm_prefetch(reinterpret_cast<const char*>(y + r * part.y_stride), _MM_HINT_T0);
        }
        for (int64_t i = 0; i < tile.num_blocks; ++i) {
            Sums sums[kRows];
            UNROLL for (int r = 0; r < kRows; ++r) { sums[r] = reinterpret_cast<Sums>(load(from)); }
            const __m512 scales = _mm512_load_ps(from + 64);
            from += kListHead;
            for (int step = tile.num_steps[p][i]; step > 0; --step, from += kListStep) {
                const __m512i columns = load(from), levels = load(from + 64);
                const uint8_t* step_q = moved_q[i][0];
                __asm__ volatile("" : "+r"(step_q));  // or gcc keeps all rows in registers, and the sums in memory
                UNROLL for (int r = 0; r < kRows; ++r) {
                    sums[r] = dot_4(sums[r], _mm512_permutexvar_epi8(columns, load(step_q + 64 * r)), levels);
                }
            }
            add_scaled(w, [&](auto scaling) {
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512 factor = scaling.factor(_mm512_set1_ps(row_scales[i][r]), scales);
                    totals[r] = _mm512_fmadd_ps(to_floats(sums[r]), factor, totals[r]);
                }
            });
        }
        if (!finishes) {
            UNROLL for (int r = 0; r < kRows; ++r) { _mm512_store_ps(unfinished + r * kStride, totals[r]); }
            continue;
        }
        const __mmask16 lanes = output_lanes(w, tile.panel + p);
        const __m512 factor = output_factor(w, tile.panel + p, true);
        UNROLL for (int r = 0; r < kRows; ++r) {
            _mm512_mask_storeu_ps(y + r * part.y_stride, lanes, _mm512_mul_ps(totals[r], factor));
        }
    }
}

using MaskedTileFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const MaskedTile&, int64_t row);

inline constexpr MaskedTileFunction kMaskedTiles[] = {masked_tile<8>, masked_tile<9>, masked_tile<10>, masked_tile<11>,
                                                      masked_tile<12>};

// The end of the panels that take turns, from `begin` on.
inline int64_t panels_end(const Part& part, int64_t begin) {
    return begin + kMaskedPanels < part.panel_end ? begin + kMaskedPanels : part.panel_end;
}

// No fewer than kFewestRows rows.
template <class Stream>
void rows_by_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) uint8_t lists[kMaskedBytes];
    alignas(64) float unfinished[kTaskRows * kMaskedPanels * kPanelOutputs];
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kMaskedRows - 1) / kMaskedRows;
    MaskedTile tile;
    tile.lists = lists;
    tile.unfinished = unfinished;
    for (int64_t begin = part.panel_begin; begin < part.panel_end; begin += kMaskedPanels) {
        const int64_t end = panels_end(part, begin);
        tile.first_panel = begin;
        Stream streams[kMaskedPanels];
        for (int64_t panel = begin; panel < end; ++panel) streams[panel - begin].start(w, panel);
        for (tile.block = 0; tile.block < w.num_blocks; tile.block += kMaskedBlocks) {
            const int64_t blocks_left = w.num_blocks - tile.block;
            tile.num_blocks = blocks_left < kMaskedBlocks ? blocks_left : kMaskedBlocks;
            for (tile.panel = begin; tile.panel < end; tile.panel += tile.num_panels) {
                uint8_t* out = lists;
                tile.num_panels = 0;
                do {
                    const int64_t panel = tile.panel + tile.num_panels;
                    int* const num_steps = tile.num_steps[tile.num_panels++];
                    Groups groups(w, tile.block);
                    for (int64_t i = 0; i < tile.num_blocks; ++i, groups.advance())
                        out = put_lists(streams[panel - begin], groups.zero_points(panel), groups.scales(panel),
                                        num_steps[i], out);
                } while (tile.panel + tile.num_panels < end &&
                         lists + kMaskedBytes - out >= kMaskedBlocks * kMaxListBytes);
                int64_t row = part.row_begin;
                for (int64_t group = 0; group < num_groups; ++group) {
                    const int64_t count = (num_rows + group) / num_groups;
                    kMaskedTiles[count - kFewestTileRows](w, rows, part, tile, row);
                    row += count;
                }
            }
        }
    }
}

// Whether lists of some panels save time with so many rows. In quarters of a cycle, measured on 2048 x 4096: a block
// costs each row 3 for a step of a list and 12 besides, or as dense codes 39, once they are expanded, and 49 while rows
// are too few for that. Its lists cost 500 to make, and 180 to expand it. With 128 rows lists pay for up to 8.1 steps,
// which is what random zeros of 62 % take.
inline bool lists_pay(const PanelWeights& w, int64_t panel, int64_t panel_end, int64_t num_rows) {
    const int64_t num_blocks = (panel_end - panel) * w.num_blocks;
    int64_t num_steps = 0;
    for (; panel < panel_end; ++panel) num_steps += reinterpret_cast<const int32_t*>(w.extra)[panel];
    const int64_t dense = num_rows < kFewestExpandedRows ? 49 * num_rows : 39 * num_rows + 180;
    return num_rows * (3 * num_steps + 12 * num_blocks) + 500 * num_blocks < dense * num_blocks;
}

#endif

// Two rows or more. kNarrow: the codes have fewer than 8 bits, of which those less zero points of their own may need 9.
template <class ListedStream, class Stream, bool kNarrow>
void many_rows_or_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
#if !RAREFY_PASS_AMX
    const bool may_list = w.extra != nullptr && (kNarrow || w.zero_points == nullptr);
    const int64_t num_rows = part.row_end - part.row_begin;
    if (may_list && num_rows >= kFewestRows) {
        // As many panels at once as share a stretch of activations, however they are multiplied.
        const auto pays = [&](int64_t panel) { return lists_pay(w, panel, panels_end(part, panel), num_rows); };
        Part run = part;
        for (; run.panel_begin < part.panel_end; run.panel_begin = run.panel_end) {
            const bool lists = pays(run.panel_begin);
            run.panel_end = panels_end(part, run.panel_begin);
            while (run.panel_end < part.panel_end && pays(run.panel_end) == lists)
                run.panel_end = panels_end(part, run.panel_end);
            (lists ? rows_by_lists<ListedStream> : many_rows_int<Stream>)(w, rows, run);
        }
        return;
    }
#endif
    many_rows_int<Stream>(w, rows, part);
}

template <class OneRowStream, class ManyRowsStream>
void multiply_masked(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin > 1)
        many_rows_or_lists<OneRowStream, ManyRowsStream, ManyRowsStream::kOddShift == 4>(w, rows, part);
    else
        multiply_int<OneRowStream>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
