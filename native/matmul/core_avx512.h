// What the AVX-512 kernels (VNNI, VBMI2) of all encodings share. One vector is one step of a panel: 16 outputs by 4
// codes, or by 1 float.
//
// An encoding gives a `Stream` that reads a panel from its start, two steps at a time:
//   void start(w, panel)
//   void begin_segment(int num_columns)  if there is one: before the first step of a segment, or of a block of floats
//   void fetch(int num_steps)            prefetches for later; floats: num_columns
//   codes:  static constexpr int kOddShift    codes of odd steps come shifted left by so many bits, 0 or 4
//           static constexpr bool kExpandsOnce    for many rows: decoding again for every 8 of them takes longer
//           static constexpr bool kFetchesNear    if there is one: two steps take so long that one row gains by asking
//                                                 for `values` a little ahead too (kNear)
//           static constexpr int kFetchSteps  if there is one: how many steps to fetch at once
//           void next(__m512i pruned, __m512i& even, __m512i& odd)    pruned: what a pruned code reads as
//   floats: void next(__m512& even, __m512& odd)
//   bfloat16, one step at a time:
//           static constexpr bool kIsPlain    nothing needs to be decoded
//           __m512i pairs()
// and its kernel is multiply_int<Stream>, multiply_float<Stream> or multiply_bf16<Stream>, or a function of its own
// that may call their two halves, one_row_* and many_rows_*.
#pragma once

#include "matmul/rows_avx512.h"
#if RAREFY_PASS_AVX512_BF16
#include "matmul/bf16_avx512.h"
#endif
#if RAREFY_PASS_AMX
#include "matmul/core_amx.h"
#endif

namespace rarefy::matmul::avx512 {

// Fetches for streams that say so what they read soon, on processors that fetch best alone.
template <class Stream>
__attribute__((always_inline)) inline auto fetch_near(const Stream& stream) -> decltype(Stream::kFetchesNear, void()) {
    prefetch_in_order(stream.values + kNear);
}
template <class... Others>
inline void fetch_near(const Others&...) {}

// One row of activations by kPanels panels, `distance` apart, straight from the packed bytes. kSymmetric: all zero
// points are the same.
template <class Stream, int kPanels, int kSteps, bool kSymmetric>
void walk_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
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
    constexpr int kFetchSteps = fetch_steps<Stream, kSteps>(nullptr);
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
            begin_segment(streams[p], 4 * kSteps);
            odds[p] = Sums{};
            if (fetches<1>()) groups.fetch(panel + p * distance);
        }
        UNROLL for (int pair = 0; pair < kSteps / 2; ++pair, q += 8) {
            if (2 * pair % kFetchSteps == 0 && fetches<1>()) {
                UNROLL for (int p = 0; p < kPanels; ++p) { streams[p].fetch(kFetchSteps); }
            }
            const __m512i even_q = broadcast_4(q), odd_q = broadcast_4(q + 4);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m512i even, odd;
                if (!fetches<1>()) fetch_near(streams[p]);
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
        const __m512 factor = output_factor(w, panel + p * distance, true);
        Lanes(w, panel + p * distance, part.y + row * part.y_stride + output).store(_mm512_mul_ps(totals[p], factor));
    }
}

template <class Stream, int kPanels>
void walk_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const float* x = rows.x + part.row_begin * rows.stride;
    Stream streams[kPanels];
    __m512 totals[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        streams[p].start(w, panel + p * distance);
        totals[p] = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m512 sums[kPanels];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            begin_segment(streams[p], kBlockInputs);
            sums[p] = _mm512_setzero_ps();
        }
        for (int pair = 0; pair < kBlockInputs / 2; ++pair, x += 2) {
            if (pair % 8 == 0 && fetches<1>()) {
                UNROLL for (int p = 0; p < kPanels; ++p) { streams[p].fetch(16); }
            }
            const __m512 even_x = _mm512_set1_ps(x[0]), odd_x = _mm512_set1_ps(x[1]);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m512 even, odd;
                streams[p].next(even, odd);
                sums[p] = _mm512_fmadd_ps(odd_x, odd, sums[p]);
                sums[p] = _mm512_fmadd_ps(even_x, even, sums[p]);
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
inline void walk_panels(const PanelWeights& w, const Rows& rows, const Part& part, OneRowFunction two,
                        OneRowFunction one) {
    constexpr int64_t kShortest = 32 << 10;
    int64_t panel = part.panel_begin;
    if (part.distance != 0) {
        for (; panel < part.panel_end; ++panel) two(w, rows, part, panel, part.distance);
        return;
    }
    const int64_t distance = (part.panel_end - panel) / 2;
    if (w.value_offsets[panel + distance] - w.value_offsets[panel] >= kShortest) {
        for (; panel < part.panel_begin + distance; ++panel) two(w, rows, part, panel, distance);
        panel += distance;
    }
    for (; panel < part.panel_end; ++panel) one(w, rows, part, panel, 0);
}

template <class Stream, int kSteps>
void one_row_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.zero_points == nullptr)
        walk_panels(w, rows, part, walk_int<Stream, 2, kSteps, true>, walk_int<Stream, 1, kSteps, true>);
    else
        walk_panels(w, rows, part, walk_int<Stream, 2, kSteps, false>, walk_int<Stream, 1, kSteps, false>);
}

template <class Stream, int kSteps, bool kSymmetric>
void many_rows_int_as(const PanelWeights& w, const Rows& rows, const Part& part) {
    if constexpr (Stream::kExpandsOnce) {
        if (part.row_end - part.row_begin >= kFewestExpandedRows)
            return expand_codes_for_rows<Stream, kSteps, kSymmetric>(w, rows, part);
    }
    walk_rows(w, rows, part, kRowsInt<Stream, kSteps, kSymmetric>);
}

template <class Stream>
void many_rows_int(const PanelWeights& w, const Rows& rows, const Part& part) {
#if RAREFY_PASS_AMX
    if (part.row_end - part.row_begin >= kAmxRows) return tiles_int<Stream>(w, rows, part);
#endif
    if (w.steps_per_segment == 8)
        many_rows_int_as<Stream, 8, false>(w, rows, part);
    else if (w.zero_points == nullptr)
        many_rows_int_as<Stream, 16, true>(w, rows, part);
    else
        many_rows_int_as<Stream, 16, false>(w, rows, part);
}

// Many rows may want another stream than one does.
template <class Stream, class ManyRowsStream = Stream>
void multiply_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin > 1)
        many_rows_int<ManyRowsStream>(w, rows, part);
    else if (w.steps_per_segment == 16)
        one_row_int<Stream, 16>(w, rows, part);
    else
        one_row_int<Stream, 8>(w, rows, part);
}

template <class Stream>
void one_row_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    walk_panels(w, rows, part, walk_float<Stream, 2>, walk_float<Stream, 1>);
}

template <class Stream>
void many_rows_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    walk_rows(w, rows, part, kRowsFloat<Stream>);
}

template <class Stream>
void multiply_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin > 1)
        many_rows_float<Stream>(w, rows, part);
    else
        one_row_float<Stream>(w, rows, part);
}

// Without vdpbf16ps bfloat16 is widened, and meets rounded activations that are widened already.
template <class Stream>
struct Widened : Stream {
    void next(__m512& even, __m512& odd) { widen_pairs(this->pairs(), even, odd); }
};

template <class Stream>
void multiply_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
#if RAREFY_PASS_AVX512_BF16
    const int64_t num_rows = part.row_end - part.row_begin;
#if RAREFY_PASS_AMX
    if (num_rows >= kAmxRows) return tiles_bf16<Stream>(w, rows, part);
#endif
    if (num_rows == 1)
        walk_panels(w, rows, part, walk_bf16<Stream, 2>, walk_bf16<Stream, 1>);
    else if (Stream::kIsPlain || num_rows <= kMaxRows)
        walk_rows(w, rows, part, kRowsBf16<Stream>);
    else
        expand_for_rows<Stream>(w, rows, part);
#else
    multiply_float<Widened<Stream> >(w, rows, part);
#endif
}

}  // namespace rarefy::matmul::avx512
