// Products of bfloat16 with vdpbf16ps: what the AVX-512 kernels of these encodings are where the CPU has it. They are
// compiled a second time for it, as the namespace avx512_bf16, and again with AMX (CMakeLists.txt).
//
// Zeros of a mask cost as much as other weights, and many rows expand them once.
#pragma once

#include "matmul/rows_avx512.h"

namespace rarefy::matmul::avx512 {

// One row of activations by kPanels panels, `distance` apart, straight from the packed bytes.
template <class Stream, int kPanels>
void walk_bf16(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const uint16_t* x = rows.bf16_x + part.row_begin * rows.stride;
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
        for (int eighth = 0; eighth < 4; ++eighth) {
            if (fetches<1>()) {
                UNROLL for (int p = 0; p < kPanels; ++p) { streams[p].fetch(16); }
            }
            UNROLL for (int step = 0; step < 8; ++step, x += 2) {
                const __m512i pair = broadcast_pair(x);
                UNROLL for (int p = 0; p < kPanels; ++p) { sums[p] = add_pairs(sums[p], streams[p].pairs(), pair); }
            }
        }
        UNROLL for (int p = 0; p < kPanels; ++p) { totals[p] = _mm512_add_ps(totals[p], sums[p]); }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t output = (panel + p * distance) * kPanelOutputs;
        Lanes(w, panel + p * distance, part.y + part.row_begin * part.y_stride + output).store(totals[p]);
    }
}

// What `expand_pairs` wrote.
struct ExpandedPairs {
    const uint8_t* values;
    void fetch(int) const {}
    __m512i pairs() {
        const __m512i next = load(values);
        values += 64;
        return next;
    }
};

template <class Stream>
void expand_pairs(Stream& stream, int64_t num_blocks, uint8_t* out) {
    for (int64_t step = 0; step < num_blocks * kBlockInputs / 2; ++step, out += 64) {
        if (step % (kBlockInputs / 2) == 0) begin_segment(stream, kBlockInputs);
        if (step % 8 == 0) stream.fetch(16);
        _mm512_store_si512(out, stream.pairs());
    }
}

// kRows rows from `row` on by a stretch, whose weights come from the streams; the sums start at 0 with block 0, else at
// y.
template <int kRows, class Stream>
inline void add_stretch(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, const Stretch& stretch,
                        const Stream (&starts)[kPair], Ahead& ahead) {
    Stream streams[kPair] = {starts[0], starts[1]};
    const uint16_t* x = rows.bf16_x + row * rows.stride + stretch.block_begin * kBlockInputs;
    alignas(64) float totals[kRows][kPair][kPanelOutputs] = {};
    Lanes outputs[kPair] = {output_row(w, part, row, stretch.panel),
                            output_row(w, part, row, stretch.panel + stretch.distance)};
    if (stretch.block_begin != 0) {
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPair; ++p) {
                _mm512_store_ps(totals[r][p], outputs[p].load(r * part.y_stride));
            }
        }
    } else if (part.row_end - part.row_begin > kMaxRows) {  // a few rows wait for their weights
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPair; ++p) { fetch_output(outputs[p].y + r * part.y_stride); }
        }
    }
    for (int64_t block = stretch.block_begin; block < stretch.block_end; ++block) {
        __m512 sums[kRows][kPair];
        ahead.fetch();
        UNROLL for (int p = 0; p < kPair; ++p) { begin_segment(streams[p], kBlockInputs); }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPair; ++p) { sums[r][p] = _mm512_setzero_ps(); }
        }
        for (int step = 0; step < kBlockInputs / 2; ++step, x += 2) {
            __m512i weights[kPair];
            UNROLL for (int p = 0; p < kPair; ++p) { weights[p] = streams[p].pairs(); }
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m512i pair = broadcast_pair(x + r * rows.stride);
                UNROLL for (int p = 0; p < kPair; ++p) { sums[r][p] = add_pairs(sums[r][p], weights[p], pair); }
            }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int p = 0; p < kPair; ++p) {
                _mm512_store_ps(totals[r][p], _mm512_add_ps(_mm512_load_ps(totals[r][p]), sums[r][p]));
            }
        }
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int p = 0; p < kPair; ++p) { outputs[p].store(_mm512_load_ps(totals[r][p]), r * part.y_stride); }
    }
}

// Whole panels, decoded for these rows alone.
template <class Stream, int kRows>
void rows_bf16(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel, int64_t distance,
               Ahead ahead) {
    Stream streams[kPair];
    UNROLL for (int p = 0; p < kPair; ++p) { streams[p].start(w, panel + p * distance); }
    add_stretch<kRows>(w, rows, part, row, {panel, distance, 0, w.num_blocks}, streams, ahead);
}

template <class Stream>
constexpr RowsFunction kRowsBf16[kMaxRows] = {rows_bf16<Stream, 1>, rows_bf16<Stream, 2>, rows_bf16<Stream, 3>,
                                              rows_bf16<Stream, 4>, rows_bf16<Stream, 5>, rows_bf16<Stream, 6>,
                                              rows_bf16<Stream, 7>, rows_bf16<Stream, 8>};

using StretchFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, const Stretch& stretch,
                                 const uint8_t* const (&expanded)[kPair], Ahead ahead);

template <int kRows>
void expanded_rows(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, const Stretch& stretch,
                   const uint8_t* const (&expanded)[kPair], Ahead ahead) {
    ExpandedPairs streams[kPair] = {{expanded[0]}, {expanded[1]}};
    add_stretch<kRows>(w, rows, part, row, stretch, streams, ahead);
}

inline constexpr StretchFunction kExpandedRows[kMaxRows] = {expanded_rows<1>, expanded_rows<2>, expanded_rows<3>,
                                                            expanded_rows<4>, expanded_rows<5>, expanded_rows<6>,
                                                            expanded_rows<7>, expanded_rows<8>};

template <class Stream>
void expand_for_rows(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int kStretchBlocks = 8;  // 32 KiB of a pair of panels
    alignas(64) uint8_t memory[kPair][kStretchBlocks * kBlockInputs * kPanelOutputs * 2];
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kMaxRows - 1) / kMaxRows;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += kPair) {
        // The last of an odd number of panels is computed beside itself.
        const int distance = panel + 1 < part.panel_end ? 1 : 0;
        const uint8_t* const expanded[kPair] = {memory[0], memory[distance]};
        Stream streams[kPair];
        for (int p = 0; p <= distance; ++p) streams[p].start(w, panel + p);
        for (int64_t begin = 0; begin < w.num_blocks; begin += kStretchBlocks) {
            const int64_t end = begin + kStretchBlocks < w.num_blocks ? begin + kStretchBlocks : w.num_blocks;
            for (int p = 0; p <= distance; ++p) expand_pairs(streams[p], end - begin, memory[p]);
            int64_t row = part.row_begin;
            for (int64_t group = 0; group < num_groups; ++group) {
                const int64_t count = (num_rows + group) / num_groups;
                const Ahead nothing(w, panel, distance, 1, w.num_blocks, false);
                kExpandedRows[count - 1](w, rows, part, row, {panel, distance, begin, end}, expanded, nothing);
                row += count;
            }
        }
    }
}

}  // namespace rarefy::matmul::avx512
