// Many rows by what an integer weight keeps, for AVX2 and AVX-VNNI. Vectors hold rows (row_panels.h): two kept entries
// of an output are broadcast, and meet two columns of 32 rows. So arithmetic takes time for what every single output
// keeps, and not for the fullest of 16, nor for what is zero.
//
// A code less its zero point is low + 16 * high, both of -15 to 15, so that vpmaddubsw with activations that are q +
// 128 never saturates; codes of 4 bits have the low part alone. Sums wrap around in 16 bits. They begin with what the
// 128 have added too much, and so end as they should wherever the true sum fits.
#pragma once

#include "matmul/core_avx2.h"
#include "matmul/row_panels.h"

// Two pairs at once gcc would add before it adds them to the sums, and has no registers for that.
#define ONE_BY_ONE _Pragma("GCC unroll 1")

namespace rarefy::matmul::avx2 {

// Two entries of each output.
template <int kParts>
struct KeptPair {
    alignas(32) uint32_t places[kPanelOutputs][2];        // bytes from a block's first column
    alignas(32) uint32_t entries[kParts][kPanelOutputs];  // both, twice
};

// What a panel keeps of a segment.
template <int kParts>
struct KeptSegment {
    KeptPair<kParts> pairs[kBlockInputs / 2];
    alignas(32) int32_t num_pairs[kPanelOutputs];
    alignas(32) int32_t starts[kPanelOutputs];                 // of sums in 32 bits
    alignas(32) uint32_t short_starts[kParts][kPanelOutputs];  // of sums in 16 bits, twice
    alignas(32) int32_t fits[kPanelOutputs];                   // not 0: the true sums fit 16 bits
};

// Fills a segment, four entries of each output at a time. Those of an output that are not zero come first.
template <int kParts>
class KeptFiller {
public:
    KeptFiller(KeptSegment<kParts>& segment, int64_t stride, const __m256i (&zero_points)[kHalves])
        : segment_(segment), stride_(_mm256_set1_epi32(static_cast<int>(stride))) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            whole_zero_points_[half] = zero_points[half];
            num_pairs_[half] = _mm256_setzero_si256();
            UNROLL for (int part = 0; part < kParts; ++part) {
                zero_points_[part][half] = part_of(zero_points[half], part);
                sums_[part][half] = sizes_[part][half] = _mm256_setzero_si256();
            }
        }
    }
    __m256i zero_points(int half) const { return whole_zero_points_[half]; }
    // 64 bytes of columns and of codes, 4 entries for each output.
    void add(const uint8_t* columns, const __m256i (&codes)[kHalves]) {
        KeptPair<kParts>* const pairs = segment_.pairs + count_;
        count_ += 2;
        UNROLL for (int i = 0; i < 8; ++i) {
            const __m256i wide =
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns + 8 * i)));
            const __m256i places = _mm256_permute4x64_epi64(_mm256_mullo_epi32(wide, stride_), 0xd8);
            _mm_store_si128(reinterpret_cast<__m128i*>(pairs[0].places[2 * i]), _mm256_castsi256_si128(places));
            _mm_store_si128(reinterpret_cast<__m128i*>(pairs[1].places[2 * i]), _mm256_extracti128_si256(places, 1));
        }
        const __m256i first =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
        const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(2));
        const __m256i ones = _mm256_set1_epi8(1);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            __m256i any = _mm256_setzero_si256();
            UNROLL for (int part = 0; part < kParts; ++part) {
                const __m256i entries = _mm256_sub_epi8(part_of(codes[half], part), zero_points_[part][half]);
                any = _mm256_or_si256(any, entries);
                store(pairs[0].entries[part] + 8 * half, _mm256_shuffle_epi8(entries, first));
                store(pairs[1].entries[part] + 8 * half, _mm256_shuffle_epi8(entries, second));
                sums_[part][half] = _mm256_add_epi16(sums_[part][half], _mm256_maddubs_epi16(ones, entries));
                sizes_[part][half] =
                    _mm256_add_epi16(sizes_[part][half], _mm256_maddubs_epi16(_mm256_abs_epi8(entries), ones));
            }
            const __m256i none = _mm256_cmpeq_epi16(any, _mm256_setzero_si256());
            num_pairs_[half] = _mm256_sub_epi16(num_pairs_[half], _mm256_andnot_si256(none, _mm256_set1_epi16(-1)));
        }
    }
    void finish() {
        const __m256i ones = _mm256_set1_epi16(1);
        constexpr int kMostOfShort = 32767 / 127;
        UNROLL for (int half = 0; half < kHalves; ++half) {
            __m256i starts = _mm256_setzero_si256(), fits = _mm256_set1_epi32(-1);
            UNROLL for (int part = 0; part < kParts; ++part) {
                const __m256i sums = _mm256_madd_epi16(sums_[part][half], ones);
                const __m256i start = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sums, 7));
                const __m256i low = _mm256_and_si256(start, _mm256_set1_epi32(0xffff));
                store(segment_.short_starts[part] + 8 * half, _mm256_or_si256(low, _mm256_slli_epi32(low, 16)));
                starts = _mm256_add_epi32(starts, _mm256_slli_epi32(start, 4 * part));
                const __m256i sizes = _mm256_madd_epi16(sizes_[part][half], ones);
                fits = _mm256_and_si256(fits, _mm256_cmpgt_epi32(_mm256_set1_epi32(kMostOfShort + 1), sizes));
            }
            store(segment_.starts + 8 * half, starts);
            store(segment_.fits + 8 * half, fits);
            store(segment_.num_pairs + 8 * half, _mm256_madd_epi16(num_pairs_[half], ones));
        }
    }

private:
    static __m256i part_of(__m256i codes, int part) {
        if (kParts == 1) return codes;
        return _mm256_and_si256(part == 0 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
    }
    KeptSegment<kParts>& segment_;
    const __m256i stride_;
    __m256i whole_zero_points_[kHalves], zero_points_[kParts][kHalves], sums_[kParts][kHalves], sizes_[kParts][kHalves],
        num_pairs_[kHalves];
    int count_ = 0;
};

// Sums of one output for kVectors times 32 rows, in 16 bits, two vectors for each part.
template <int kParts, int kVectors>
struct LaneSums {
    __m256i sums[kParts][kVectors][2];
    void start(const KeptSegment<kParts>& kept, int output) {
        UNROLL for (int part = 0; part < kParts; ++part) {
            const __m256i from = broadcast_u32(&kept.short_starts[part][output]);
            UNROLL for (int v = 0; v < kVectors; ++v) { sums[part][v][0] = sums[part][v][1] = from; }
        }
    }
    void start() {
        UNROLL for (int part = 0; part < kParts; ++part) {
            UNROLL for (int v = 0; v < kVectors; ++v) { sums[part][v][0] = sums[part][v][1] = _mm256_setzero_si256(); }
        }
    }
    void add(const KeptPair<kParts>& pair, int output, const uint8_t* lanes) {
        const uint8_t* const first = lanes + pair.places[output][0];
        const uint8_t* const second = lanes + pair.places[output][1];
        __m256i entries[kParts];
        UNROLL for (int part = 0; part < kParts; ++part) { entries[part] = broadcast_u32(&pair.entries[part][output]); }
        UNROLL for (int v = 0; v < kVectors; ++v) {
            const __m256i a = load(first + 32 * v);
            __m256i b = load(second + 32 * v);
            __asm__("" : "+x"(b));  // both vpunpck would load it
            const __m256i both[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
            UNROLL for (int part = 0; part < kParts; ++part) {
                UNROLL for (int i = 0; i < 2; ++i) {
                    sums[part][v][i] = _mm256_add_epi16(sums[part][v][i], _mm256_maddubs_epi16(both[i], entries[part]));
                }
            }
        }
    }
    // Rows 8 * i to 8 * i + 7 of vector v.
    __m256i dots(int v, int i) const {
        const __m256i low = sums[0][v][i / 2], high = sums[kParts - 1][v][i / 2];
        const __m256i pairs = i % 2 == 0 ? _mm256_unpacklo_epi16(low, high) : _mm256_unpackhi_epi16(low, high);
        if (kParts == 1) return _mm256_srai_epi32(pairs, 16);
        return _mm256_madd_epi16(pairs, _mm256_set1_epi32(16 << 16 | 1));
    }
};

// Where the true sums need more than 16 bits: four pairs at a time, without what they begin with.
template <int kParts, int kVectors>
__attribute__((noinline)) void long_dots(const KeptSegment<kParts>& kept, int output, const uint8_t* lanes,
                                         __m256i (&dots)[kVectors][4]) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
        UNROLL for (int i = 0; i < 4; ++i) { dots[v][i] = _mm256_set1_epi32(kept.starts[output]); }
    }
    for (int pair = 0; pair < kept.num_pairs[output];) {
        LaneSums<kParts, kVectors> sums;
        sums.start();
        const int end = pair + 4 < kept.num_pairs[output] ? pair + 4 : kept.num_pairs[output];
        ONE_BY_ONE for (; pair < end; ++pair) sums.add(kept.pairs[pair], output, lanes);
        UNROLL for (int v = 0; v < kVectors; ++v) {
            UNROLL for (int i = 0; i < 4; ++i) { dots[v][i] = _mm256_add_epi32(dots[v][i], sums.dots(v, i)); }
        }
    }
}

template <int kCount>
struct Count {
    static constexpr int value = kCount;
};

inline bool reads_lanes(const PanelWeights& w, const Rows& rows) {
    return rows.lanes != nullptr && w.lane_rows > 0 && rows.num_rows >= w.lane_rows;
}

struct LaneTotals {
    alignas(32) float sums[kPanelOutputs][kTaskRows];
    void clear(int64_t num_rows) {
        for (auto& output : sums) __builtin_memset(output, 0, static_cast<unsigned long>(num_rows) * 4);
    }
};

// A segment of a panel by kVectors times 32 rows.
template <int kParts, int kVectors>
void lanes_by_segment(const KeptSegment<kParts>& kept, const float (&scales)[kPanelOutputs], const uint8_t* lanes,
                      const float* row_scales, LaneTotals& totals, int64_t row) {
    for (int output = 0; output < kPanelOutputs; ++output) {
        const __m256 scale = _mm256_broadcast_ss(scales + output);
        float* const sums = totals.sums[output] + row;
        const auto add = [&](int v, int i, __m256i dots) {
            const int at = kLaneRows * v + 8 * i;
            _mm256_store_ps(sums + at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots),
                                                       _mm256_mul_ps(_mm256_loadu_ps(row_scales + at), scale),
                                                       _mm256_load_ps(sums + at)));
        };
        if (kept.fits[output] != 0) {
            LaneSums<kParts, kVectors> some;
            some.start(kept, output);
            ONE_BY_ONE for (int pair = 0; pair < kept.num_pairs[output]; ++pair) {
                some.add(kept.pairs[pair], output, lanes);
            }
            UNROLL for (int v = 0; v < kVectors; ++v) {
                UNROLL for (int i = 0; i < 4; ++i) { add(v, i, some.dots(v, i)); }
            }
        } else {
            __m256i dots[kVectors][4];
            long_dots<kParts, kVectors>(kept, output, lanes, dots);
            UNROLL for (int v = 0; v < kVectors; ++v) {
                UNROLL for (int i = 0; i < 4; ++i) { add(v, i, dots[v][i]); }
            }
        }
    }
}

inline void write_lanes(const PanelWeights& w, const Part& part, int64_t panel, const LaneTotals& totals) {
    const int64_t num_rows = part.row_end - part.row_begin;
    for (int64_t row = 0; row < num_rows; row += 8) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const int64_t output = panel * kPanelOutputs + 8 * half;
            const __m256i lanes = output_lanes(w, output);
            const __m256 factor = output_factor(w, panel, half, true);
            __m256 sums[8];
            UNROLL for (int i = 0; i < 8; ++i) { sums[i] = _mm256_load_ps(totals.sums[8 * half + i] + row); }
            transpose_floats(sums);
            float* y = part.y + (part.row_begin + row) * part.y_stride + output;
            for (int i = 0; i < 8 && row + i < num_rows; ++i, y += part.y_stride)
                _mm256_maskstore_ps(y, lanes, _mm256_mul_ps(sums[i], factor));
        }
    }
}

// `Source` is started with a panel and fills one segment of kColumns after the other: start(w, panel, segments of a
// panel) and next(KeptFiller<kParts>&).
template <int kParts, int kColumns, class Source>
void multiply_lanes(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int kSegments = kBlockInputs / kColumns;
    constexpr int kMostVectors = 4 / kParts;
    const int64_t stride = lane_stride(rows.num_rows);
    const int64_t block_bytes = code_lanes_bytes(stride);
    const int64_t num_vectors = (part.row_end - part.row_begin + kLaneRows - 1) / kLaneRows;
    const uint8_t* const first = rows.lanes + part.row_begin;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        LaneTotals totals;
        totals.clear(num_vectors * kLaneRows);
        Source source;
        source.start(w, panel, w.num_blocks * kSegments);
        KeptSegment<kParts> kept;
        Groups groups(w, 0);
        for (int64_t segment = 0; segment < w.num_blocks * kSegments; ++segment) {
            const __m256i bytes = _mm256_set1_epi32(0x01010101);
            const __m256i zero_points[kHalves] = {_mm256_mullo_epi32(groups.zero_points(panel, 0), bytes),
                                                  _mm256_mullo_epi32(groups.zero_points(panel, 1), bytes)};
            KeptFiller<kParts> filler(kept, stride, zero_points);
            source.next(filler);
            filler.finish();
            alignas(32) float scales[kPanelOutputs];
            UNROLL for (int half = 0; half < kHalves; ++half) {
                _mm256_store_ps(scales + 8 * half, groups.scales(panel, half));
            }
            const uint8_t* const block = first + segment / kSegments * block_bytes;
            const uint8_t* const lanes = block + segment % kSegments * kColumns * stride;
            const auto* row_scales =
                reinterpret_cast<const float*>(block - part.row_begin + kBlockInputs * stride) + part.row_begin;
            int64_t v = 0;
            const auto walk = [&](auto count) {
                constexpr int kVectors = decltype(count)::value;
                for (; v + kVectors <= num_vectors; v += kVectors)
                    lanes_by_segment<kParts, kVectors>(kept, scales, lanes + v * kLaneRows, row_scales + v * kLaneRows,
                                                       totals, v * kLaneRows);
            };
            walk(Count<kMostVectors>{});
            if constexpr (kMostVectors > 2) walk(Count<2>{});
            walk(Count<1>{});
            groups.advance();
        }
        write_lanes(w, part, panel, totals);
    }
}

}  // namespace rarefy::matmul::avx2
