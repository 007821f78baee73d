// The AVX2 kernels of lists and of all codes; see lists.h.
#pragma once

#include "matmul/encodings/kept_codes_avx2.h"

namespace rarefy::matmul::avx2 {

// The activations of a segment: 16 to a table, in both halves of the vector. All but the first are exclusive-ored with
// the one before, so that the tables up to the one with a column give its activation.
template <int kColumns>
struct Gatherer {
    static constexpr int kTables = kColumns / 16;
    __m256i tables[kTables];
    // `moved`: what all activations are exclusive-ored with.
    void load(const int8_t* q, __m256i moved) {
        __m256i before = moved;
        UNROLL for (int i = 0; i < kTables; ++i) {
            const __m256i table =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 16 * i)));
            tables[i] = _mm256_xor_si256(table, before);
            before = table;
        }
    }
    // The activations of 32 columns, of each row. Columns before a table become negative, and find 0 in it.
    template <int kRows>
    static void gather(const Gatherer (&rows)[kRows], __m256i columns, __m256i (&gathered)[kRows]) {
        UNROLL for (int r = 0; r < kRows; ++r) { gathered[r] = _mm256_shuffle_epi8(rows[r].tables[0], columns); }
        UNROLL for (int i = 1; i < kTables; ++i) {
            columns = _mm256_sub_epi8(columns, _mm256_set1_epi8(16));
            UNROLL for (int r = 0; r < kRows; ++r) {
                gathered[r] = _mm256_xor_si256(gathered[r], _mm256_shuffle_epi8(rows[r].tables[i], columns));
            }
        }
    }
};

// How gathered activations meet codes. kCentered: all zero points are the middle.
//   differences  codes less their zero points fit a signed byte; activations are q + 128, unsigned, and what the 128
//   add
//                too much is the same for all rows
//   signs        8 bits without AVX-VNNI: codes less 128, and activations that have their signs: 128 * 127 * 2 fits 16
//                bits
// Where the codes are not differences, zero points are multiplied by the sums of the activations.
template <int kBits, bool kCentered>
struct ListKind {
    static constexpr bool kDifferences = kBits == 4 || (kVnni && kCentered);
    static constexpr bool kSigns = kBits == 8 && !kVnni;
    static constexpr bool kActivations = !kDifferences && !kCentered;
    static constexpr int kMostSteps = kVnni || kSigns ? 16 : 8;  // until sums of 16 bits are folded
    static __m256i codes(const uint8_t* step, int half, __m256i zero_points) {
        if (kBits == 8) {
            const __m256i codes = load(step + 64 + 32 * half);
            return kDifferences || kSigns ? _mm256_xor_si256(codes, _mm256_set1_epi8(-128)) : codes;
        }
        const __m256i both = load(step + 64);
        const __m256i codes = _mm256_and_si256(half == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
        return _mm256_sub_epi8(codes, zero_points);
    }
};

// Sums of one row for 8 outputs.
template <class Kind>
struct ListSums {
    __m256i products = _mm256_setzero_si256(), activations = _mm256_setzero_si256();
    void add(__m256i codes, __m256i q) {
        if constexpr (Kind::kDifferences) {
            products = add_bytes(products, q, codes);
        } else if constexpr (Kind::kSigns) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes));
            products = _mm256_add_epi32(products, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        } else {
            products = add_bytes(products, codes, q);
        }
        if constexpr (Kind::kActivations) activations = add_bytes(activations, _mm256_set1_epi8(1), q);
    }
    // `too_much`: of differences, what the 128 have added; else zero points, those of signs less 128.
    __m256i dots(__m256i too_much) const {
        const __m256i zero = _mm256_setzero_si256();
        if constexpr (Kind::kDifferences)
            return fold(zero, kVnni ? _mm256_sub_epi32(products, too_much) : _mm256_sub_epi16(products, too_much));
        const __m256i sums = Kind::kSigns ? products : fold(zero, products);
        if constexpr (!Kind::kActivations) return sums;
        return _mm256_sub_epi32(sums, _mm256_mullo_epi32(fold(zero, activations), too_much));
    }
};

constexpr int kListRows = 2;  // their tables fill half of the registers

// kRows rows from `row` on by one panel: one row by both halves of it at once, since the number of steps is hard to
// foretell, two by one half after the other, for which the registers do.
template <int kBits, bool kCentered, int kRows, int kColumns>
void rows_by_lists(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel) {
    using Kind = ListKind<kBits, kCentered>;
    constexpr int kSegments = kBlockInputs / kColumns;
    constexpr int kStepBytes = 64 + 8 * kBits;
    const int8_t* q = rows.q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const uint8_t* stream = w.values + w.value_offsets[panel];
    const uint8_t* num_steps = w.extra + panel * w.num_blocks * kSegments;
    Totals<kRows> totals;
    Groups groups(w, 0);
    for (int64_t segment = 0; segment < w.num_blocks * kSegments; ++segment, q += kColumns) {
        Gatherer<kColumns> gatherers[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) {
            gatherers[r].load(q + r * rows.stride,
                              Kind::kDifferences ? _mm256_set1_epi8(-128) : _mm256_setzero_si256());
        }
        const int count = num_steps[segment];
        for (int step = 0; step < count; ++step) {
            _mm_prefetch(reinterpret_cast<const char*>(stream + 4096 + step * kStepBytes), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(stream + 4096 + step * kStepBytes + 64), _MM_HINT_T0);
        }
        constexpr int kAtOnce = kRows == 1 ? kHalves : 1;
        UNROLL for (int first = 0; first < kHalves; first += kAtOnce) {
            __m256i zero_points[kAtOnce], zero_bytes[kAtOnce], dots[kAtOnce][kRows];
            UNROLL for (int h = 0; h < kAtOnce; ++h) {
                zero_points[h] = groups.zero_points(panel, first + h);
                zero_bytes[h] = _mm256_mullo_epi32(zero_points[h], _mm256_set1_epi32(0x01010101));
                UNROLL for (int r = 0; r < kRows; ++r) { dots[h][r] = _mm256_setzero_si256(); }
            }
            for (int begin = 0; begin < count; begin += Kind::kMostSteps) {
                const int steps = count - begin < Kind::kMostSteps ? count - begin : Kind::kMostSteps;
                const uint8_t* from = stream + begin * kStepBytes;
                ListSums<Kind> sums[kAtOnce][kRows];
                __m256i too_much[kAtOnce];
                UNROLL for (int h = 0; h < kAtOnce; ++h) { too_much[h] = _mm256_setzero_si256(); }
                for (int step = 0; step < steps; ++step, from += kStepBytes) {
                    UNROLL for (int h = 0; h < kAtOnce; ++h) {
                        const __m256i codes = Kind::codes(from, first + h, zero_bytes[h]);
                        __m256i gathered[kRows];
                        Gatherer<kColumns>::gather(gatherers, load(from + 32 * (first + h)), gathered);
                        UNROLL for (int r = 0; r < kRows; ++r) { sums[h][r].add(codes, gathered[r]); }
                        if (Kind::kDifferences) too_much[h] = add_bytes(too_much[h], _mm256_set1_epi8(-128), codes);
                    }
                }
                UNROLL for (int h = 0; h < kAtOnce; ++h) {
                    if (Kind::kActivations)
                        too_much[h] =
                            Kind::kSigns ? _mm256_sub_epi32(zero_points[h], _mm256_set1_epi32(128)) : zero_points[h];
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        dots[h][r] = _mm256_add_epi32(dots[h][r], sums[h][r].dots(too_much[h]));
                    }
                }
            }
            UNROLL for (int h = 0; h < kAtOnce; ++h) {
                const __m256 scales = groups.scales(panel, first + h);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const float row_scale = row_scales[r * rows.num_blocks + segment / kSegments];
                    totals.add(r, first + h, dots[h][r], row_scale, scales);
                }
            }
        }
        stream += count * kStepBytes;
        groups.advance();
    }
    totals.write(w, part, row, panel);
}

template <int kBits, bool kCentered, int kColumns>
constexpr RowsFunction kRowsByLists[kListRows] = {rows_by_lists<kBits, kCentered, 1, kColumns>,
                                                  rows_by_lists<kBits, kCentered, 2, kColumns>};

// Lists for vectors of rows.
template <int kBits>
struct ListSource {
    const uint8_t *values, *num_steps;
    void start(const PanelWeights& w, int64_t panel, int64_t num_segments) {
        values = w.values + w.value_offsets[panel];
        num_steps = w.extra + panel * num_segments;
    }
    void next(KeptFiller<kBits / 4>& filler) {
        constexpr int kStepBytes = 64 + 8 * kBits;
        for (int step = *num_steps++; step > 0; --step, values += kStepBytes) {
            _mm_prefetch(reinterpret_cast<const char*>(values + 4096), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(values + 4096 + 64), _MM_HINT_T0);
            __m256i codes[kHalves];
            UNROLL for (int half = 0; half < kHalves; ++half) {
                codes[half] = load(values + 64 + (kBits == 8 ? 32 * half : 0));
                if (kBits == 4)
                    codes[half] = _mm256_and_si256(half == 0 ? codes[half] : _mm256_srli_epi16(codes[half], 4),
                                                   _mm256_set1_epi8(15));
            }
            filler.add(values, codes);
        }
    }
};

template <int kBits, int kColumns>
void multiply_lists_of(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (reads_lanes(w, rows))
        multiply_lanes<kBits / 4, kColumns, ListSource<kBits> >(w, rows, part);
    else if (w.zero_points == nullptr && w.zero_point == 1 << (kBits - 1))
        walk_rows<kListRows>(w, rows, part, kRowsByLists<kBits, true, kColumns>);
    else
        walk_rows<kListRows>(w, rows, part, kRowsByLists<kBits, kBits == 4, kColumns>);
}

template <int kBits>
void multiply_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        multiply_lists_of<kBits, 64>(w, rows, part);
    else
        multiply_lists_of<kBits, 32>(w, rows, part);
}

// `dense`: the kernel of all codes.
template <int kBits>
void multiply_lists_or_all(const PanelWeights& w, const Rows& rows, const Part& part, KernelFunction dense) {
    const bool lanes = reads_lanes(w, rows);
    if (w.mask != nullptr && rows.num_rows > 1 && !lanes) {
        PanelWeights codes = w;
        codes.values = w.mask;
        codes.value_offsets = w.extra_offsets;
        dense(codes, rows, part);
    } else if (w.extra != nullptr) {
        multiply_lists<kBits>(w, rows, part);
    } else if (!lanes) {
        dense(w, rows, part);
    } else if (w.steps_per_segment == 16) {
        multiply_lanes<kBits / 4, 64, CodeSource<kBits, 64> >(w, rows, part);
    } else {
        multiply_lanes<kBits / 4, 32, CodeSource<kBits, 32> >(w, rows, part);
    }
}

}  // namespace rarefy::matmul::avx2
