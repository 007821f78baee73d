// Products with several rows of activations, by two panels at a time: what is decoded into registers is multiplied with
// up to 8 rows at once. That is cheap enough to decode again for the next 8: storing expanded panels and loading them
// was slower for every encoding and every number of rows.
#pragma once

#include "matmul/vectors_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kMaxRows = 8;  // by a pair of panels: 16 sums
constexpr int kPair = 2;     // panels

// The first rows that meet a pair of panels would wait for memory, and those after them read it from the L2 cache. So
// each call fetches its share of the next pair.
class Ahead {
public:
    // Share `index` of `count` of `panel` and `panel + distance`, the next pair; nothing unless there is `any`.
    Ahead(const PanelWeights& w, int64_t panel, int64_t distance, int64_t index, int64_t count, bool any) {
        for (int p = 0; p < kPair; ++p) {
            const int64_t* offsets = w.value_offsets + panel + p * distance;
            const int64_t share = any ? (offsets[1] - offsets[0] + count - 1) / count : 0;
            from_[p] = w.values + offsets[0] + index * share;
            end_[p] = from_[p] + share;
        }
        num_bytes_ = ((end_[0] - from_[0]) / w.num_blocks + 63) / 64 * 64;
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
    int64_t num_bytes_;
};

// kRows rows from `row` on by the panels `panel` and `panel + distance`. kSymmetric: all zero points are the same.
template <class Stream, int kRows, int kSteps, bool kSymmetric>
void rows_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel, int64_t distance,
              Ahead ahead) {
    const int8_t* q = rows.q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    // Outputs that are not in a cache when they are stored hold up the next rows, whose totals are stored behind them.
    UNROLL for (int p = 0; p < kPair; ++p) {
        const float* y = part.y + row * part.y_stride + (panel + p * distance) * kPanelOutputs;
        UNROLL for (int r = 0; r < kRows; ++r) {
            _mm_prefetch(reinterpret_cast<const char*>(y + r * part.y_stride), _MM_HINT_T0);
        }
    }
    alignas(64) float totals[kRows][kPair][kPanelOutputs] = {};
    Stream streams[kPair];
    UNROLL for (int p = 0; p < kPair; ++p) { streams[p].start(w, panel + p * distance); }
    constexpr int kSegments = 16 / kSteps;  // of a block
    constexpr int kPairs = kSteps / 2;
    const __m512i one_zero_point = _mm512_set1_epi32(w.zero_point);
    const __m512i one_pruned = pruned_codes<Stream>(one_zero_point);
    Groups groups(w, 0);
    for (int64_t segment = 0; segment < w.num_blocks * kSegments; ++segment) {
        Sums dots[kRows][kPair];
        __m512i pruned[kPair];
        UNROLL for (int p = 0; p < kPair; ++p) {
            const __m512i zero_points = kSymmetric ? one_zero_point : groups.zero_points(panel + p * distance);
            pruned[p] = kSymmetric ? one_pruned : pruned_codes<Stream>(zero_points);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const int32_t* sums = half_sums + r * rows.num_blocks * 2;
                const int32_t sum = segment_sum<kSteps>(sums, segment);
                if (kSymmetric)
                    dots[r][p] = reinterpret_cast<Sums>(_mm512_set1_epi32(-sum * w.zero_point));
                else
                    dots[r][p] = times(zero_points, -sum);
            }
            streams[p].fetch(2 * kPairs);
        }
        if (kSteps == 16 || segment % 2 == 0) ahead.fetch();
        for (int pair = 0; pair < kPairs; ++pair, q += 8) {
            __m512i even[kPair], odd[kPair];
            UNROLL for (int p = 0; p < kPair; ++p) {
                streams[p].next(pruned[p], even[p], odd[p]);
                if constexpr (Stream::kOddShift != 0) odd[p] = _mm512_srli_epi16(odd[p], Stream::kOddShift);
            }
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512i even_q = broadcast_4(q + r * rows.stride), odd_q = broadcast_4(q + r * rows.stride + 4);
                UNROLL for (int p = 0; p < kPair; ++p) { dots[r][p] = dot_4(dots[r][p], even[p], even_q); }
                UNROLL for (int p = 0; p < kPair; ++p) { dots[r][p] = dot_4(dots[r][p], odd[p], odd_q); }
            }
        }
        UNROLL for (int p = 0; p < kPair; ++p) {
            const __m512 scales = groups.scales(panel + p * distance);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
                const __m512 total = _mm512_load_ps(totals[r][p]);
                _mm512_store_ps(totals[r][p],
                                _mm512_fmadd_ps(to_floats(dots[r][p]), _mm512_mul_ps(row_scale, scales), total));
            }
        }
        groups.advance();
    }
    UNROLL for (int p = 0; p < kPair; ++p) {
        float* y = part.y + row * part.y_stride + (panel + p * distance) * kPanelOutputs;
        UNROLL for (int r = 0; r < kRows; ++r) {
            Lanes(w, panel + p * distance, y + r * part.y_stride).store(_mm512_load_ps(totals[r][p]));
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
            if (pair % 8 == 0) {
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

using RowsFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, int64_t panel,
                              int64_t distance, Ahead ahead);

template <class Stream, int kSteps, bool kSymmetric>
constexpr RowsFunction kRowsInt[kMaxRows] = {
    rows_int<Stream, 1, kSteps, kSymmetric>, rows_int<Stream, 2, kSteps, kSymmetric>,
    rows_int<Stream, 3, kSteps, kSymmetric>, rows_int<Stream, 4, kSteps, kSymmetric>,
    rows_int<Stream, 5, kSteps, kSymmetric>, rows_int<Stream, 6, kSteps, kSymmetric>,
    rows_int<Stream, 7, kSteps, kSymmetric>, rows_int<Stream, 8, kSteps, kSymmetric>};
template <class Stream>
constexpr RowsFunction kRowsFloat[kMaxRows] = {rows_float<Stream, 1>, rows_float<Stream, 2>, rows_float<Stream, 3>,
                                               rows_float<Stream, 4>, rows_float<Stream, 5>, rows_float<Stream, 6>,
                                               rows_float<Stream, 7>, rows_float<Stream, 8>};

// Splits the rows of a part evenly, and pairs its panels.
inline void walk_rows(const PanelWeights& w, const Rows& rows, const Part& part, const RowsFunction* functions) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kMaxRows - 1) / kMaxRows;
    const auto all_rows = [&](int64_t panel, int64_t distance, int64_t next) {
        int64_t row = part.row_begin;
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t count = (num_rows + group) / num_groups;
            const Ahead ahead(w, next, distance, group, num_groups, next != panel && num_groups > 1);
            functions[count - 1](w, rows, part, row, panel, distance, ahead);
            row += count;
        }
    };
    // Two stretches of panels, each a sequential read of memory; or neighbours, where fetching ahead in the first
    // stretch would only reach into the second.
    constexpr int64_t kShortest = 32 << 10;
    const int64_t half = (part.panel_end - part.panel_begin) / 2;
    const bool apart = w.value_offsets[part.panel_begin + half] - w.value_offsets[part.panel_begin] >= kShortest;
    const int64_t distance = apart ? half : 1, stride = apart ? 1 : kPair;
    for (int64_t i = 0; i < half; ++i) {
        const int64_t panel = part.panel_begin + i * stride;
        all_rows(panel, distance, i + 1 < half ? panel + stride : panel);
    }
    // The last of an odd number of panels is computed beside itself.
    if ((part.panel_end - part.panel_begin) % 2 != 0) all_rows(part.panel_end - 1, 0, part.panel_end - 1);
}

}  // namespace rarefy::matmul::avx512
