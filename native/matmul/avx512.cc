// AVX-512 kernels (VNNI, VBMI2). One vector is one step of a panel: 16 outputs by 4 codes, 2 bfloat16 or 1 float32.
#include <immintrin.h>

#include "matmul/kernels.h"

namespace rarefy::matmul {
namespace {

#define UNROLL _Pragma("GCC unroll 32")

constexpr int kTilePanels = 4;  // panels that one row walks together, and the width of a register tile
constexpr int kTileRows = 6;    // 6 rows by 4 panels fill 24 registers
constexpr int kIntTileBlocks = 8;
constexpr int kFloatTileBlocks = 2;  // either way 4 panels make 32 KiB: an expanded tile stays in the L1 cache
constexpr int kIntBlockBytes = kBlockInputs * kPanelOutputs;
constexpr int kFloatBlockBytes = kIntBlockBytes * 4;

// Fetches what a stream reads kAhead bytes later. A page ahead is measured to be best; the hardware fetches dense
// streams well by itself, but loses the thread of values whose number the mask decides.
template <int kAhead>
inline void prefetch(const uint8_t* from, int num_bytes) {
    for (int offset = 0; offset < num_bytes; offset += 64)
        _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + offset), _MM_HINT_T0);
}

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// Sums of 32 bits. As __m512i, which is 8 times 64 bits to gcc, an accumulator would change its type in every
// iteration, and gcc then keeps two registers or the stack for it.
using Sums = int __attribute__((vector_size(64)));

inline Sums dot_4(Sums sums, __m512i codes, __m512i q) {
    return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, q));
}
inline __m512 to_floats(Sums sums) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sums)); }
inline Sums times(__m512i a, int32_t b) { return reinterpret_cast<Sums>(_mm512_mullo_epi32(a, _mm512_set1_epi32(b))); }

inline __m512i broadcast_4(const int8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

inline __m512 widen_bf16(const uint16_t* from) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512i widen_bytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}

inline uint64_t load_u64(const uint8_t* from) {
    return _cvtmask64_u64(_load_mask64(reinterpret_cast<__mmask64*>(const_cast<uint8_t*>(from))));
}

// The lanes of a panel that are outputs.
inline __mmask16 output_lanes(const PanelWeights& w, int64_t panel) {
    const int64_t left = w.num_outputs - panel * kPanelOutputs;
    return static_cast<__mmask16>(left >= kPanelOutputs ? 0xffff : (1 << left) - 1);
}

// The outputs of one row and panel in y, without the lanes that are padding.
struct Lanes {
    float* y;
    __mmask16 lanes;
    Lanes(const PanelWeights& w, int64_t panel, float* where) : y(where), lanes(output_lanes(w, panel)) {}
    __m512 load_unless(bool zero) const { return _mm512_maskz_loadu_ps(zero ? 0 : lanes, y); }
    void store(__m512 values) const { _mm512_mask_storeu_ps(y, lanes, values); }
};

// Streams read a panel from its start, two steps at a time; fetch() prefetches for later. Codes of odd steps come
// shifted left by kOddShift; `pruned` is what a pruned code reads as, see pruned_codes.

struct DenseInt8 {
    static constexpr int kOddShift = 0;
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void fetch(int num_steps) const { prefetch<2048>(values, num_steps * 64); }
    void next(__m512i, __m512i& even, __m512i& odd) {
        even = load(values);
        odd = load(values + 64);
        values += 128;
    }
};

struct DenseInt4 {
    static constexpr int kOddShift = 4;
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void fetch(int num_steps) const { prefetch<2048>(values, num_steps * 32); }
    void next(__m512i, __m512i& even, __m512i& odd) {
        const __m512i both = load(values);
        even = _mm512_and_si512(both, _mm512_set1_epi8(0x0f));
        odd = _mm512_and_si512(both, _mm512_set1_epi8(static_cast<char>(0xf0)));
        values += 64;
    }
};

struct MaskInt8 {
    static constexpr int kOddShift = 0;
    const uint8_t *values, *mask;
    void start(const PanelWeights& w, int64_t panel) {
        values = w.values + w.value_offsets[panel];
        mask = w.mask + panel * w.num_blocks * kMaskBytes;
    }
    void fetch(int num_steps) const {
        prefetch<4096>(values, num_steps * 32);
        prefetch<4096>(mask, num_steps * 8);
    }
    void next(__m512i pruned, __m512i& even, __m512i& odd) {
        const uint64_t even_mask = load_u64(mask), odd_mask = load_u64(mask + 8);
        even = _mm512_mask_expand_epi8(pruned, even_mask, load(values));
        values += _mm_popcnt_u64(even_mask);
        odd = _mm512_mask_expand_epi8(pruned, odd_mask, load(values));
        values += _mm_popcnt_u64(odd_mask);
        mask += 16;
    }
};

struct MaskInt4 {
    static constexpr int kOddShift = 4;
    const uint8_t *low, *high, *mask;
    void start(const PanelWeights& w, int64_t panel) {
        low = high = w.values + w.value_offsets[panel];
        mask = w.mask + panel * w.num_blocks * kMaskBytes;
    }
    void fetch(int num_steps) const {
        prefetch<4096>(low, num_steps * 16);
        prefetch<4096>(mask, num_steps * 8);
    }
    void next(__m512i pruned, __m512i& even, __m512i& odd) {
        const uint64_t even_mask = load_u64(mask), odd_mask = load_u64(mask + 8);
        // Both nibbles are expanded, and the one of the other stream dropped after.
        even = _mm512_and_si512(_mm512_mask_expand_epi8(pruned, even_mask, load(low)), _mm512_set1_epi8(0x0f));
        odd = _mm512_and_si512(_mm512_mask_expand_epi8(pruned, odd_mask, load(high)),
                               _mm512_set1_epi8(static_cast<char>(0xf0)));
        low += _mm_popcnt_u64(even_mask);
        high += _mm_popcnt_u64(odd_mask);
        mask += 16;
    }
};

// Zero points (one per lane) in every byte; for 4-bit codes in both nibbles.
template <class Stream>
inline __m512i pruned_codes(__m512i zero_points) {
    return _mm512_mullo_epi32(zero_points, _mm512_set1_epi32(Stream::kOddShift == 4 ? 0x11111111 : 0x01010101));
}

struct DenseF32 {
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void fetch(int num_columns) const { prefetch<2048>(values, num_columns * 64); }
    void next(__m512& even, __m512& odd) {
        even = _mm512_castsi512_ps(load(values));
        odd = _mm512_castsi512_ps(load(values + 64));
        values += 128;
    }
};

inline void widen_pairs(__m512i pairs, __m512& even, __m512& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

struct DenseBf16 {
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void fetch(int num_columns) const { prefetch<2048>(values, num_columns * 32); }
    void next(__m512& even, __m512& odd) {
        widen_pairs(load(values), even, odd);
        values += 64;
    }
};

struct MaskBf16 {
    const uint8_t *values, *mask;
    void start(const PanelWeights& w, int64_t panel) {
        values = w.values + w.value_offsets[panel];
        mask = w.mask + panel * w.num_blocks * kMaskBytes;
    }
    void fetch(int num_columns) const {
        prefetch<4096>(values, num_columns * 16);
        prefetch<4096>(mask, num_columns * 2);
    }
    void next(__m512& even, __m512& odd) {
        const uint32_t kept = _cvtmask32_u32(_load_mask32(reinterpret_cast<__mmask32*>(const_cast<uint8_t*>(mask))));
        widen_pairs(_mm512_mask_expand_epi16(_mm512_setzero_si512(), kept, load(values)), even, odd);
        values += 2 * _mm_popcnt_u32(kept);
        mask += 4;
    }
};

// Scales and zero points of the group that a segment lies in, walking the segments in order.
struct Groups {
    const PanelWeights& w;
    int64_t group, left;
    Groups(const PanelWeights& weights, int64_t segment)
        : w(weights),
          group(segment / weights.segments_per_group),
          left(weights.segments_per_group - segment % weights.segments_per_group) {}
    // True when the next segment lies in another group.
    bool advance() {
        if (--left != 0) return false;
        left = w.segments_per_group;
        ++group;
        return true;
    }
    __m512 scales(int64_t panel) const { return widen_bf16(w.scales + (panel * w.num_groups + group) * kPanelOutputs); }
    __m512i zero_points(int64_t panel) const {
        return w.zero_points == nullptr ? _mm512_set1_epi32(w.zero_point)
                                        : widen_bytes(w.zero_points + (panel * w.num_groups + group) * kPanelOutputs);
    }
};

template <int kSteps>
inline int32_t segment_sum(const int32_t* half_sums, int64_t segment) {
    return kSteps == 8 ? half_sums[segment] : half_sums[2 * segment] + half_sums[2 * segment + 1];
}

// One row of activations by kPanels panels, `distance` apart, straight from the packed bytes. kSymmetric: all zero
// points are the same.
template <class Stream, int kPanels, int kSteps, bool kSymmetric>
void one_row_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const int64_t row = part.row_begin;
    const int8_t* q = rows.q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    Stream streams[kPanels];
    __m512 totals[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        streams[p].start(w, panel + p * distance);
        totals[p] = _mm512_setzero_ps();
    }
    const int64_t num_segments = w.num_blocks * (16 / kSteps);
    const __m512i one_zero_point = _mm512_set1_epi32(w.zero_point);
    const __m512i one_pruned = pruned_codes<Stream>(one_zero_point);
    Groups groups(w, 0);
    for (int64_t segment = 0; segment < num_segments; ++segment) {
        const int32_t sum = segment_sum<kSteps>(half_sums, segment);
        Sums evens[kPanels], odds[kPanels];
        __m512i pruned[kPanels];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            const __m512i zero_points = kSymmetric ? one_zero_point : groups.zero_points(panel + p * distance);
            pruned[p] = kSymmetric ? one_pruned : pruned_codes<Stream>(zero_points);
            evens[p] = times(zero_points, -sum);
            odds[p] = Sums{};
            streams[p].fetch(kSteps);
        }
        UNROLL for (int pair = 0; pair < kSteps / 2; ++pair, q += 8) {
            const __m512i even_q = broadcast_4(q), odd_q = broadcast_4(q + 4);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m512i even, odd;
                streams[p].next(pruned[p], even, odd);
                evens[p] = dot_4(evens[p], even, even_q);
                odds[p] = dot_4(odds[p], odd, odd_q);
            }
        }
        const __m512 row_scale = _mm512_set1_ps(row_scales[segment * kSteps / 16]);
        UNROLL for (int p = 0; p < kPanels; ++p) {
            const __m512 scales = _mm512_mul_ps(row_scale, groups.scales(panel + p * distance));
            totals[p] = _mm512_fmadd_ps(to_floats(evens[p] + (odds[p] >> Stream::kOddShift)), scales, totals[p]);
        }
        groups.advance();
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t output = (panel + p * distance) * kPanelOutputs;
        Lanes(w, panel + p * distance, part.y + row * part.y_stride + output).store(totals[p]);
    }
}

template <class Stream, int kPanels>
void one_row_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const float* x = rows.x + part.row_begin * rows.stride;
    Stream streams[kPanels];
    __m512 totals[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        streams[p].start(w, panel + p * distance);
        totals[p] = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m512 sums[kPanels];
        UNROLL for (int p = 0; p < kPanels; ++p) { sums[p] = _mm512_setzero_ps(); }
        for (int pair = 0; pair < kBlockInputs / 2; ++pair, x += 2) {
            if (pair % 8 == 0) {
                UNROLL for (int p = 0; p < kPanels; ++p) { streams[p].fetch(16); }
            }
            const __m512 even_x = _mm512_set1_ps(x[0]), odd_x = _mm512_set1_ps(x[1]);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m512 even, odd;
                streams[p].next(even, odd);
                sums[p] = _mm512_fmadd_ps(even_x, even, sums[p]);
                sums[p] = _mm512_fmadd_ps(odd_x, odd, sums[p]);
            }
        }
        UNROLL for (int p = 0; p < kPanels; ++p) { totals[p] = _mm512_add_ps(totals[p], sums[p]); }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t output = (panel + p * distance) * kPanelOutputs;
        Lanes(w, panel + p * distance, part.y + part.row_begin * part.y_stride + output).store(totals[p]);
    }
}

using OneRowFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t panel, int64_t distance);

// One row walks two stretches of panels together, each a sequential read of memory; or one, where the stretches would
// be so short that fetching ahead in the first would only reach into the second.
void walk_panels(const PanelWeights& w, const Rows& rows, const Part& part, OneRowFunction two, OneRowFunction one) {
    constexpr int64_t kShortest = 32 << 10;
    int64_t panel = part.panel_begin;
    const int64_t distance = (part.panel_end - panel) / 2;
    if (w.value_offsets[panel + distance] - w.value_offsets[panel] >= kShortest) {
        for (; panel < part.panel_begin + distance; ++panel) two(w, rows, part, panel, distance);
        panel += distance;
    }
    for (; panel < part.panel_end; ++panel) one(w, rows, part, panel, 0);
}

// A stretch of blocks of some neighbouring panels, expanded (or dense already): what the register tiles multiply with.
struct Tile {
    const uint8_t* values;  // of the first panel, first block
    int64_t panel_stride;   // bytes
    int64_t panel, block_begin, block_end;
};

// kRows rows from `row` on by kPanels expanded panels; adds to y unless the tile starts at block 0.
template <int kRows, int kPanels, int kSteps>
void tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    constexpr int kSegments = 16 / kSteps;
    const int8_t* q = rows.q + row * rows.stride + tile.block_begin * kBlockInputs;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    float* y = part.y + row * part.y_stride + tile.panel * kPanelOutputs;
    const uint8_t* values = tile.values;
    Groups groups(w, tile.block_begin * kSegments);
    for (int64_t segment = tile.block_begin * kSegments; segment < tile.block_end * kSegments; ++segment) {
        Sums dots[kRows][kPanels];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t sum = segment_sum<kSteps>(half_sums + r * rows.num_blocks * 2, segment);
            UNROLL for (int p = 0; p < kPanels; ++p) dots[r][p] = times(groups.zero_points(tile.panel + p), -sum);
        }
        for (int step = 0; step < kSteps; ++step, q += 4, values += 64) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512i row_q = broadcast_4(q + r * rows.stride);
                UNROLL for (int p = 0; p < kPanels; ++p) dots[r][p] =
                    dot_4(dots[r][p], load(values + p * tile.panel_stride), row_q);
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const __m512 scales = _mm512_mul_ps(row_scale, groups.scales(tile.panel + p));
                const Lanes total(w, tile.panel + p, y + r * part.y_stride + p * kPanelOutputs);
                total.store(_mm512_fmadd_ps(to_floats(dots[r][p]), scales, total.load_unless(segment == 0)));
            }
        }
        groups.advance();
    }
}

template <int kRows, int kPanels>
void tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    const float* x = rows.x + row * rows.stride + tile.block_begin * kBlockInputs;
    float* y = part.y + row * part.y_stride + tile.panel * kPanelOutputs;
    const uint8_t* values = tile.values;
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
        __m512 sums[kRows][kPanels];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPanels; ++p) sums[r][p] = _mm512_setzero_ps();
        }
        for (int column = 0; column < kBlockInputs; ++column, ++x, values += 64) {
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512 row_x = _mm512_set1_ps(x[r * rows.stride]);
                UNROLL for (int p = 0; p < kPanels; ++p) {
                    const __m512i weights = load(values + p * tile.panel_stride);
                    sums[r][p] = _mm512_fmadd_ps(row_x, _mm512_castsi512_ps(weights), sums[r][p]);
                }
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const Lanes total(w, tile.panel + p, y + r * part.y_stride + p * kPanelOutputs);
                total.store(_mm512_add_ps(total.load_unless(block == 0), sums[r][p]));
            }
        }
    }
}

using TileFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Tile&, int64_t);

template <int kPanels, int kSteps>
constexpr TileFunction kIntTiles[kTileRows] = {tile_int<1, kPanels, kSteps>, tile_int<2, kPanels, kSteps>,
                                               tile_int<3, kPanels, kSteps>, tile_int<4, kPanels, kSteps>,
                                               tile_int<5, kPanels, kSteps>, tile_int<6, kPanels, kSteps>};
template <int kPanels>
constexpr TileFunction kFloatTiles[kTileRows] = {tile_float<1, kPanels>, tile_float<2, kPanels>,
                                                 tile_float<3, kPanels>, tile_float<4, kPanels>,
                                                 tile_float<5, kPanels>, tile_float<6, kPanels>};

void multiply_tile(const TileFunction* functions, const PanelWeights& w, const Rows& rows, const Part& part,
                   const Tile& tile) {
    for (int64_t row = part.row_begin; row < part.row_end;) {
        const int64_t left = part.row_end - row;
        const int64_t count = left < kTileRows ? left : kTileRows;
        functions[count - 1](w, rows, part, tile, row);
        row += count;
    }
}

// Expands blocks [begin, end) of one panel into plain codes.
template <class Stream, int kSteps>
void expand_int(const PanelWeights& w, Stream& stream, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
    constexpr int kSegments = 16 / kSteps;
    Groups groups(w, begin * kSegments);
    for (int64_t segment = begin * kSegments; segment < end * kSegments; ++segment) {
        const __m512i pruned = pruned_codes<Stream>(groups.zero_points(panel));
        for (int pair = 0; pair < kSteps / 2; ++pair, out += 128) {
            __m512i even, odd;
            stream.next(pruned, even, odd);
            _mm512_store_si512(out, even);
            _mm512_store_si512(out + 64, _mm512_srli_epi16(odd, Stream::kOddShift));
        }
        groups.advance();
    }
}

template <class Stream>
void expand_float(Stream& stream, int64_t num_blocks, uint8_t* out) {
    for (int64_t pair = 0; pair < num_blocks * kBlockInputs / 2; ++pair, out += 128) {
        __m512 even, odd;
        stream.next(even, odd);
        _mm512_store_ps(out, even);
        _mm512_store_ps(out + 64, odd);
    }
}

template <class Stream>
constexpr bool kIsExpanded = false;
template <>
constexpr bool kIsExpanded<DenseInt8> = true;
template <>
constexpr bool kIsExpanded<DenseF32> = true;

template <class Stream, int kSteps>
void multiply_int_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin == 1) {
        if (w.zero_points == nullptr)
            walk_panels(w, rows, part, one_row_int<Stream, 2, kSteps, true>, one_row_int<Stream, 1, kSteps, true>);
        else
            walk_panels(w, rows, part, one_row_int<Stream, 2, kSteps, false>, one_row_int<Stream, 1, kSteps, false>);
        return;
    }
    int64_t panel = part.panel_begin;
    alignas(64) uint8_t expanded[kTilePanels * kIntTileBlocks * kIntBlockBytes];
    while (panel < part.panel_end) {
        const int num_panels = part.panel_end - panel >= kTilePanels ? kTilePanels : 1;
        Stream streams[kTilePanels];
        for (int p = 0; p < num_panels; ++p) streams[p].start(w, panel + p);
        const uint8_t* values = w.values + w.value_offsets[panel];
        const TileFunction* functions = num_panels == 1 ? kIntTiles<1, kSteps> : kIntTiles<kTilePanels, kSteps>;
        for (int64_t begin = 0; begin < w.num_blocks; begin += kIntTileBlocks) {
            const int64_t end = begin + kIntTileBlocks < w.num_blocks ? begin + kIntTileBlocks : w.num_blocks;
            Tile tile{values + begin * kIntBlockBytes, w.num_blocks * kIntBlockBytes, panel, begin, end};
            if (!kIsExpanded<Stream>) {
                tile.values = expanded;
                tile.panel_stride = kIntTileBlocks * kIntBlockBytes;
                for (int p = 0; p < num_panels; ++p)
                    expand_int<Stream, kSteps>(w, streams[p], panel + p, begin, end, expanded + p * tile.panel_stride);
            }
            multiply_tile(functions, w, rows, part, tile);
        }
        panel += num_panels;
    }
}

template <class Stream>
void multiply_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        multiply_int_steps<Stream, 16>(w, rows, part);
    else
        multiply_int_steps<Stream, 8>(w, rows, part);
}

template <class Stream>
void multiply_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    int64_t panel = part.panel_begin;
    if (part.row_end - part.row_begin == 1) {
        walk_panels(w, rows, part, one_row_float<Stream, 2>, one_row_float<Stream, 1>);
        return;
    }
    alignas(64) uint8_t expanded[kTilePanels * kFloatTileBlocks * kFloatBlockBytes];
    while (panel < part.panel_end) {
        const int num_panels = part.panel_end - panel >= kTilePanels ? kTilePanels : 1;
        Stream streams[kTilePanels];
        for (int p = 0; p < num_panels; ++p) streams[p].start(w, panel + p);
        const uint8_t* values = w.values + w.value_offsets[panel];
        const TileFunction* functions = num_panels == 1 ? kFloatTiles<1> : kFloatTiles<kTilePanels>;
        for (int64_t begin = 0; begin < w.num_blocks; begin += kFloatTileBlocks) {
            const int64_t end = begin + kFloatTileBlocks < w.num_blocks ? begin + kFloatTileBlocks : w.num_blocks;
            Tile tile{values + begin * kFloatBlockBytes, w.num_blocks * kFloatBlockBytes, panel, begin, end};
            if (!kIsExpanded<Stream>) {
                tile.values = expanded;
                tile.panel_stride = kFloatTileBlocks * kFloatBlockBytes;
                for (int p = 0; p < num_panels; ++p)
                    expand_float(streams[p], end - begin, expanded + p * tile.panel_stride);
            }
            multiply_tile(functions, w, rows, part, tile);
        }
        panel += num_panels;
    }
}

}  // namespace

void dense_f32_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<DenseF32>(w, rows, part);
}
void dense_bf16_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<DenseBf16>(w, rows, part);
}
void mask_bf16_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<MaskBf16>(w, rows, part);
}
void dense_int8_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<DenseInt8>(w, rows, part);
}
void dense_int4_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<DenseInt4>(w, rows, part);
}
void mask_int8_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<MaskInt8>(w, rows, part);
}
void mask_int4_avx512(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<MaskInt4>(w, rows, part);
}

void quantize_row_avx512(const float* x, int64_t num_inputs, int8_t* q, int16_t*, float* scales, int32_t* sums) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    const float infinity = __builtin_inff();
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        __m512 values[4];
        __m512i magnitude = _mm512_setzero_si512();
        UNROLL for (int i = 0; i < 4; ++i) {
            const int64_t left = num_inputs - begin - 16 * i;
            const __mmask16 lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
            values[i] = _mm512_maskz_loadu_ps(lanes, x + begin + 16 * i);
            // As integers the magnitudes keep their order, and infinity and NaN come last.
            magnitude = _mm512_max_epi32(magnitude, _mm512_castps_si512(_mm512_andnot_ps(sign, values[i])));
        }
        const int32_t bits = _mm512_reduce_max_epi32(magnitude);
        const bool finite = bits < 0x7f800000;
        float amax;
        __builtin_memcpy(&amax, &bits, 4);
        const float inverse = bits > 0 ? 127.0f / amax : infinity;
        const bool usable = finite && inverse < infinity;
        const __m512 factor = _mm512_set1_ps(inverse);
        __m512i quarters[4];
        UNROLL for (int i = 0; i < 4; ++i) {
            quarters[i] = _mm512_setzero_si512();
            if (!usable) continue;
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor));
            quarters[i] = _mm512_max_epi32(_mm512_min_epi32(rounded, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + begin + 16 * i), _mm512_cvtepi32_epi8(quarters[i]));
        }
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = _mm512_reduce_add_epi32(_mm512_add_epi32(quarters[0], quarters[1]));
        sums[2 * block + 1] = _mm512_reduce_add_epi32(_mm512_add_epi32(quarters[2], quarters[3]));
    }
}

}  // namespace rarefy::matmul
