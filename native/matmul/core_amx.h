// Products with many rows on AMX: two tiles of 16 rows of activations by two panels. The rest of the AMX kernels are
// the AVX-512 ones, compiled a second time as the namespace amx (CMakeLists.txt); core_avx512.h comes here from there.
// A block of a panel, expanded to one step per vector, is exactly what a tile of weights must look like: 64 columns of
// codes, or 2 tiles of 32 columns of bfloat16.
//
// Codes: the sums of a segment are integers and leave the tiles for the scales, so all bits are those of AVX-512. Where
// a level, code minus zero point, fits into a signed byte, tiles multiply levels, and nothing is left to subtract.
// bfloat16: tiles hold the sums of a stretch. They add in another order than AVX-512.
//
// All of this has run in the emulation of tiles_amx.h, never on hardware. How it is cut follows from what Intel's
// manuals say of it: a product of tiles takes 16 cycles and its sums 52, so that four of them must be under way; a tile
// is 16 lines to load, so that each meets two others; and while tiles multiply a segment, vectors scale the one before.
#pragma once

#include <type_traits>

#include "matmul/bf16_avx512.h"
#include "matmul/tiles_amx.h"

namespace rarefy::matmul::amx {

constexpr int kAmxRows = 8;  // fewer rows are multiplied without tiles
constexpr int kTileRows = 16;
constexpr int kTileColumns = 32;  // of bfloat16
constexpr int kTileBytes = kTileRows * 64;
constexpr int kMaxTiles = 4;       // of rows, in a group
constexpr int kStretchBlocks = 8;  // of a pair of panels: 16 KiB of expanded codes, 32 KiB of bfloat16

// Rows that are multiplied together: 1, 2 or 4 tiles, with the first row and the number of rows of each.
struct TiledRows {
    int num_tiles = 0;
    int first_tile = 0;  // how many tiles the groups before have
    int64_t rows[kMaxTiles] = {};
    int heights[kMaxTiles] = {};
};

// Calls take(group) for all rows of a part, in groups of at most kMost tiles. kSameHeight: some rows belong to two
// tiles rather than that one is lower than the others.
template <int kMost, bool kSameHeight, class Take>
inline void walk_tiled_rows(const Part& part, const Take& take) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kMost * kTileRows - 1) / (kMost * kTileRows);
    int64_t row = part.row_begin;
    TiledRows group;
    for (int64_t i = 0; i < num_groups; ++i) {
        const int count = static_cast<int>((num_rows + i) / num_groups);
        group.num_tiles = count <= kTileRows ? 1 : count <= 2 * kTileRows ? 2 : 4;
        const int height = (count + group.num_tiles - 1) / group.num_tiles;
        for (int t = 0; t < group.num_tiles; ++t) {
            const int left = count - t * height;
            group.heights[t] = kSameHeight || left > height ? height : left;
            group.rows[t] = row + (left < group.heights[t] ? count - height : t * height);
        }
        take(group);
        group.first_tile += group.num_tiles;
        row += count;
    }
}

// Configures the tiles when they change, which takes as long as several products: Shapes(heights) gives a TileConfig.
template <class Shapes>
class ConfiguredTiles {
public:
    explicit ConfiguredTiles(Shapes shapes) : shapes_(shapes) {}
    ConfiguredTiles(const ConfiguredTiles&) = delete;
    ConfiguredTiles& operator=(const ConfiguredTiles&) = delete;
    ~ConfiguredTiles() { TILE_RELEASE(); }
    void configure(const TiledRows& group) {
        if (__builtin_memcmp(heights_, group.heights, sizeof(heights_)) == 0) return;
        __builtin_memcpy(heights_, group.heights, sizeof(heights_));
        alignas(64) const TileConfig config = shapes_(heights_);
        TILE_CONFIGURE(config);
    }

private:
    Shapes shapes_;
    int heights_[kMaxTiles] = {};
};

inline void set_shape(TileConfig& config, int tile, int num_rows, int row_bytes) {
    config.num_rows[tile] = static_cast<uint8_t>(num_rows);
    config.row_bytes[tile] = static_cast<uint16_t>(num_rows == 0 ? 0 : row_bytes);
}

// Tiles 0 to 3: sums, of the first tile of rows by two panels and of the second; 4 and 5: `row_bytes` of activations of
// these rows; 6 and 7: weights of these panels.
inline auto pair_shapes(int row_bytes) {
    return [row_bytes](const int* heights) {
        TileConfig config;
        for (int t = 0; t < 2; ++t) {
            set_shape(config, 2 * t, heights[t], 64);
            set_shape(config, 2 * t + 1, heights[t], 64);
            set_shape(config, 4 + t, heights[t], row_bytes);
            set_shape(config, 6 + t, row_bytes / 4, 64);
        }
        return config;
    };
}

enum class Dot { levels, codes, pairs };

// Tiles 0 to 3 += kTiles tiles of rows, of which the second begins `second` bytes behind the first, by a tile of each
// panel.
template <Dot kDot, int kTiles>
inline void multiply_pair(const void* x, int64_t stride_bytes, int64_t second, const uint8_t* left,
                          const uint8_t* right) {
#define MULTIPLY_PAIR(DOT)                                                   \
    TILE_LOAD(4, x, stride_bytes);                                           \
    TILE_LOAD(6, left, 64);                                                  \
    DOT(0, 4, 6);                                                            \
    TILE_LOAD(7, right, 64);                                                 \
    DOT(1, 4, 7);                                                            \
    if constexpr (kTiles == 2) {                                             \
        TILE_LOAD(5, static_cast<const uint8_t*>(x) + second, stride_bytes); \
        DOT(2, 5, 6);                                                        \
        DOT(3, 5, 7);                                                        \
    }
    if constexpr (kDot == Dot::levels) {
        MULTIPLY_PAIR(TILE_DOT_S8_S8)
    } else if constexpr (kDot == Dot::codes) {
        MULTIPLY_PAIR(TILE_DOT_S8_U8)
    } else {
        MULTIPLY_PAIR(TILE_DOT_BF16)
    }
#undef MULTIPLY_PAIR
}

// totals += what the dot products of kCount segments stand for, of kTiles tiles of rows by kPanels panels, `distance`
// apart; scales: of their groups. start(row, i, p, dots): the dot products of a row, segment i and panel p as levels;
// block(i): of segment i.
template <int kCount, int kTiles, int kPanels, class Start, class Block>
inline void add_segments(const PanelWeights& w, const Rows& rows, const TiledRows& group,
                         const __m512 (&scales)[kCount][kPanels],
                         const int32_t (*const (&dots)[kCount])[kPanels][kTileRows][kPanelOutputs],
                         float (*totals)[kPanels][kTileRows][kPanelOutputs], const Start& start, const Block& block) {
    add_scaled(w, [&](auto scaling) {
        for (int t = 0; t < kTiles; ++t) {
            for (int r = 0; r < group.heights[t]; ++r) {
                const int64_t row = group.rows[t] + r;
                __m512 sums[kPanels];
                UNROLL for (int p = 0; p < kPanels; ++p) { sums[p] = _mm512_load_ps(totals[t][p][r]); }
                UNROLL for (int i = 0; i < kCount; ++i) {
                    const __m512 row_scale = _mm512_set1_ps(rows.scales[row * rows.num_blocks + block(i)]);
                    UNROLL for (int p = 0; p < kPanels; ++p) {
                        const __m512 levels = _mm512_cvtepi32_ps(start(row, i, p, load(dots[i][t][p][r])));
                        sums[p] = _mm512_fmadd_ps(levels, scaling.factor(row_scale, scales[i][p]), sums[p]);
                    }
                }
                UNROLL for (int p = 0; p < kPanels; ++p) { _mm512_store_ps(totals[t][p][r], sums[p]); }
            }
        }
    });
}

// The unfinished sums of all rows of a part by a pair of panels. In y, whose rows may lie some KB apart, they would
// push each other out of the caches.
struct PairSums {
    alignas(64) float tiles[kTaskRows / kTileRows][kPair][kTileRows][kPanelOutputs];

    template <class Take>
    static void for_outputs(const PanelWeights& w, const Part& part, const TiledRows& group, const Stretch& stretch,
                            const Take& take) {
        for (int p = 0; p < kPair; ++p) {
            const Lanes y = output_row(w, part, 0, stretch.panel + p * stretch.distance);
            for (int t = 0; t < group.num_tiles; ++t)
                for (int r = 0; r < group.heights[t]; ++r) take(y, (group.rows[t] + r) * part.y_stride, p, t, r);
        }
    }
    // For writing, before the last stretch.
    static void fetch(const PanelWeights& w, const Part& part, const TiledRows& group, const Stretch& stretch) {
        if (stretch.block_end != w.num_blocks) return;
        for_outputs(w, part, group, stretch,
                    [](const Lanes& y, int64_t offset, int, int, int) { fetch_output(y.y + offset); });
    }
    // After the last stretch.
    void store(const PanelWeights& w, const Part& part, const TiledRows& group, const Stretch& stretch) const {
        if (stretch.block_end != w.num_blocks) return;
        const __m512 factors[kPair] = {output_factor(w, stretch.panel, true),
                                       output_factor(w, stretch.panel + stretch.distance, true)};
        for_outputs(w, part, group, stretch, [&](const Lanes& y, int64_t offset, int p, int t, int r) {
            y.store(_mm512_mul_ps(_mm512_load_ps(tiles[group.first_tile + t][p][r]), factors[p]), offset);
        });
    }
};

// A group of rows by a stretch whose expanded codes are given. kDot: levels, or codes where these may need more than a
// byte.
template <Dot kDot, int kSteps, int kTiles>
void tile_codes(const PanelWeights& w, const Rows& rows, const Part& part, const TiledRows& group,
                const Stretch& stretch, const uint8_t* const (&expanded)[kPair], Ahead ahead, PairSums& sums) {
    constexpr int kSegments = 16 / kSteps;
    // Of so many segments, and of as many before. Taking two at once saves loading and storing their totals in between.
    constexpr int kTogether = 2;
    alignas(64) int32_t dots[2 * kTogether][kTiles][kPair][kTileRows][kPanelOutputs];
    auto* const totals = &sums.tiles[group.first_tile];
    if (stretch.block_begin == 0) __builtin_memset(totals, 0, kTiles * sizeof(*totals));
    PairSums::fetch(w, part, group, stretch);
    const int64_t begin = stretch.block_begin * kSegments, end = stretch.block_end * kSegments;
    Groups groups(w, begin);
    const auto add = [&](int64_t first, auto count) {
        constexpr int kCount = decltype(count)::value;
        __m512 scales[kCount][kPair];
        __m512i zero_points[kCount][kPair];
        const int32_t (*some[kCount])[kPair][kTileRows][kPanelOutputs];
        UNROLL for (int i = 0; i < kCount; ++i) {
            some[i] = dots[(first - begin + i) % (2 * kTogether)];
            UNROLL for (int p = 0; p < kPair; ++p) {
                scales[i][p] = groups.scales(stretch.panel + p * stretch.distance);
                zero_points[i][p] = groups.zero_points(stretch.panel + p * stretch.distance);
            }
            groups.advance();
        }
        const auto start = [&](int64_t row, int i, int p, __m512i codes) {
            if constexpr (kDot == Dot::levels) return codes;
            const int32_t sum = segment_sum<kSteps>(rows.sums + row * rows.num_blocks * 2, first + i);
            return _mm512_sub_epi32(codes, _mm512_mullo_epi32(zero_points[i][p], _mm512_set1_epi32(sum)));
        };
        add_segments<kCount, kTiles, kPair>(w, rows, group, scales, some, totals, start,
                                            [&](int i) { return (first + i) / kSegments; });
    };
    const int8_t* q = rows.q + group.rows[0] * rows.stride + stretch.block_begin * kBlockInputs;
    int64_t offset = 0, added = begin;
    for (int64_t segment = begin; segment < end; ++segment, q += 4 * kSteps, offset += 64 * kSteps) {
        if (segment % kSegments == 0) ahead.fetch();
        zero_sums<kPair * kTiles>();
        multiply_pair<kDot, kTiles>(q, rows.stride, group.heights[0] * rows.stride, expanded[0] + offset,
                                    expanded[1] + offset);
        store_sums<kPair * kTiles>(
            [&](int i) { return dots[(segment - begin) % (2 * kTogether)][i / kPair][i % kPair]; }, 64);
        if (segment - added == 2 * kTogether - 1) {
            add(added, std::integral_constant<int, kTogether>());
            added += kTogether;
        }
    }
    for (; added + kTogether <= end; added += kTogether) add(added, std::integral_constant<int, kTogether>());
    if (added < end) add(added, std::integral_constant<int, 1>());
    sums.store(w, part, group, stretch);
}

// A group of rows by a stretch whose steps are given.
template <int kTiles>
void tile_pairs(const PanelWeights& w, const Rows& rows, const Part& part, const TiledRows& group,
                const Stretch& stretch, const uint8_t* const (&pairs)[kPair], Ahead ahead, PairSums& sums) {
    const auto at = [&](int i) { return sums.tiles[group.first_tile + i / kPair][i % kPair]; };
    if (stretch.block_begin == 0)
        zero_sums<kPair * kTiles>();
    else
        load_sums<kPair * kTiles>(at, 64);
    PairSums::fetch(w, part, group, stretch);
    const uint16_t* x = rows.bf16_x + group.rows[0] * rows.stride + stretch.block_begin * kBlockInputs;
    const int64_t num_tiles = (stretch.block_end - stretch.block_begin) * (kBlockInputs / kTileColumns);
    for (int64_t i = 0; i < num_tiles; ++i, x += kTileColumns) {
        if (i % 2 == 0) ahead.fetch();
        multiply_pair<Dot::pairs, kTiles>(x, rows.stride * 2, group.heights[0] * rows.stride * 2,
                                          pairs[0] + i * kTileBytes, pairs[1] + i * kTileBytes);
    }
    store_sums<kPair * kTiles>(at, 64);
    sums.store(w, part, group, stretch);
}

// Pairs of panels, of which each stretch of blocks is expanded once and meets all rows: expand(stream, panel, begin,
// end, out), and take(group, stretch, expanded, ahead).
template <class Stream, int kStepBytes, class Expand, class Take>
void walk_stretches(const PanelWeights& w, const Part& part, const Expand& expand, const Take& take) {
    constexpr int kPanelBytes = kStretchBlocks * kBlockInputs * kPanelOutputs * kStepBytes;
    alignas(64) uint8_t memory[kPair][kPanelBytes];
    PairSums sums;
    const int64_t num_stretches = (w.num_blocks + kStretchBlocks - 1) / kStretchBlocks;
    const int64_t num_groups = (part.row_end - part.row_begin + 2 * kTileRows - 1) / (2 * kTileRows);
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kPair) {
        // The last of an odd number of panels is computed beside itself.
        const int distance = panel + 1 < part.panel_end ? 1 : 0;
        const uint8_t* const expanded[kPair] = {memory[0], memory[distance]};
        const bool any = panel + kPair < part.panel_end;
        const int64_t next = any ? panel + kPair : panel, next_distance = any && next + 1 < part.panel_end ? 1 : 0;
        Stream streams[kPair];
        for (int p = 0; p <= distance; ++p) streams[p].start(w, panel + p);
        Ahead ahead(w, next, next_distance, num_stretches * num_groups, w.num_blocks / num_stretches, any);
        for (int64_t stretch = 0; stretch < num_stretches; ++stretch) {
            const int64_t begin = stretch * kStretchBlocks;
            const int64_t end = begin + kStretchBlocks < w.num_blocks ? begin + kStretchBlocks : w.num_blocks;
            for (int p = 0; p <= distance; ++p) expand(streams[p], panel + p, begin, end, memory[p]);
            walk_tiled_rows<2, false>(part, [&](const TiledRows& group) {
                take(group, Stretch{panel, distance, begin, end}, expanded, ahead, sums);
                ahead.advance();
            });
        }
    }
}

// The same for weights that are tiles as they are packed, from one end of a panel to the other.
template <class Stream, class Take>
void walk_plain_pairs(const PanelWeights& w, const Part& part, const Take& take) {
    PairSums sums;
    const int64_t num_groups = (part.row_end - part.row_begin + 2 * kTileRows - 1) / (2 * kTileRows);
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kPair) {
        const int distance = panel + 1 < part.panel_end ? 1 : 0;
        const bool any = panel + kPair < part.panel_end;
        const int64_t next = any ? panel + kPair : panel, next_distance = any && next + 1 < part.panel_end ? 1 : 0;
        Stream streams[kPair];
        for (int p = 0; p < kPair; ++p) streams[p].start(w, panel + p * distance);
        const uint8_t* const pairs[kPair] = {streams[0].values, streams[1].values};
        Ahead ahead(w, next, next_distance, num_groups, w.num_blocks, any);
        walk_tiled_rows<2, false>(part, [&](const TiledRows& group) {
            take(group, Stretch{panel, distance, 0, w.num_blocks}, pairs, ahead, sums);
            ahead.advance();
        });
    }
}

template <class Stream, Dot kDot, int kSteps>
void tiles_int_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    ConfiguredTiles tiles(pair_shapes(4 * kSteps));
    const auto expand = [&](Stream& stream, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
        expand_codes<Stream, kSteps, kDot == Dot::levels>(w, stream, panel, begin, end, out);
    };
    walk_stretches<Stream, 1>(w, part, expand, [&](const TiledRows& group, auto&&... rest) {
        tiles.configure(group);
        (group.num_tiles == 1 ? tile_codes<kDot, kSteps, 1> : tile_codes<kDot, kSteps, 2>)(w, rows, part, group,
                                                                                           rest...);
    });
}

template <class Stream>
void tiles_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    const bool fits = w.zero_points == nullptr || w.zero_point < kByteZeroPoint;
    if (w.steps_per_segment == 16)
        (fits ? tiles_int_steps<Stream, Dot::levels, 16> : tiles_int_steps<Stream, Dot::codes, 16>)(w, rows, part);
    else
        (fits ? tiles_int_steps<Stream, Dot::levels, 8> : tiles_int_steps<Stream, Dot::codes, 8>)(w, rows, part);
}

template <class Stream>
void tiles_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    ConfiguredTiles tiles(pair_shapes(64));
    const auto take = [&](const TiledRows& group, auto&&... rest) {
        tiles.configure(group);
        (group.num_tiles == 1 ? tile_pairs<1> : tile_pairs<2>)(w, rows, part, group, rest...);
    };
    if constexpr (Stream::kIsPlain) {
        walk_plain_pairs<Stream>(w, part, take);
    } else {
        const auto expand = [](Stream& stream, int64_t, int64_t begin, int64_t end, uint8_t* out) {
            expand_pairs(stream, end - begin, out);
        };
        walk_stretches<Stream, 2>(w, part, expand, take);
    }
}

}  // namespace rarefy::matmul::amx
