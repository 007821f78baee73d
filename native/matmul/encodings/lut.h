// What the lookup tables share. Entries are bfloat16 and meet rounded activations as bfloat16 weights do; sums over
// half a block are multiplied by the scale of its group, where there are scales (else null). PanelWeights::table holds
// the entries.
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
    const uint8_t* table;
    LutStream(const PanelWeights& w, int64_t panel) : PanelStream(w, panel), table(w.table) {}
    void block(float* out) {
        for (int column = 0; column < kBlockInputs; ++column)
            for (int output = 0; output < kPanelOutputs; ++output)
                out[column * kPanelOutputs + output] = Coder::entry(table, Coder::code(values, column, output));
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
    const uint8_t* table;
    int column;
    alignas(32) float entries[32 * kPanelOutputs];
    void start(const PanelWeights& w, int64_t panel) {
        PanelStream::start(w, panel);
        table = w.table;
        column = 0;
    }
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        if (column == 0) {
            Lookup::expand(table, values, entries);
            values += Lookup::kHalfBytes;
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const float* from = entries + column * kPanelOutputs + 8 * half;
            even[half] = _mm256_load_ps(from);
            odd[half] = _mm256_load_ps(from + kPanelOutputs);
        }
        column = (column + 2) % 32;
    }
};

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {

// Two columns of a row, which meet the pairs of all outputs. Without vdpbf16ps they are widened once for all calls.
#if RAREFY_PASS_AVX512_BF16
struct ColumnPair {
    __m512i x;
    explicit ColumnPair(const uint16_t* from) : x(broadcast_pair(from)) {}
    static const uint16_t* row(const Rows& rows, int64_t row) { return rows.bf16_x + row * rows.stride; }
    __m512 add(__m512 sums, __m512i pairs) const { return add_pairs(sums, pairs, x); }
};
#else
struct ColumnPair {
    __m512 even, odd;
    explicit ColumnPair(const float* from) : even(_mm512_set1_ps(from[0])), odd(_mm512_set1_ps(from[1])) {}
    static const float* row(const Rows& rows, int64_t row) { return rows.x + row * rows.stride; }
    __m512 add(__m512 sums, __m512i pairs) const {
        __m512 even_entries, odd_entries;
        widen_pairs(pairs, even_entries, odd_entries);
        return _mm512_fmadd_ps(even, even_entries, _mm512_fmadd_ps(odd, odd_entries, sums));
    }
};
#endif

// kRows rows from `row` on by two panels, `distance` apart. A Lookup holds the table:
//   static constexpr int kPairs, kBytes    pairs of columns that it reads at once, and their bytes
//   static constexpr bool kInterleaved    whether what it reads of the two halves of a block lies in turns
//   void read(const uint8_t* from, __m512i (&pairs)[kPairs])
// Looking up again for every 8 rows costs less than storing what was found and loading it. One row adds up both halves
// at once where they lie in turns, since each sum waits for the product before it.
template <class Lookup, bool kScaled, int kRows>
void rows_lut(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel, int64_t distance,
              Ahead ahead) {
    constexpr int kHalves = kRows == 1 && kScaled && Lookup::kInterleaved ? 2 : 1;        // at once
    constexpr int kReads = 16 / Lookup::kPairs;                                           // for half a block
    constexpr int64_t kHalfBytes = Lookup::kBytes * (Lookup::kInterleaved ? 1 : kReads);  // from one half to the other
    constexpr int64_t kReadBytes = Lookup::kBytes * (Lookup::kInterleaved ? 2 : 1);
    const auto* x = ColumnPair::row(rows, row);
    const Lookup lookup(w.table);
    const uint8_t* values[kPair];
    alignas(64) float totals[kRows][kPair][kPanelOutputs] = {};
    __m512 sums[kHalves][kRows][kPair] = {};
    UNROLL for (int p = 0; p < kPair; ++p) { values[p] = w.values + w.value_offsets[panel + p * distance]; }
    const bool fetch = fetches<kRows>() && (kRows < kMaxRows || ahead.is_first());
    const int64_t ahead_of_one = near_or_far();
    Groups groups(w, 0);
    for (int64_t half_block = 0; half_block < 2 * w.num_blocks; half_block += kHalves) {
        if (kRows > 1 && half_block % 2 == 0) ahead.fetch();  // one row has one tile
        if (kScaled && fetch) {
            UNROLL for (int p = 0; p < kPair; ++p) { groups.fetch(panel + p * distance); }
        }
        const int64_t first = half_block % 2 * kHalfBytes;
        for (int i = 0; i < kReads; ++i, x += 2 * Lookup::kPairs) {
            UNROLL for (int h = 0; h < kHalves; ++h) {
                __m512i pairs[kPair][Lookup::kPairs];
                UNROLL for (int p = 0; p < kPair; ++p) {
                    const uint8_t* from = values[p] + first + i * kReadBytes + h * kHalfBytes;
                    if (kRows == 1)
                        prefetch_in_order(from + ahead_of_one);
                    else if (fetch)
                        prefetch<4096>(from, Lookup::kBytes);
                    lookup.read(from, pairs[p]);
                }
                UNROLL for (int s = 0; s < Lookup::kPairs; ++s) {
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        const ColumnPair columns(x + r * rows.stride + 2 * s + h * (kBlockInputs / 2));
                        UNROLL for (int p = 0; p < kPair; ++p) {
                            sums[h][r][p] = columns.add(sums[h][r][p], pairs[p][s]);
                        }
                    }
                }
            }
        }
        if (kHalves == 2) x += kBlockInputs / 2;
        if (kHalves == 2 || half_block % 2 == 1) {
            UNROLL for (int p = 0; p < kPair; ++p) { values[p] += 2 * kReads * Lookup::kBytes; }
        }
        if (!kScaled && half_block % 2 == 0) continue;
        UNROLL for (int h = 0; h < kHalves; ++h) {
            UNROLL for (int p = 0; p < kPair; ++p) {
                const __m512 scales = kScaled ? groups.scales(panel + p * distance) : _mm512_set1_ps(1.0f);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    _mm512_store_ps(totals[r][p], _mm512_fmadd_ps(sums[h][r][p], scales, _mm512_load_ps(totals[r][p])));
                    sums[h][r][p] = _mm512_setzero_ps();
                }
            }
            if (kScaled && ((half_block + h) % 2 == 1 || w.steps_per_segment == 8)) groups.advance();
        }
    }
    UNROLL for (int p = 0; p < kPair; ++p) {
        const Lanes outputs = output_row(w, part, row, panel + p * distance);
        UNROLL for (int r = 0; r < kRows; ++r) { outputs.store(_mm512_load_ps(totals[r][p]), r * part.y_stride); }
    }
}

template <class Lookup, bool kScaled>
constexpr RowsFunction kRowsLut[kMaxRows] = {rows_lut<Lookup, kScaled, 1>, rows_lut<Lookup, kScaled, 2>,
                                             rows_lut<Lookup, kScaled, 3>, rows_lut<Lookup, kScaled, 4>,
                                             rows_lut<Lookup, kScaled, 5>, rows_lut<Lookup, kScaled, 6>,
                                             rows_lut<Lookup, kScaled, 7>, rows_lut<Lookup, kScaled, 8>};

template <class Lookup>
void multiply_lut(const PanelWeights& w, const Rows& rows, const Part& part) {
    walk_rows(w, rows, part, w.scales != nullptr ? kRowsLut<Lookup, true> : kRowsLut<Lookup, false>);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
// Expands half a block at a time. A Lookup has kHalfBytes and
//   static void expand(const uint8_t* table, const uint8_t* codes, float* out)    the entries of 32 columns
template <class Lookup>
struct LutStream : PanelStream {
    const uint8_t* table;
    int column;
    alignas(16) float entries[32 * kPanelOutputs];
    void start(const PanelWeights& w, int64_t panel) {
        PanelStream::start(w, panel);
        table = w.table;
        column = 0;
    }
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        if (column == 0) {
            Lookup::expand(table, values, entries);
            values += Lookup::kHalfBytes;
        }
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            const float* from = entries + column * kPanelOutputs + 4 * i;
            even[i] = vld1q_f32(from);
            odd[i] = vld1q_f32(from + kPanelOutputs);
        }
        column = (column + 2) % 32;
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
            sample.floats.push_back(rounded_to_bf16(entries[code]) * scales[sample.floats.size()]);
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
