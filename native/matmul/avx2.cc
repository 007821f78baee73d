// AVX2 kernels. A step of a panel is two vectors of 8 outputs.
//
// 4-bit codes: vpmaddubsw of unsigned codes and activations; 8 steps fit 16 bits (8 * 2 * 15 * 127 < 2^15).
// 8-bit codes: that would saturate, so columns 0 and 2, then 1 and 3, are widened to 16 bits and meet wide activations.
#include <immintrin.h>

#include "matmul/kernels.h"

namespace rarefy::matmul {
namespace {

#define UNROLL _Pragma("GCC unroll 32")

constexpr int kHalves = 2;
constexpr int kIntTileRows = 4;
constexpr int kFloatTileRows = 6;
constexpr int kIntTileBlocks = 16;
constexpr int kFloatTileBlocks = 4;

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

inline uint64_t load_u64(const uint8_t* from) {
    uint64_t bits;
    __builtin_memcpy(&bits, from, 8);
    return bits;
}

inline uint32_t load_u32(const void* from) {
    uint32_t bits;
    __builtin_memcpy(&bits, from, 4);
    return bits;
}

inline __m256i broadcast_u32(const void* from) { return _mm256_set1_epi32(static_cast<int>(load_u32(from))); }

inline __m256 widen_bf16(const uint16_t* from) {
    const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The lanes of 8 outputs from `output` on that exist, as a mask of AVX.
inline __m256i output_lanes(const PanelWeights& w, int64_t output) {
    const int64_t left = w.num_outputs - output;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left > 8 ? 8 : left < 0 ? 0 : static_cast<int>(left)), lane);
}

// Shuffles that spread the first elements of a vector over the set bits of an 8-bit mask; 0x80 where a bit is not set.
struct Shuffles {
    uint64_t bytes[256];
    uint64_t words[256][2];
};

constexpr Shuffles make_shuffles() {
    Shuffles shuffles{};
    for (int mask = 0; mask < 256; ++mask) {
        uint64_t next = 0;
        for (int bit = 0; bit < 8; ++bit) {
            const bool kept = mask >> bit & 1;
            shuffles.bytes[mask] |= (kept ? next : 0x80) << (8 * bit);
            shuffles.words[mask][bit / 4] |= (kept ? 2 * next | (2 * next + 1) << 8 : 0x8080) << (16 * (bit % 4));
            next += kept;
        }
    }
    return shuffles;
}

alignas(64) constexpr Shuffles kShuffles = make_shuffles();

// The next values of a stream at the set bits of a 16-bit mask, `pruned` at the others. kShift 4: from the high
// nibbles.
template <bool kInt4, int kShift>
inline __m128i expand_16(const uint8_t*& values, uint32_t mask, __m128i pruned) {
    const uint32_t first = mask & 0xff, second = mask >> 8 & 0xff;
    const uint64_t num_first = static_cast<uint64_t>(_mm_popcnt_u32(first));
    __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    values += _mm_popcnt_u32(mask);
    const __m128i order = _mm_set_epi64x(static_cast<int64_t>(kShuffles.bytes[second] + num_first * 0x0101010101010101),
                                         static_cast<int64_t>(kShuffles.bytes[first]));
    if (kInt4) codes = _mm_and_si128(_mm_srli_epi16(codes, kShift), _mm_set1_epi8(15));
    return _mm_blendv_epi8(_mm_shuffle_epi8(codes, order), pruned, order);
}

template <bool kInt4, int kShift>
inline void expand_step(const uint8_t*& values, const uint8_t* mask, const __m256i (&pruned)[kHalves],
                        __m256i (&codes)[kHalves]) {
    UNROLL for (int half = 0; half < kHalves; ++half) {
        const uint32_t bits = load_u32(mask + 4 * half);
        const __m128i low = expand_16<kInt4, kShift>(values, bits & 0xffff, _mm256_castsi256_si128(pruned[half]));
        const __m128i high = expand_16<kInt4, kShift>(values, bits >> 16, _mm256_extracti128_si256(pruned[half], 1));
        codes[half] = _mm256_set_m128i(high, low);
    }
}

// Streams read a panel from its start, two steps at a time. set_zero_points comes before the first step of each group.

struct DenseStream {
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void set_zero_points(const __m256i (&)[kHalves]) {}
};

struct DenseInt8 : DenseStream {
    static constexpr bool kInt4 = false;
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            even[half] = load(values + 32 * half);
            odd[half] = load(values + 64 + 32 * half);
        }
        values += 128;
    }
};

struct DenseInt4 : DenseStream {
    static constexpr bool kInt4 = true;
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        const __m256i low = _mm256_set1_epi8(15);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256i both = load(values + 32 * half);
            even[half] = _mm256_and_si256(both, low);
            odd[half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
        values += 64;
    }
};

template <bool kIsInt4>
struct MaskInt {
    static constexpr bool kInt4 = kIsInt4;
    const uint8_t *values, *high, *mask;
    __m256i pruned[kHalves];
    void start(const PanelWeights& w, int64_t panel) {
        values = high = w.values + w.value_offsets[panel];
        mask = w.mask + panel * w.num_blocks * kMaskBytes;
    }
    void set_zero_points(const __m256i (&codes)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) { pruned[half] = codes[half]; }
    }
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        expand_step<kInt4, 0>(values, mask, pruned, even);
        expand_step<kInt4, kInt4 ? 4 : 0>(kInt4 ? high : values, mask + 8, pruned, odd);
        mask += 16;
    }
};

inline void widen_pairs(__m256i pairs, __m256& even, __m256& odd) {
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

struct DenseF32 : DenseStream {
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            even[half] = _mm256_castsi256_ps(load(values + 32 * half));
            odd[half] = _mm256_castsi256_ps(load(values + 64 + 32 * half));
        }
        values += 128;
    }
};

struct DenseBf16 : DenseStream {
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            widen_pairs(load(values + 32 * half), even[half], odd[half]);
        }
        values += 64;
    }
};

struct MaskBf16 {
    const uint8_t *values, *mask;
    void start(const PanelWeights& w, int64_t panel) {
        values = w.values + w.value_offsets[panel];
        mask = w.mask + panel * w.num_blocks * kMaskBytes;
    }
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            __m128i quarters[2];
            UNROLL for (int i = 0; i < 2; ++i) {
                const uint8_t bits = mask[2 * half + i];
                const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
                const auto* order = reinterpret_cast<const __m128i*>(kShuffles.words[bits]);
                quarters[i] = _mm_shuffle_epi8(kept, _mm_load_si128(order));
                values += 2 * _mm_popcnt_u32(bits);
            }
            widen_pairs(_mm256_set_m128i(quarters[1], quarters[0]), even[half], odd[half]);
        }
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
    int64_t offset(int64_t panel, int half) const { return (panel * w.num_groups + group) * kPanelOutputs + 8 * half; }
    __m256 scales(int64_t panel, int half) const { return widen_bf16(w.scales + offset(panel, half)); }
    __m256i zero_points(int64_t panel, int half) const {
        if (w.zero_points == nullptr) return _mm256_set1_epi32(w.zero_point);
        const auto* from = reinterpret_cast<const __m128i*>(w.zero_points + offset(panel, half));
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(from));
    }
    template <class Stream>
    void give_zero_points(Stream& stream, int64_t panel) const {
        __m256i codes[kHalves];
        UNROLL for (int half = 0; half < kHalves; ++half) {
            codes[half] = _mm256_mullo_epi32(zero_points(panel, half), _mm256_set1_epi32(0x01010101));
        }
        stream.set_zero_points(codes);
    }
};

template <int kSteps>
inline int32_t segment_sum(const int32_t* half_sums, int64_t segment) {
    return kSteps == 8 ? half_sums[segment] : half_sums[2 * segment] + half_sums[2 * segment + 1];
}

inline __m256i add_int4(__m256i sums_16, __m256i codes, __m256i q) {
    return _mm256_add_epi16(sums_16, _mm256_maddubs_epi16(codes, q));
}

inline __m256i fold_int4(__m256i dots, __m256i sums_16) {
    return _mm256_add_epi32(dots, _mm256_madd_epi16(sums_16, _mm256_set1_epi16(1)));
}

inline __m256i low_bytes(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi16(0xff)); }
inline __m256i high_bytes(__m256i codes) { return _mm256_srli_epi16(codes, 8); }

inline __m256i add_int8(__m256i dots, __m256i codes_02, __m256i codes_13, __m256i q_02, __m256i q_13) {
    dots = _mm256_add_epi32(dots, _mm256_madd_epi16(codes_02, q_02));
    return _mm256_add_epi32(dots, _mm256_madd_epi16(codes_13, q_13));
}

template <class Stream, int kSteps>
void one_row_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    const int64_t row = part.row_begin;
    const int8_t* q = rows.q + row * rows.stride;
    const int16_t* wide_q = Stream::kInt4 ? nullptr : rows.wide_q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    Stream stream;
    stream.start(w, panel);
    __m256 totals[kHalves] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    Groups groups(w, 0);
    bool new_group = true;
    for (int64_t segment = 0; segment < w.num_blocks * (16 / kSteps); ++segment) {
        if (new_group) groups.give_zero_points(stream, panel);
        const __m256i sum = _mm256_set1_epi32(-segment_sum<kSteps>(half_sums, segment));
        __m256i dots[kHalves];
        UNROLL for (int half = 0; half < kHalves; ++half) {
            dots[half] = _mm256_mullo_epi32(groups.zero_points(panel, half), sum);
        }
        for (int eighth = 0; eighth < kSteps / 8; ++eighth) {
            __m256i sums_16[kHalves] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            UNROLL for (int i = 0; i < 4; ++i) {
                __m256i codes[2][kHalves];
                stream.next(codes[0], codes[1]);
                UNROLL for (int step = 0; step < 2; ++step) {
                    if constexpr (Stream::kInt4) {
                        const __m256i four = broadcast_u32(q);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            sums_16[half] = add_int4(sums_16[half], codes[step][half], four);
                        }
                        q += 4;
                    } else {
                        const __m256i q_02 = broadcast_u32(wide_q), q_13 = broadcast_u32(wide_q + 2);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            dots[half] = add_int8(dots[half], low_bytes(codes[step][half]),
                                                  high_bytes(codes[step][half]), q_02, q_13);
                        }
                        wide_q += 4;
                    }
                }
            }
            if constexpr (Stream::kInt4) {
                UNROLL for (int half = 0; half < kHalves; ++half) { dots[half] = fold_int4(dots[half], sums_16[half]); }
            }
        }
        const __m256 row_scale = _mm256_set1_ps(row_scales[segment * kSteps / 16]);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            totals[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half]),
                                           _mm256_mul_ps(row_scale, groups.scales(panel, half)), totals[half]);
        }
        new_group = groups.advance();
    }
    float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
    UNROLL for (int half = 0; half < kHalves; ++half) {
        _mm256_maskstore_ps(y + 8 * half, output_lanes(w, panel * kPanelOutputs + 8 * half), totals[half]);
    }
}

// kPanels panels together, so that the chains of additions overlap.
template <class Stream, int kPanels>
void one_row_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    const float* x = rows.x + part.row_begin * rows.stride;
    Stream streams[kPanels];
    __m256 totals[kPanels][kHalves];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        streams[p].start(w, panel + p);
        UNROLL for (int half = 0; half < kHalves; ++half) { totals[p][half] = _mm256_setzero_ps(); }
    }
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m256 sums[kPanels][kHalves];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            UNROLL for (int half = 0; half < kHalves; ++half) { sums[p][half] = _mm256_setzero_ps(); }
        }
        for (int pair = 0; pair < kBlockInputs / 2; ++pair, x += 2) {
            const __m256 even_x = _mm256_broadcast_ss(x), odd_x = _mm256_broadcast_ss(x + 1);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m256 even[kHalves], odd[kHalves];
                streams[p].next(even, odd);
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    sums[p][half] = _mm256_fmadd_ps(even_x, even[half], sums[p][half]);
                    sums[p][half] = _mm256_fmadd_ps(odd_x, odd[half], sums[p][half]);
                }
            }
        }
        UNROLL for (int p = 0; p < kPanels; ++p) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                totals[p][half] = _mm256_add_ps(totals[p][half], sums[p][half]);
            }
        }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const int64_t output = (panel + p) * kPanelOutputs + 8 * half;
            _mm256_maskstore_ps(part.y + part.row_begin * part.y_stride + output, output_lanes(w, output),
                                totals[p][half]);
        }
    }
}

// A stretch of blocks of one panel, expanded (or dense already): what the register tiles multiply with.
struct Tile {
    const uint8_t* values;
    int64_t panel, block_begin, block_end;
};

// The outputs of kRows rows while a tile is multiplied; starts at 0 with block 0, else at y.
template <int kRows>
struct Totals {
    __m256 sums[kRows][kHalves];
    float* y;
    int64_t stride;
    __m256i lanes[kHalves];
    Totals(const PanelWeights& w, const Part& part, const Tile& tile, int64_t row)
        : y(part.y + row * part.y_stride + tile.panel * kPanelOutputs), stride(part.y_stride) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            lanes[half] = output_lanes(w, tile.panel * kPanelOutputs + 8 * half);
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                sums[r][half] = tile.block_begin == 0 ? _mm256_setzero_ps()
                                                      : _mm256_maskload_ps(y + r * stride + 8 * half, lanes[half]);
            }
        }
    }
    void store() const {
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                _mm256_maskstore_ps(y + r * stride + 8 * half, lanes[half], sums[r][half]);
            }
        }
    }
};

// Expanded 4-bit codes: 64 bytes per step. Expanded 8-bit codes: 128 bytes per step, for each half columns 0 and 2 and
// then columns 1 and 3 in 16 bits.
template <bool kInt4>
constexpr int kStepBytes = kInt4 ? 64 : 128;

template <bool kInt4, int kRows, int kSteps>
void tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    constexpr int kSegments = 16 / kSteps;
    const int64_t first = row * rows.stride + tile.block_begin * kBlockInputs;
    const int8_t* q = rows.q + first;
    const int16_t* wide_q = kInt4 ? nullptr : rows.wide_q + first;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    Totals<kRows> totals(w, part, tile, row);
    const uint8_t* values = tile.values;
    Groups groups(w, tile.block_begin * kSegments);
    for (int64_t segment = tile.block_begin * kSegments; segment < tile.block_end * kSegments; ++segment) {
        __m256i dots[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m256i sum = _mm256_set1_epi32(-segment_sum<kSteps>(half_sums + r * rows.num_blocks * 2, segment));
            UNROLL for (int half = 0; half < kHalves; ++half) {
                dots[r][half] = _mm256_mullo_epi32(groups.zero_points(tile.panel, half), sum);
            }
        }
        if constexpr (kInt4) {
            for (int eighth = 0; eighth < kSteps / 8; ++eighth) {
                __m256i sums_16[kRows][kHalves];
                UNROLL for (int r = 0; r < kRows; ++r) {
                    UNROLL for (int half = 0; half < kHalves; ++half) { sums_16[r][half] = _mm256_setzero_si256(); }
                }
                for (int step = 0; step < 8; ++step, q += 4, values += kStepBytes<kInt4>) {
                    const __m256i codes[kHalves] = {load(values), load(values + 32)};
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        const __m256i four = broadcast_u32(q + r * rows.stride);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            sums_16[r][half] = add_int4(sums_16[r][half], codes[half], four);
                        }
                    }
                }
                UNROLL for (int r = 0; r < kRows; ++r) {
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        dots[r][half] = fold_int4(dots[r][half], sums_16[r][half]);
                    }
                }
            }
        } else {
            for (int step = 0; step < 2 * kSteps; ++step, wide_q += 2, values += 64) {
                const __m256i codes[kHalves] = {load(values), load(values + 32)};
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m256i two = broadcast_u32(wide_q + r * rows.stride);
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(codes[half], two));
                    }
                }
            }
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256 scales = groups.scales(tile.panel, half);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256 row_scale = _mm256_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
                totals.sums[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][half]),
                                                       _mm256_mul_ps(row_scale, scales), totals.sums[r][half]);
            }
        }
        groups.advance();
    }
    totals.store();
}

template <int kRows>
void tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Tile& tile, int64_t row) {
    const float* x = rows.x + row * rows.stride + tile.block_begin * kBlockInputs;
    Totals<kRows> totals(w, part, tile, row);
    const uint8_t* values = tile.values;
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
        __m256 sums[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_ps(); }
        }
        for (int column = 0; column < kBlockInputs; ++column, ++x, values += 64) {
            const __m256 low = _mm256_castsi256_ps(load(values)), high = _mm256_castsi256_ps(load(values + 32));
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256 row_x = _mm256_broadcast_ss(x + r * rows.stride);
                sums[r][0] = _mm256_fmadd_ps(row_x, low, sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(row_x, high, sums[r][1]);
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                totals.sums[r][half] = _mm256_add_ps(totals.sums[r][half], sums[r][half]);
            }
        }
    }
    totals.store();
}

using TileFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const Tile&, int64_t);

template <bool kInt4, int kSteps>
constexpr TileFunction kIntTiles[kIntTileRows] = {tile_int<kInt4, 1, kSteps>, tile_int<kInt4, 2, kSteps>,
                                                  tile_int<kInt4, 3, kSteps>, tile_int<kInt4, 4, kSteps>};
constexpr TileFunction kFloatTiles[kFloatTileRows] = {tile_float<1>, tile_float<2>, tile_float<3>,
                                                      tile_float<4>, tile_float<5>, tile_float<6>};

void multiply_tile(const TileFunction* functions, int max_rows, const PanelWeights& w, const Rows& rows,
                   const Part& part, const Tile& tile) {
    for (int64_t row = part.row_begin; row < part.row_end;) {
        const int64_t left = part.row_end - row;
        const int64_t count = left < max_rows ? left : max_rows;
        functions[count - 1](w, rows, part, tile, row);
        row += count;
    }
}

// Expands blocks [begin, end) of one panel.
template <class Stream, int kSteps>
void expand_int(const PanelWeights& w, Stream& stream, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
    constexpr int kSegments = 16 / kSteps;
    Groups groups(w, begin * kSegments);
    bool new_group = true;
    for (int64_t segment = begin * kSegments; segment < end * kSegments; ++segment) {
        if (new_group) groups.give_zero_points(stream, panel);
        for (int pair = 0; pair < kSteps / 2; ++pair) {
            __m256i codes[2][kHalves];
            stream.next(codes[0], codes[1]);
            UNROLL for (int step = 0; step < 2; ++step) {
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    if constexpr (Stream::kInt4) {
                        store(out + 32 * half, codes[step][half]);
                    } else {
                        store(out + 32 * half, low_bytes(codes[step][half]));
                        store(out + 64 + 32 * half, high_bytes(codes[step][half]));
                    }
                }
                out += kStepBytes<Stream::kInt4>;
            }
        }
        new_group = groups.advance();
    }
}

template <class Stream>
void expand_float(Stream& stream, int64_t num_blocks, uint8_t* out) {
    for (int64_t pair = 0; pair < num_blocks * kBlockInputs / 2; ++pair, out += 128) {
        __m256 even[kHalves], odd[kHalves];
        stream.next(even, odd);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            store(out + 32 * half, _mm256_castps_si256(even[half]));
            store(out + 64 + 32 * half, _mm256_castps_si256(odd[half]));
        }
    }
}

template <class Stream, int kSteps>
void multiply_int_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin == 1) {
        for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel)
            one_row_int<Stream, kSteps>(w, rows, part, panel);
        return;
    }
    alignas(64) uint8_t expanded[kIntTileBlocks * 16 * kStepBytes<Stream::kInt4>];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream;
        stream.start(w, panel);
        for (int64_t begin = 0; begin < w.num_blocks; begin += kIntTileBlocks) {
            const int64_t end = begin + kIntTileBlocks < w.num_blocks ? begin + kIntTileBlocks : w.num_blocks;
            expand_int<Stream, kSteps>(w, stream, panel, begin, end, expanded);
            multiply_tile(kIntTiles<Stream::kInt4, kSteps>, kIntTileRows, w, rows, part, {expanded, panel, begin, end});
        }
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
        for (; panel + 2 <= part.panel_end; panel += 2) one_row_float<Stream, 2>(w, rows, part, panel);
        if (panel < part.panel_end) one_row_float<Stream, 1>(w, rows, part, panel);
        return;
    }
    alignas(64) uint8_t expanded[kFloatTileBlocks * kBlockInputs * 64];
    for (; panel < part.panel_end; ++panel) {
        Stream stream;
        stream.start(w, panel);
        for (int64_t begin = 0; begin < w.num_blocks; begin += kFloatTileBlocks) {
            const int64_t end = begin + kFloatTileBlocks < w.num_blocks ? begin + kFloatTileBlocks : w.num_blocks;
            expand_float(stream, end - begin, expanded);
            multiply_tile(kFloatTiles, kFloatTileRows, w, rows, part, {expanded, panel, begin, end});
        }
    }
}

}  // namespace

void dense_f32_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<DenseF32>(w, rows, part);
}
void dense_bf16_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<DenseBf16>(w, rows, part);
}
void mask_bf16_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<MaskBf16>(w, rows, part);
}
void dense_int8_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<DenseInt8>(w, rows, part);
}
void dense_int4_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<DenseInt4>(w, rows, part);
}
void mask_int8_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<MaskInt<false>>(w, rows, part);
}
void mask_int4_avx2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<MaskInt<true>>(w, rows, part);
}

void quantize_row_avx2(const float* x, int64_t num_inputs, int8_t* q, int16_t* wide_q, float* scales, int32_t* sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const float infinity = __builtin_inff();
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        alignas(32) float values[kBlockInputs] = {};
        const int64_t left = num_inputs - begin;
        const float* from = x + begin;
        if (left < kBlockInputs) {
            __builtin_memcpy(values, from, static_cast<unsigned long>(left) * 4);
            from = values;
        }
        __m256i magnitude = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < 8; ++i) {
            // As integers the magnitudes keep their order, and infinity and NaN come last.
            magnitude =
                _mm256_max_epi32(magnitude, _mm256_castps_si256(_mm256_andnot_ps(sign, _mm256_loadu_ps(from + 8 * i))));
        }
        alignas(32) int32_t lanes[8];
        store(lanes, magnitude);
        int32_t bits = 0;
        UNROLL for (int i = 0; i < 8; ++i) { bits = lanes[i] > bits ? lanes[i] : bits; }
        const bool finite = bits < 0x7f800000;
        float amax;
        __builtin_memcpy(&amax, &bits, 4);
        const float inverse = bits > 0 ? 127.0f / amax : infinity;
        const bool usable = finite && inverse < infinity;
        const __m256 factor = _mm256_set1_ps(inverse);
        int32_t half_sums[2] = {0, 0};
        alignas(32) int32_t rounded[kBlockInputs] = {};
        UNROLL for (int i = 0; i < 8; ++i) {
            if (!usable) continue;
            const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), factor));
            store(rounded + 8 * i,
                  _mm256_max_epi32(_mm256_min_epi32(whole, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127)));
        }
        for (int i = 0; i < kBlockInputs; ++i) {
            q[begin + i] = static_cast<int8_t>(rounded[i]);
            half_sums[i / 32] += rounded[i];
        }
        scales[block] = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = half_sums[0];
        sums[2 * block + 1] = half_sums[1];
        if (wide_q == nullptr) continue;
        for (int step = 0; step < 16; ++step) {
            constexpr int kOrder[4] = {0, 2, 1, 3};
            for (int i = 0; i < 4; ++i)
                wide_q[begin + 4 * step + i] = static_cast<int16_t>(rounded[4 * step + kOrder[i]]);
        }
    }
}

}  // namespace rarefy::matmul
