// What the lookup tables share. A weight is float32(entry * scale), or the entry where there are no scales, and meets
// float activations as other floats do. PanelWeights::table holds the entries; scales are null where there are none.
#pragma once

#include "matmul/encodings/dense.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

// Reads the scales, if there are any.
inline void pack_lut_scales(Packing& packing) {
    if (packing.integer("scaled", 0, 1) == 1) {
        packing.pack_scales(8);
        require(packing.view.zero_points == nullptr, "unexpected zero_points");
    } else {
        packing.view.steps_per_segment = 16;
        packing.view.segments_per_group = 1;
    }
}

// place(bytes of the block, column of it, output, code) for every entry of the matrix, read(row, column).
template <class Read, class Place>
void pack_lut_codes(Packing& packing, int64_t block_bytes, Read read, Place place) {
    const int64_t num_inputs = packing.view.num_inputs;
    const int64_t panel_bytes = packing.view.num_blocks * block_bytes;
    uint8_t* values = packing.place_values([&](int64_t) { return panel_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* block = values + panel * panel_bytes;
        for (int64_t begin = 0; begin < num_inputs; begin += kBlockInputs, block += block_bytes) {
            const int64_t left = num_inputs - begin;
            const int count = static_cast<int>(left < kBlockInputs ? left : kBlockInputs);
            for (int row = 0; row < num_rows; ++row)
                for (int column = 0; column < count; ++column)
                    place(block, column, row, read(first + row, begin + column));
        }
    });
}

namespace reference {

// Coder: `static int code(const uint8_t* block, int column, int output)` and kBlockBytes; entry: of the table.
template <class Coder>
struct LutStream : PanelStream {
    const PanelWeights& w;
    int64_t panel, segment = 0;
    LutStream(const PanelWeights& weights, int64_t which) : PanelStream(weights, which), w(weights), panel(which) {}
    void block(float* out) {
        for (int column = 0; column < kBlockInputs; ++column) {
            if (column > 0 && column % (w.steps_per_segment * 4) == 0) ++segment;
            for (int output = 0; output < kPanelOutputs; ++output) {
                const float entry = Coder::entry(w.table, Coder::code(values, column, output));
                const int64_t place = w.group_place(panel, segment / w.segments_per_group);
                const float scale = w.scales == nullptr ? 1.0f : widen(w.scales_at(place)[output]);
                out[column * kPanelOutputs + output] = entry * scale;
            }
        }
        ++segment;
        values += Coder::kBlockBytes;
    }
};

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {

// Expands half a block at a time. A Lookup has kHalfBytes and
//   static void expand(const uint8_t* table, const uint8_t* codes, float* out)    the entries of 32 columns
template <class Lookup>
struct LutStream : PanelStream {
    static constexpr int kFewRows = 4;
    const PanelWeights* w;
    int64_t panel, half_block;
    int column;
    __m256 scales[kHalves];
    alignas(32) float entries[32 * kPanelOutputs];
    void start(const PanelWeights& weights, int64_t which) {
        PanelStream::start(weights, which);
        w = &weights;
        panel = which;
        half_block = 0;
        column = 0;
    }
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        if (column == 0) advance();
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const float* from = entries + column * kPanelOutputs + 8 * half;
            even[half] = _mm256_mul_ps(_mm256_load_ps(from), scales[half]);
            odd[half] = _mm256_mul_ps(_mm256_load_ps(from + kPanelOutputs), scales[half]);
        }
        column = (column + 2) % 32;
    }
    void advance() {
        const Groups groups(*w, half_block++ * 8 / w->steps_per_segment);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            scales[half] = w->scales == nullptr ? _mm256_set1_ps(1.0f) : groups.scales(panel, half);
        }
        Lookup::expand(w->table, values, entries);
        values += Lookup::kHalfBytes;
    }
};

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {

// Panels that one row walks together, so that the chains of additions overlap.
constexpr int kLutPanels = 4;

// One row of activations by kPanels panels, `distance` apart. A Lookup holds the table:
//   static constexpr int kColumns, kBytes    columns that it reads at once, and their bytes
//   Codes read(const uint8_t* from)
//   __m512 column(const Codes&, int c)    the entries of one of these columns
template <class Lookup, int kPanels, bool kScaled>
void walk_lut(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const float* x = rows.x + part.row_begin * rows.stride;
    const Lookup lookup(w.table);
    const uint8_t* values[kPanels];
    __m512 totals[kPanels], scales[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        values[p] = w.values + w.value_offsets[panel + p * distance];
        totals[p] = _mm512_setzero_ps();
    }
    Groups groups(w, 0);
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m512 sums[kPanels];
        UNROLL for (int p = 0; p < kPanels; ++p) { sums[p] = _mm512_setzero_ps(); }
        for (int half = 0; half < 2; ++half) {
            UNROLL for (int p = 0; p < kPanels; ++p) {
                if (kScaled) scales[p] = groups.scales(panel + p * distance);
                prefetch<2048>(values[p], 32 / Lookup::kColumns * Lookup::kBytes);
            }
            if (half == 1 || w.steps_per_segment == 8) groups.advance();
            for (int i = 0; i < 32 / Lookup::kColumns; ++i, x += Lookup::kColumns) {
                typename Lookup::Codes codes[kPanels];
                UNROLL for (int p = 0; p < kPanels; ++p) {
                    codes[p] = lookup.read(values[p]);
                    values[p] += Lookup::kBytes;
                }
                UNROLL for (int at = 0; at < Lookup::kColumns; ++at) {
                    const int c = at ^ 1;  // the odd one of two comes first
                    const __m512 one_x = _mm512_set1_ps(x[c]);
                    UNROLL for (int p = 0; p < kPanels; ++p) {
                        const __m512 entries = lookup.column(codes[p], c);
                        const __m512 weights = kScaled ? _mm512_mul_ps(entries, scales[p]) : entries;
                        sums[p] = _mm512_fmadd_ps(one_x, weights, sums[p]);
                    }
                }
            }
        }
        UNROLL for (int p = 0; p < kPanels; ++p) { totals[p] = _mm512_add_ps(totals[p], sums[p]); }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t output = (panel + p * distance) * kPanelOutputs;
        Lanes(w, panel + p * distance, part.y + part.row_begin * part.y_stride + output).store(totals[p]);
    }
}

template <class Lookup, bool kScaled>
void one_row_lut(const PanelWeights& w, const Rows& rows, const Part& part) {
    const int64_t distance = (part.panel_end - part.panel_begin) / kLutPanels;
    int64_t panel = part.panel_begin;
    for (; panel < part.panel_begin + distance; ++panel)
        walk_lut<Lookup, kLutPanels, kScaled>(w, rows, part, panel, distance);
    for (panel += (kLutPanels - 1) * distance; panel < part.panel_end; ++panel)
        walk_lut<Lookup, 1, kScaled>(w, rows, part, panel, 0);
}

// For many rows.
template <class Lookup>
struct LutStream : PanelStream {
    const PanelWeights* w;
    int64_t panel, half_block;
    int column;
    alignas(64) float weights[32 * kPanelOutputs];
    void start(const PanelWeights& all, int64_t which) {
        PanelStream::start(all, which);
        w = &all;
        panel = which;
        half_block = 0;
        column = 0;
    }
    void fetch(int num_columns) const { prefetch<2048>(values, num_columns * Lookup::kBytes / Lookup::kColumns); }
    void next(__m512& even, __m512& odd) {
        if (column == 0) expand();
        even = _mm512_load_ps(weights + column * kPanelOutputs);
        odd = _mm512_load_ps(weights + (column + 1) * kPanelOutputs);
        column = (column + 2) % 32;
    }
    void expand() {
        const Groups groups(*w, half_block++ * 8 / w->steps_per_segment);
        const __m512 scales = w->scales == nullptr ? _mm512_set1_ps(1.0f) : groups.scales(panel);
        const Lookup lookup(w->table);
        for (int first = 0; first < 32; first += Lookup::kColumns, values += Lookup::kBytes) {
            const typename Lookup::Codes codes = lookup.read(values);
            UNROLL for (int c = 0; c < Lookup::kColumns; ++c) {
                const __m512 column_weights = _mm512_mul_ps(lookup.column(codes, c), scales);
                _mm512_store_ps(weights + (first + c) * kPanelOutputs, column_weights);
            }
        }
    }
};

template <class Lookup>
void multiply_lut(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin > 1)
        many_rows_float<LutStream<Lookup> >(w, rows, part);
    else if (w.scales != nullptr)
        one_row_lut<Lookup, true>(w, rows, part);
    else
        one_row_lut<Lookup, false>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
// Expands half a block at a time. A Lookup has kHalfBytes and
//   static void expand(const uint8_t* table, const uint8_t* codes, float* out)    the entries of 32 columns
template <class Lookup>
struct LutStream : PanelStream {
    const PanelWeights* w;
    int64_t panel, half_block;
    int column;
    Floats scales[kQuarters];
    alignas(16) float entries[32 * kPanelOutputs];
    void start(const PanelWeights& weights, int64_t which) {
        PanelStream::start(weights, which);
        w = &weights;
        panel = which;
        half_block = 0;
        column = 0;
    }
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        if (column == 0) advance();
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            const float* from = entries + column * kPanelOutputs + 4 * i;
            even[i] = vmulq_f32(vld1q_f32(from), scales[i]);
            odd[i] = vmulq_f32(vld1q_f32(from + kPanelOutputs), scales[i]);
        }
        column = (column + 2) % 32;
    }
    void advance() {
        const Groups groups(*w, half_block++ * 8 / w->steps_per_segment);
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            scales[i] = w->scales == nullptr ? vdupq_n_f32(1.0f) : groups.scales(panel, i);
        }
        Lookup::expand(w->table, values, entries);
        values += Lookup::kHalfBytes;
    }
};

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

// SampleSpec::symmetric: whether there are scales.
template <int kBits>
Sample make_lut_sample(const SampleSpec& spec) {
    constexpr int kEntries = 1 << kBits;
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    std::vector<float> scales(static_cast<size_t>(spec.num_outputs * spec.num_inputs), 1.0f);
    if (spec.symmetric) {
        maker.add_grid(sample, spec, 8);
        scales = sample.level_scales;
    }
    sample.integers.push_back({"scaled", spec.symmetric});
    SampleArray table{"table", kBits == 4 ? Element::f32 : Element::u16, {}}, codes{"codes", Element::u8, {}};
    float entries[kEntries];
    for (float& entry : entries) {
        const uint16_t bits = maker.bf16();
        entry = bf16_value(bits);
        if (kBits == 4) entry *= 1.1f;  // no bfloat16
        SampleMaker::append(table.bytes, kBits == 4 ? static_cast<const void*>(&entry) : &bits, kBits == 4 ? 4 : 2);
    }
    for (int64_t row = 0; row < spec.num_outputs; ++row) {
        for (int64_t column = 0; column < spec.num_inputs; ++column) {
            const int code = maker.below(kEntries);
            sample.floats.push_back(entries[code] * scales[sample.floats.size()]);
            if (kBits == 8 || column % 2 == 0)
                codes.bytes.push_back(static_cast<uint8_t>(code));
            else
                codes.bytes.back() |= static_cast<uint8_t>(code << 4);
        }
    }
    sample.arrays.push_back(table);
    sample.arrays.push_back(codes);
    return sample;
}

}  // namespace rarefy::matmul

#endif
