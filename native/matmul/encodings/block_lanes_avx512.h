// Sixteen rows or more by the cells of block sparse weights (block.h). A vector holds 16 rows (row_panels.h) of one
// output, and the weights are broadcast: 10 loads for 16 products, whatever cells the neighbouring panels have.
#pragma once

#include "matmul/encodings/block_tiles_avx512.h"
#include "matmul/row_panels.h"
#include "matmul/transpose_avx512.h"

namespace rarefy::matmul::avx512 {

constexpr int kPassRows = 128;
constexpr int64_t kPassBytes = int64_t{640}
                               << 10;  // of activations, beside which an L2 cache has room for some weights

// The sums of one panel of outputs for the rows of a pass.
struct LaneTotals {
    alignas(64) float sums[kPanelOutputs][kPassRows];
};

// The finished sums of the panel before, on their way to y. Rows of y lie so far apart that storing to all of them at
// once waits for each; a few between two tiles, fetched some tiles before, wait for none.
class Leaving {
public:
    // Takes 16 rows or more from `row` on; what it had before has left.
    void take(const PanelWeights& w, const Part& part, int64_t panel, int64_t row, int num_rows,
              const LaneTotals& totals) {
        y_ = part.y + row * part.y_stride + panel * kPanelOutputs;
        stride_ = part.y_stride;
        lanes_ = output_lanes(w, panel);
        next_ = 0;
        end_ = num_rows;
        const __m512 factor = output_factor(w, panel, true);
        for (int first = 0; first < num_rows; first += kPanelRows) {
            __m512i square[kPanelOutputs];
            UNROLL for (int i = 0; i < kPanelOutputs; ++i) { square[i] = load(totals.sums[i] + first); }
            transpose(square);
            UNROLL for (int i = 0; i < kPanelRows; ++i) {
                _mm512_store_ps(rows_[first + i], _mm512_mul_ps(_mm512_castsi512_ps(square[i]), factor));
            }
        }
    }
    void store(int64_t count) {
        constexpr int64_t kAhead = 4;  // rows
        for (const int64_t end = next_ + count < end_ ? next_ + count : end_; next_ < end; ++next_) {
            const float* ahead = y_ + (next_ + kAhead) * stride_;
            fetch_output(ahead);  // y need not lie at a multiple of a line
            fetch_output(ahead + kPanelOutputs - 1);
            _mm512_mask_storeu_ps(y_ + next_ * stride_, lanes_, _mm512_load_ps(rows_[next_]));
        }
    }
    void finish() { store(end_ - next_); }

private:
    alignas(64) float rows_[kPassRows][kPanelOutputs];
    float* y_ = nullptr;
    int64_t stride_ = 0, next_ = 0, end_ = 0;
    __mmask16 lanes_ = 0;
};

// A segment of a cell of codes: columns of one block and one group of the weight.
template <bool kSymmetric>
struct CodeSegment {
    using Block = CodeBlock;
    static constexpr int kColumnBytes = kPanelOutputs;

    const CodeBlock* blocks;  // of the row panels
    int first, num_steps;
    const PanelWeights& weights;
    alignas(64) int32_t starts[kPassRows];  // -sum q; kSymmetric: times the zero point
    alignas(64) float scales[kPanelOutputs];
    alignas(64) int32_t zero_points[kPanelOutputs];

    // The stored `halves` of a block.
    CodeSegment(const PanelWeights& w, int64_t panel, int64_t block, int halves, const CodeBlock* row_blocks,
                int num_row_panels)
        : blocks(row_blocks), first(halves == 2 ? 8 : 0), num_steps(halves == 3 ? 16 : 8), weights(w) {
        const SegmentGroup group(w, panel, w.steps_per_segment == 16 ? block : 2 * block + first / 8);
        _mm512_store_ps(scales, group.scales());
        if (!kSymmetric) _mm512_store_si512(zero_points, group.zero_points());
        const __m512i factor = _mm512_set1_epi32(kSymmetric ? -w.zero_point : -1);
        for (int i = 0; i < num_row_panels; ++i) {
            const __m512i sum = _mm512_add_epi32(_mm512_maskz_loadu_epi32(halves & 1 ? 0xffff : 0, blocks[i].sums[0]),
                                                 _mm512_maskz_loadu_epi32(halves & 2 ? 0xffff : 0, blocks[i].sums[1]));
            _mm512_store_si512(starts + i * kPanelRows, _mm512_mullo_epi32(sum, factor));
        }
    }

    // What the segments of a cell read besides their values.
    static void fetch(const PanelWeights& w, int64_t panel, int32_t cell) {
        const SegmentGroup group(w, panel, cell_block(cell) * (16 / w.steps_per_segment));
        prefetch<0>(w.scales_at(group.place), 64);
    }

    // kPanels row panels by kOutputs outputs. Sums and zero points have fewer than 16 bits, which one instruction
    // multiplies.
    template <int kPanels, int kOutputs>
    void multiply(const uint8_t* values, int row_panel, int output, LaneTotals& totals) const {
        const CodeBlock* from = blocks + row_panel;
        Sums dots[kOutputs][kPanels];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            const __m512i start = load(starts + (row_panel + p) * kPanelRows);
            UNROLL for (int o = 0; o < kOutputs; ++o) {
                dots[o][p] = reinterpret_cast<Sums>(
                    kSymmetric ? start : _mm512_madd_epi16(start, _mm512_set1_epi32(zero_points[output + o])));
            }
        }
        values += output * 4;
        for (int step = first; step < first + num_steps; step += 4, values += 256) {
            UNROLL for (int s = 0; s < 4; ++s) {
                __m512i q[kPanels];
                UNROLL for (int p = 0; p < kPanels; ++p) { q[p] = load(from[p].q[step + s]); }
                UNROLL for (int o = 0; o < kOutputs; ++o) {
                    const __m512i codes = broadcast_4(reinterpret_cast<const int8_t*>(values) + 64 * s + 4 * o);
                    UNROLL for (int p = 0; p < kPanels; ++p) { dots[o][p] = dot_4(dots[o][p], codes, q[p]); }
                }
            }
        }
        add_scaled(weights, [&](auto scaling) {
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const __m512 row_scales = _mm512_load_ps(from[p].scales);
                UNROLL for (int o = 0; o < kOutputs; ++o) {
                    float* sums = totals.sums[output + o] + (row_panel + p) * kPanelRows;
                    const __m512 factor = scaling.factor(row_scales, _mm512_set1_ps(scales[output + o]));
                    _mm512_store_ps(sums, _mm512_fmadd_ps(to_floats(dots[o][p]), factor, _mm512_load_ps(sums)));
                }
            }
        });
    }
};

// A cell of bfloat16.
struct PairSegment {
    using Block = PairBlock;
    static constexpr int kColumnBytes = 2 * kPanelOutputs;

    const PairBlock* blocks;  // of the row panels
    int first, num_steps;

    // The stored `halves` of a block.
    PairSegment(const PanelWeights&, int64_t, int64_t, int halves, const PairBlock* row_blocks, int)
        : blocks(row_blocks), first(halves == 2 ? 16 : 0), num_steps(halves == 3 ? 32 : 16) {}

    static void fetch(const PanelWeights&, int64_t, int32_t) {}

    // kPanels row panels by kOutputs outputs.
    template <int kPanels, int kOutputs>
    void multiply(const uint8_t* values, int row_panel, int output, LaneTotals& totals) const {
        const PairBlock* from = blocks + row_panel;
        __m512 sums[kOutputs][kPanels];
        UNROLL for (int o = 0; o < kOutputs; ++o) {
            UNROLL for (int p = 0; p < kPanels; ++p) { sums[o][p] = _mm512_setzero_ps(); }
        }
        values += output * 4;
        for (int step = first; step < first + num_steps; step += 4, values += 256) {
            UNROLL for (int s = 0; s < 4; ++s) {
                __m512i x[kPanels];
                UNROLL for (int p = 0; p < kPanels; ++p) { x[p] = load(from[p].x[step + s]); }
                UNROLL for (int o = 0; o < kOutputs; ++o) {
                    const __m512i weights = broadcast_pair(reinterpret_cast<const uint16_t*>(values + 64 * s + 4 * o));
                    UNROLL for (int p = 0; p < kPanels; ++p) { sums[o][p] = add_pairs(sums[o][p], weights, x[p]); }
                }
            }
        }
        UNROLL for (int p = 0; p < kPanels; ++p) {
            UNROLL for (int o = 0; o < kOutputs; ++o) {
                float* total = totals.sums[output + o] + (row_panel + p) * kPanelRows;
                _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), sums[o][p]));
            }
        }
    }
};

// Row panels by the columns of one segment, in tiles of 16 sums; with each tile `num_stores` rows of the panel before
// leave, and its share of what a later segment reads is fetched.
template <class Segment>
struct SegmentTiles {
    const Segment& segment;
    const uint8_t *values, *ahead;
    int num_bytes;  // of the share of a row panel
    int64_t num_stores;
    Leaving& leaving;
    LaneTotals& totals;

    // As many row panels from `row_panel` on as make whole tiles of kPanels.
    template <int kPanels>
    void multiply(int& row_panel, int num_row_panels) {
        for (; row_panel + kPanels <= num_row_panels; row_panel += kPanels) {
            for (int output = 0; output < kPanelOutputs; output += kPanelOutputs / kPanels) {
                leaving.store(num_stores);
                prefetch<2048>(ahead, num_bytes);
                ahead += num_bytes;
                segment.template multiply<kPanels, kPanelOutputs / kPanels>(values, row_panel, output, totals);
            }
        }
    }
};

// `num_row_panels` of at most kPassRows rows by one panel of outputs.
template <class Segment>
void lanes_panel(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t row,
                 int num_row_panels, Leaving& leaving) {
    LaneTotals totals;
    for (int first = 0; first < num_row_panels * kPanelRows; first += kPanelRows) {
        const __m512 starts = _mm512_loadu_ps(rows.starts + row + first);
        UNROLL for (int i = 0; i < kPanelOutputs; ++i) { _mm512_store_ps(totals.sums[i] + first, starts); }
    }
    const auto* blocks = static_cast<const typename Segment::Block*>(rows.row_panels) + row / kPanelRows;
    const uint8_t* values = w.values + w.value_offsets[panel];
    int64_t count;
    const int32_t* cells = panel_cells(w, panel, count);
    const int64_t num_stores = count == 0 ? 0 : (kPanelRows + count - 1) / count;
    const auto take = [&](int64_t block, int halves) {
        const Segment segment(w, panel, block, halves, blocks + block * (rows.num_rows / kPanelRows), num_row_panels);
        const int share = (segment.num_steps * 64 / num_row_panels + 63) / 64 * 64;
        SegmentTiles<Segment> tiles{segment, values, values, share, num_stores, leaving, totals};
        int row_panel = 0;
        tiles.template multiply<4>(row_panel, num_row_panels);
        tiles.template multiply<2>(row_panel, num_row_panels);
        tiles.template multiply<1>(row_panel, num_row_panels);
        values += (halves == 3 ? kBlockInputs : kBlockInputs / 2) * Segment::kColumnBytes;
    };
    prefetch<0>(w.extra + w.extra_offsets[panel + 1], 256);  // what no stream leads to
    for (int64_t k = 0; k < count; ++k) {
        const int halves = cells[k] & 3;
        Segment::fetch(w, panel, cells[k + 2 < count ? k + 2 : 0]);
        if (w.steps_per_segment == 8 && halves == 3) {
            take(cell_block(cells[k]), 1);
            take(cell_block(cells[k]), 2);
        } else {
            take(cell_block(cells[k]), halves);
        }
    }
    leaving.finish();
    leaving.take(w, part, panel, row, num_row_panels * kPanelRows, totals);
}

// The whole row panels of a part, in passes whose activations the cache holds, and `rest` by the rows that are left.
// Some panels of outputs at a time, whose weights stay in the cache meanwhile.
template <class Segment, class Rest>
void lanes_by_cells(const PanelWeights& w, const Rows& rows, const Part& part, const Rest& rest) {
    constexpr int64_t kPanelsAtOnce = 8;
    const int64_t num_rows = (part.row_end - part.row_begin) / kPanelRows * kPanelRows, end = part.row_begin + num_rows;
    const auto row_bytes = static_cast<int64_t>(sizeof(typename Segment::Block)) / kPanelRows * rows.num_blocks;
    const int64_t fitting = kPassBytes / row_bytes / (2 * kPanelRows) * (2 * kPanelRows);
    const int64_t pass_rows = fitting < 2 * kPanelRows ? 2 * kPanelRows : fitting < kPassRows ? fitting : kPassRows;
    Leaving leaving;
    for (int64_t begin = part.panel_begin; begin < part.panel_end; begin += kPanelsAtOnce) {
        const int64_t last = begin + kPanelsAtOnce < part.panel_end ? begin + kPanelsAtOnce : part.panel_end;
        for (int64_t row = part.row_begin; row < end; row += pass_rows) {
            const int64_t count = end - row < pass_rows ? end - row : pass_rows;
            for (int64_t panel = begin; panel < last; ++panel)
                lanes_panel<Segment>(w, rows, part, panel, row, static_cast<int>(count / kPanelRows), leaving);
        }
        if (end < part.row_end) rest(Part{begin, last, end, part.row_end, part.y, part.y_stride, 0});
    }
    leaving.finish();
}

}  // namespace rarefy::matmul::avx512
