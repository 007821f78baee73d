// Products with several rows of activations, by two panels at a time: what is decoded into registers is multiplied with
// up to 8 rows at once. Bytes and nibbles are cheap enough to decode again for the next 8; what is under a mask or in
// bits is expanded once for many rows.
#pragma once

#include "matmul/vectors_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kMaxRows = 8;                  // by a pair of panels: 16 sums
constexpr int kPair = 2;                     // panels
constexpr int64_t kFewestExpandedRows = 32;  // that pay for storing codes and loading them

// The first rows that meet a pair of panels would wait for memory, and those after them read it from the L2 cache. So
// each call fetches its share of the next pair.
class Ahead {
public:
    // The first of `count` shares of `panel` and `panel + distance`, the next pair, in `num_blocks` steps; nothing
    // unless there is `any`.
    Ahead(const PanelWeights& w, int64_t panel, int64_t distance, int64_t count, int64_t num_blocks, bool any) {
        for (int p = 0; p < kPair; ++p) {
            const int64_t* offsets = w.value_offsets + panel + p * distance;
            const auto num_bytes = static_cast<uint32_t>(any ? offsets[1] - offsets[0] : 0);
            share_[p] = (num_bytes + static_cast<uint32_t>(count) - 1) / static_cast<uint32_t>(count);
            from_[p] = w.values + offsets[0];
            end_[p] = from_[p] + share_[p];
        }
        num_bytes_ = (share_[0] / static_cast<uint32_t>(num_blocks) + 63) / 64 * 64;
    }
    // Of all rows that meet the pair before.
    bool is_first() const { return is_first_; }
    // To the next share.
    void advance() {
        is_first_ = false;
        for (int p = 0; p < kPair; ++p) {
            from_[p] = end_[p];
            end_[p] += share_[p];
        }
    }
    // Once for each block.
    void fetch() {
        UNROLL for (int p = 0; p < kPair; ++p) {
            for (int64_t offset = 0; offset < num_bytes_ && from_[p] < end_[p]; offset += 64, from_[p] += 64)
                _mm_prefetch(reinterpret_cast<const char*>(from_[p]), _MM_HINT_T1);
        }
    }

private:
    const uint8_t *from_[kPair], *end_[kPair];
    uint32_t share_[kPair];
    int64_t num_bytes_;
    bool is_first_ = true;
};

// A segment at once, unless the stream says how many steps.
template <class Stream, int kSteps>
constexpr int fetch_steps(decltype(&Stream::kFetchSteps)) {
    return Stream::kFetchSteps;
}
template <class Stream, int kSteps>
constexpr int fetch_steps(...) {
    return kSteps;
}

// Some blocks of the panels `panel` and `panel + distance`.
struct Stretch {
    int64_t panel, distance, block_begin, block_end;
};

inline Lanes output_row(const PanelWeights& w, const Part& part, int64_t row, int64_t panel) {
    return Lanes(w, panel, part.y + row * part.y_stride + panel * kPanelOutputs);
}

// Sums of a block begin with what its one zero point subtracts, a power of two: `byte_starts`, shifted. Of bytes that
// is a load for all lanes, which takes no port of the products.
inline int start_shift(const PanelWeights& w) {
    return w.zero_point == kByteZeroPoint ? 0 : __builtin_ctz(static_cast<unsigned>(kByteZeroPoint / w.zero_point));
}
template <int kRows>
inline void start_symmetric(int shift, const int32_t* byte_starts, int64_t stride, Sums (&dots)[kRows][kPair]) {
    if (shift == 0) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            dots[r][0] = dots[r][1] = reinterpret_cast<Sums>(_mm512_set1_epi32(byte_starts[r * stride]));
        }
    } else {
        __asm__("" : "+r"(byte_starts));  // or gcc would load them for both before it asks
        UNROLL for (int r = 0; r < kRows; ++r) {
            dots[r][0] = dots[r][1] = reinterpret_cast<Sums>(_mm512_set1_epi32(byte_starts[r * stride] >> shift));
        }
    }
}

// What the tiles of a pair of panels share, and where the next begins, so that little lies between two tiles: a
// processor begins the next while it waits for the products of the last, unless too many instructions do.
struct Tiles {
    const PanelWeights& w;
    int64_t panel, distance, num_segments, q_stride, num_blocks, y_stride;
    int shift;     // start_shift
    bool goes_on;  // the sums start at y, not at 0
    const int8_t* q;
    const float* row_scales;
    const int32_t* byte_starts;
    const int32_t* half_sums;
    float* y[kPair];
    __mmask16 lanes[kPair];
    Groups groups;
    Ahead& ahead;
    alignas(64) float factors[kPair][kPanelOutputs];

    Tiles(const PanelWeights& weights, const Rows& rows, const Part& part, int64_t row, const Stretch& stretch,
          int segments_per_block, bool symmetric, Ahead& next)
        : w(weights),
          panel(stretch.panel),
          distance(stretch.distance),
          num_segments((stretch.block_end - stretch.block_begin) * segments_per_block),
          q_stride(rows.stride),
          num_blocks(rows.num_blocks),
          y_stride(part.y_stride),
          shift(symmetric ? start_shift(w) : 0),
          goes_on(stretch.block_begin != 0),
          q(rows.q + row * rows.stride + stretch.block_begin * kBlockInputs),
          row_scales(rows.scales + row * rows.num_blocks + stretch.block_begin),
          byte_starts(rows.byte_starts + row * rows.num_blocks + stretch.block_begin),
          half_sums(rows.sums + (row * rows.num_blocks + stretch.block_begin) * 2),
          groups(weights, stretch.block_begin * segments_per_block),
          ahead(next) {
        for (int p = 0; p < kPair; ++p) {
            const Lanes output = output_row(w, part, row, panel + p * distance);
            y[p] = output.y;
            lanes[p] = output.lanes;
            _mm512_store_ps(factors[p], output_factor(w, panel + p * distance, stretch.block_end == w.num_blocks));
        }
    }
    void advance(int num_rows) {
        q += num_rows * q_stride;
        row_scales += num_rows * num_blocks;
        byte_starts += num_rows * num_blocks;
        half_sums += num_rows * num_blocks * 2;
        for (int p = 0; p < kPair; ++p) y[p] += num_rows * y_stride;
        ahead.advance();
    }
};

// kRows rows by a stretch, whose codes come from the streams. kSymmetric: all zero points are the same.
template <int kRows, int kSteps, bool kSymmetric, bool kFetches, class Stream>
inline void add_tile(const Tiles& t, const Stream (&starts)[kPair]) {
    constexpr int kPairs = kSteps / 2;
    static_assert(!kSymmetric || kSteps == 16);
    constexpr int kFetchSteps = fetch_steps<Stream, kSteps>(nullptr);
    alignas(64) float memory[kRows][kPair][kPanelOutputs];
    float (*totals)[kPair][kPanelOutputs] = memory;
    // Of fewer than 7 rows gcc would keep them in registers, and with these numbers of rows the codes on the stack.
    constexpr bool kTooMany = Stream::kOddShift == 0 && (kRows == 6 || (kRows == 5 && !Stream::kExpandsOnce));
    if constexpr (kTooMany) __asm__("" : "+r"(totals) : : "memory");
    if (t.goes_on) {
        UNROLL for (int p = 0; p < kPair; ++p) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                _mm512_store_ps(totals[r][p], _mm512_maskz_loadu_ps(t.lanes[p], t.y[p] + r * t.y_stride));
            }
        }
    } else {
        UNROLL for (int p = 0; p < kPair; ++p) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                fetch_output(t.y[p] + r * t.y_stride);
                _mm512_store_ps(totals[r][p], _mm512_setzero_ps());
            }
        }
    }
    const int64_t q_stride = t.q_stride, num_blocks = t.num_blocks;
    const int8_t* q = t.q;
    const float* row_scales = t.row_scales;
    const int32_t* byte_starts = t.byte_starts;
    const int32_t* half_sums = t.half_sums;
    const __m512i one_zero_point = _mm512_set1_epi32(t.w.zero_point);
    const __m512i one_pruned = pruned_codes<Stream>(one_zero_point);
    Groups groups = t.groups;
    Stream streams[kPair] = {starts[0], starts[1]};
    Ahead& ahead = t.ahead;
    for (int64_t segment = 0; segment < t.num_segments; ++segment) {
        Sums dots[kRows][kPair];
        __m512i pruned[kPair];
        UNROLL for (int p = 0; p < kPair; ++p) {
            const __m512i zero_points = kSymmetric ? one_zero_point : groups.zero_points(t.panel + p * t.distance);
            pruned[p] = kSymmetric ? one_pruned : pruned_codes<Stream>(zero_points);
            if constexpr (!kSymmetric) {
                UNROLL for (int r = 0; r < kRows; ++r) {
                    dots[r][p] = times(zero_points, -segment_sum<kSteps>(half_sums + r * num_blocks * 2, 0));
                }
            }
        }
        if constexpr (kSymmetric) start_symmetric(t.shift, byte_starts, num_blocks, dots);
        if (kSteps == 16 || segment % 2 == 0) ahead.fetch();
        for (int pair = 0; pair < kPairs; ++pair, q += 8) {
            __m512i even[kPair], odd[kPair];
            UNROLL for (int p = 0; p < kPair; ++p) {
                if (kFetches && 2 * pair % kFetchSteps == 0 && fetches<kRows>()) streams[p].fetch(kFetchSteps);
                streams[p].next(pruned[p], even[p], odd[p]);
                if constexpr (Stream::kOddShift != 0) odd[p] = _mm512_srli_epi16(odd[p], Stream::kOddShift);
            }
            if constexpr (kRows == 2) __asm__ volatile("" : : : "memory");  // gcc would load the codes for each row
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512i even_q = broadcast_4(q + r * q_stride), odd_q = broadcast_4(q + r * q_stride + 4);
                UNROLL for (int p = 0; p < kPair; ++p) { dots[r][p] = dot_4(dots[r][p], even[p], even_q); }
                UNROLL for (int p = 0; p < kPair; ++p) { dots[r][p] = dot_4(dots[r][p], odd[p], odd_q); }
            }
        }
        add_scaled(t.w, [&](auto scaling) {
            UNROLL for (int p = 0; p < kPair; ++p) {
                const __m512 scales = groups.scales(t.panel + p * t.distance);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512 row_scale = _mm512_set1_ps(row_scales[r * num_blocks]);
                    const __m512 total = _mm512_load_ps(totals[r][p]);
                    _mm512_store_ps(totals[r][p],
                                    _mm512_fmadd_ps(to_floats(dots[r][p]), scaling.factor(row_scale, scales), total));
                }
            }
        });
        groups.advance();
        half_sums += kSteps == 16 ? 2 : 1;
        if (kSteps == 16 || segment % 2 != 0) {
            ++byte_starts;
            ++row_scales;
        }
    }
    const int64_t y_stride = t.y_stride;
    UNROLL for (int p = 0; p < kPair; ++p) {
        const __m512 factor = _mm512_load_ps(t.factors[p]);
        const __mmask16 lanes = t.lanes[p];
        float* y = t.y[p];
        UNROLL for (int r = 0; r < kRows; ++r, y += y_stride) {
            _mm512_mask_storeu_ps(y, lanes, _mm512_mul_ps(_mm512_load_ps(totals[r][p]), factor));
        }
    }
}

// Tiles of kRows rows each, from `row` on.
template <int kRows, int kSteps, bool kSymmetric, class Stream>
inline void add_codes(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t num_tiles,
                      const Stretch& stretch, const Stream (&starts)[kPair], Ahead& ahead) {
    Tiles tiles(w, rows, part, row, stretch, 16 / kSteps, kSymmetric, ahead);
    for (int64_t tile = 0; tile < num_tiles; ++tile, tiles.advance(kRows)) {
        // The first rows that meet a pair of panels fetch their codes, and the others find them in a nearer cache.
        if (kRows < kMaxRows || ahead.is_first())
            add_tile<kRows, kSteps, kSymmetric, true>(tiles, starts);
        else
            add_tile<kRows, kSteps, kSymmetric, false>(tiles, starts);
    }
}

// Whole panels, decoded for each tile anew.
template <class Stream, int kRows, int kSteps, bool kSymmetric>
void rows_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t num_tiles, int64_t panel,
              int64_t distance, Ahead& ahead) {
    Stream streams[kPair];
    UNROLL for (int p = 0; p < kPair; ++p) { streams[p].start(w, panel + p * distance); }
    add_codes<kRows, kSteps, kSymmetric>(w, rows, part, row, num_tiles, {panel, distance, 0, w.num_blocks}, streams,
                                         ahead);
}

// Splits rows evenly into tiles of at most kMaxRows: calls run(row, rows of a tile, tiles) for one or two runs of tiles
// of the same size.
template <class Run>
inline void for_runs(int64_t row, int64_t num_rows, Run run) {
    const int64_t num_tiles = (num_rows + kMaxRows - 1) / kMaxRows;
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

// Pairs the panels of a part, and calls run(row, rows of a tile, tiles, panel, distance, ahead).
template <class Run>
inline void walk_pairs(const PanelWeights& w, const Part& part, Run run) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_tiles = (num_rows + kMaxRows - 1) / kMaxRows;
    const auto all_rows = [&](int64_t panel, int64_t distance, int64_t next) {
        Ahead ahead(w, next, distance, num_tiles, w.num_blocks, next != panel && num_tiles > 1);
        for_runs(part.row_begin, num_rows,
                 [&](int64_t row, int64_t count, int64_t tiles) { run(row, count, tiles, panel, distance, ahead); });
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
