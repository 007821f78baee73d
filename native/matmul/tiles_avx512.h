// Tiles of up to 8 rows of activations by a pair of panels of integer codes, and what fetches the next pair meanwhile.
#pragma once

#include "matmul/vectors_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kMaxRows = 8;  // by a pair of panels: 16 sums
constexpr int kPair = 2;     // panels

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
    // The whole share.
    void fetch_share() const {
        UNROLL for (int p = 0; p < kPair; ++p) {
            for (const uint8_t* at = from_[p]; at < end_[p]; at += 64)
                _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
        }
    }
    // Or once for each block.
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
            begin_segment(streams[p], 4 * kSteps);
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

}  // namespace rarefy::matmul::avx512
