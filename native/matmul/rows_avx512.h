// Products with several rows of activations, by two panels at a time: what is decoded into registers is multiplied with
// up to 8 rows at once. Bytes and nibbles are cheap enough to decode again for the next 8; what is under a mask or in
// bits is expanded once for many rows.
#pragma once

#include "matmul/tiles_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int64_t kFewestExpandedRows = 32;  // that pay for storing codes and loading them

// Whole panels, decoded for each tile anew.
template <class Stream, int kRows, int kSteps, bool kSymmetric>
void rows_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t num_tiles, int64_t panel,
              int64_t distance, Ahead& ahead) {
    Stream streams[kPair];
    UNROLL for (int p = 0; p < kPair; ++p) { streams[p].start(w, panel + p * distance); }
    add_codes<kRows, kSteps, kSymmetric>(w, rows, part, row, num_tiles, {panel, distance, 0, w.num_blocks}, streams,
                                         ahead);
}

// Splits rows evenly into tiles of at most kMost: calls run(row, rows of a tile, tiles) for one or two runs of tiles of
// the same size.
template <int kMost = kMaxRows, class Run>
inline void for_runs(int64_t row, int64_t num_rows, Run run) {
    const int64_t num_tiles = (num_rows + kMost - 1) / kMost;
    const int64_t size = num_rows / num_tiles, num_larger = num_rows % num_tiles, num_smaller = num_tiles - num_larger;
    run(row, size, num_smaller);
    if (num_larger > 0) run(row + num_smaller * size, size + 1, num_larger);
}

// Expands blocks [begin, end) of one panel into plain codes or, where kLevels, codes minus zero points.
template <class Stream, int kSteps, bool kLevels = false>
void expand_codes(const PanelWeights& w, Stream& stream, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
    constexpr int kSegments = 16 / kSteps;
    Groups groups(w, begin * kSegments);
    for (int64_t segment = begin * kSegments; segment < end * kSegments; ++segment) {
        const __m512i zero_points = groups.zero_points(panel);
        const __m512i pruned = pruned_codes<Stream>(zero_points);
        const __m512i subtracted = _mm512_mullo_epi32(zero_points, _mm512_set1_epi32(kLevels ? 0x01010101 : 0));
        begin_segment(stream, 4 * kSteps);
        stream.fetch(kSteps);
        for (int pair = 0; pair < kSteps / 2; ++pair, out += 128) {
            __m512i even, odd;
            stream.next(pruned, even, odd);
            odd = _mm512_srli_epi16(odd, Stream::kOddShift);
            _mm512_store_si512(out, kLevels ? _mm512_sub_epi8(even, subtracted) : even);
            _mm512_store_si512(out + 64, kLevels ? _mm512_sub_epi8(odd, subtracted) : odd);
        }
        groups.advance();
    }
}

// What `expand_codes` wrote.
struct ExpandedCodes {
    static constexpr int kOddShift = 0;
    static constexpr bool kExpandsOnce = false;
    const uint8_t* values;
    void fetch(int) const {}
    void next(__m512i, __m512i& even, __m512i& odd) {
        even = load(values);
        odd = load(values + 64);
        values += 128;
    }
};

using StretchCodesFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, int64_t num_tiles,
                                      const Stretch&, const uint8_t* const (&expanded)[kPair], Ahead& ahead);

template <int kRows, int kSteps, bool kSymmetric>
void expanded_codes_rows(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t num_tiles,
                         const Stretch& stretch, const uint8_t* const (&expanded)[kPair], Ahead& ahead) {
    const ExpandedCodes streams[kPair] = {{expanded[0]}, {expanded[1]}};
    add_codes<kRows, kSteps, kSymmetric>(w, rows, part, row, num_tiles, stretch, streams, ahead);
}

template <int kSteps, bool kSymmetric>
inline constexpr StretchCodesFunction kExpandedCodes[kMaxRows] = {
    expanded_codes_rows<1, kSteps, kSymmetric>, expanded_codes_rows<2, kSteps, kSymmetric>,
    expanded_codes_rows<3, kSteps, kSymmetric>, expanded_codes_rows<4, kSteps, kSymmetric>,
    expanded_codes_rows<5, kSteps, kSymmetric>, expanded_codes_rows<6, kSteps, kSymmetric>,
    expanded_codes_rows<7, kSteps, kSymmetric>, expanded_codes_rows<8, kSteps, kSymmetric>};

// Decodes a stretch once for all rows.
template <class Stream, int kSteps, bool kSymmetric>
void expand_codes_for_rows(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int kStretchBlocks = 64;
    constexpr int kBlockBytes = kBlockInputs * kPanelOutputs;
    alignas(64) uint8_t memory[kPair * kStretchBlocks * kBlockBytes];
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kMaxRows - 1) / kMaxRows;
    const int64_t num_stretches = (w.num_blocks + kStretchBlocks - 1) / kStretchBlocks;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kPair) {
        // The last of an odd number of panels is computed beside itself.
        const int distance = panel + 1 < part.panel_end ? 1 : 0;
        Stream streams[kPair];
        for (int p = 0; p <= distance; ++p) streams[p].start(w, panel + p);
        const int64_t next = panel + kPair, next_distance = next + 1 < part.panel_end ? 1 : 0;
        const bool any = next < part.panel_end;
        Ahead ahead(w, any ? next : panel, any ? next_distance : 0, num_stretches * num_groups,
                    w.num_blocks / num_stretches, any);
        for (int64_t stretch = 0, begin = 0; stretch < num_stretches; ++stretch) {
            const int64_t end = begin + (w.num_blocks + stretch) / num_stretches;
            const int64_t num_bytes = (end - begin) * kBlockBytes;
            for (int p = 0; p <= distance; ++p)
                expand_codes<Stream, kSteps>(w, streams[p], panel + p, begin, end, memory + p * num_bytes);
            const uint8_t* const expanded[kPair] = {memory, memory + distance * num_bytes};
            for_runs(part.row_begin, num_rows, [&](int64_t row, int64_t count, int64_t num_tiles) {
                kExpandedCodes<kSteps, kSymmetric>[count - 1](w, rows, part, row, num_tiles,
                                                              {panel, distance, begin, end}, expanded, ahead);
            });
            begin = end;
        }
    }
}

template <class Stream, int kRows>
void rows_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel, int64_t distance,
                Ahead ahead) {
    const float* x = rows.x + row * rows.stride;
    alignas(64) float totals[kRows][kPair][kPanelOutputs] = {};
    Stream streams[kPair];
    UNROLL for (int p = 0; p < kPair; ++p) { streams[p].start(w, panel + p * distance); }
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m512 sums[kRows][kPair];
        ahead.fetch();
        UNROLL for (int p = 0; p < kPair; ++p) { begin_segment(streams[p], kBlockInputs); }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPair; ++p) { sums[r][p] = _mm512_setzero_ps(); }
        }
        for (int pair = 0; pair < kBlockInputs / 2; ++pair, x += 2) {
            if (pair % 8 == 0 && fetches<kRows>()) {
                UNROLL for (int p = 0; p < kPair; ++p) { streams[p].fetch(16); }
            }
            __m512 even[kPair], odd[kPair];
            UNROLL for (int p = 0; p < kPair; ++p) { streams[p].next(even[p], odd[p]); }
            UNROLL for (int r = 0; r < kRows; ++r) {
                const float* row_x = x + r * rows.stride;
                const __m512 even_x = _mm512_set1_ps(row_x[0]), odd_x = _mm512_set1_ps(row_x[1]);
                UNROLL for (int p = 0; p < kPair; ++p) { sums[r][p] = _mm512_fmadd_ps(odd_x, odd[p], sums[r][p]); }
                UNROLL for (int p = 0; p < kPair; ++p) { sums[r][p] = _mm512_fmadd_ps(even_x, even[p], sums[r][p]); }
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPair; ++p) {
                _mm512_store_ps(totals[r][p], _mm512_add_ps(_mm512_load_ps(totals[r][p]), sums[r][p]));
            }
        }
    }
    UNROLL for (int p = 0; p < kPair; ++p) {
        float* y = part.y + row * part.y_stride + (panel + p * distance) * kPanelOutputs;
        UNROLL for (int r = 0; r < kRows; ++r) {
            Lanes(w, panel + p * distance, y + r * part.y_stride).store(_mm512_load_ps(totals[r][p]));
        }
    }
}

using TilesFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, int64_t num_tiles,
                               int64_t panel, int64_t distance, Ahead& ahead);
using RowsFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, int64_t panel,
                              int64_t distance, Ahead ahead);

template <class Stream, int kSteps, bool kSymmetric>
constexpr TilesFunction kRowsInt[kMaxRows] = {
    rows_int<Stream, 1, kSteps, kSymmetric>, rows_int<Stream, 2, kSteps, kSymmetric>,
    rows_int<Stream, 3, kSteps, kSymmetric>, rows_int<Stream, 4, kSteps, kSymmetric>,
    rows_int<Stream, 5, kSteps, kSymmetric>, rows_int<Stream, 6, kSteps, kSymmetric>,
    rows_int<Stream, 7, kSteps, kSymmetric>, rows_int<Stream, 8, kSteps, kSymmetric>};
template <class Stream>
constexpr RowsFunction kRowsFloat[kMaxRows] = {rows_float<Stream, 1>, rows_float<Stream, 2>, rows_float<Stream, 3>,
                                               rows_float<Stream, 4>, rows_float<Stream, 5>, rows_float<Stream, 6>,
                                               rows_float<Stream, 7>, rows_float<Stream, 8>};

// Pairs the panels of a part, and calls run(row, rows of a tile, tiles, panel, distance, ahead), of tiles of at most
// kMost rows.
template <int kMost = kMaxRows, class Run>
inline void walk_pairs(const PanelWeights& w, const Part& part, Run run) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_tiles = (num_rows + kMost - 1) / kMost;
    const auto all_rows = [&](int64_t panel, int64_t distance, int64_t next) {
        Ahead ahead(w, next, distance, num_tiles, w.num_blocks, next != panel && num_tiles > 1);
        for_runs<kMost>(part.row_begin, num_rows, [&](int64_t row, int64_t count, int64_t tiles) {
            run(row, count, tiles, panel, distance, ahead);
        });
    };
    // Two stretches of panels, each a sequential read of memory; or neighbours, where fetching ahead in the first
    // stretch would only reach into the second, and where there are so many rows that lines of y side by side, which
    // come and go together, save more.
    constexpr int64_t kShortest = 32 << 10;
    if (part.distance != 0) {
        for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) all_rows(panel, part.distance, panel);
        return;
    }
    const int64_t half = (part.panel_end - part.panel_begin) / 2;
    const int64_t half_bytes = w.value_offsets[part.panel_begin + half] - w.value_offsets[part.panel_begin];
    const bool apart = num_tiles == 1 && half_bytes >= kShortest;
    const int64_t distance = apart ? half : 1, stride = apart ? 1 : kPair;
    for (int64_t i = 0; i < half; ++i) {
        const int64_t panel = part.panel_begin + i * stride;
        all_rows(panel, distance, i + 1 < half ? panel + stride : panel);
    }
    // The last of an odd number of panels is computed beside itself.
    if ((part.panel_end - part.panel_begin) % 2 != 0) all_rows(part.panel_end - 1, 0, part.panel_end - 1);
}

inline void walk_rows(const PanelWeights& w, const Rows& rows, const Part& part, const TilesFunction* functions) {
    walk_pairs(w, part, [&](int64_t row, int64_t count, int64_t tiles, int64_t panel, int64_t distance, Ahead& ahead) {
        functions[count - 1](w, rows, part, row, tiles, panel, distance, ahead);
    });
}

inline void walk_rows(const PanelWeights& w, const Rows& rows, const Part& part, const RowsFunction* functions) {
    walk_pairs(w, part, [&](int64_t row, int64_t count, int64_t tiles, int64_t panel, int64_t distance, Ahead& ahead) {
        for (int64_t tile = 0; tile < tiles; ++tile, row += count, ahead.advance())
            functions[count - 1](w, rows, part, row, panel, distance, ahead);
    });
}

}  // namespace rarefy::matmul::avx512
