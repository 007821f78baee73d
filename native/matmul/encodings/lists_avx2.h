// Codes under a mask for AVX2 and AVX-VNNI, which have no vpexpandb: lists of what is kept, or all codes (dense.h),
// unless lists save a third of the bytes. Less is read and less multiplied, the more zeros there are; nothing is expanded.
//
// The lists of a segment have as many steps as the fullest of the panel's 16 outputs needs, four entries a step.
// Entries that are the zero point are left out; places that no entry takes have the zero point as their code. `extra`
// has the number of steps, a byte for each segment of each panel; `values` has the steps, one after the other:
//   64 bytes of columns within the segment, in the order of the vectors' bytes: 16 outputs, four entries each
//   the codes in that order: 64 bytes; or 32 bytes, outputs 0 to 7 in the low nibbles
//   and 8 to 15 in the high ones
// Lists have an `extra`, all codes have none. 
#pragma once

#include "matmul/encodings/mask.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

inline bool has_no_expand(Isa isa) { return isa == Isa::avx2 || isa == Isa::avx_vnni; }

// What one output keeps of a segment, without what is zero.
struct KeptEntries {
    int count = 0;
    uint8_t columns[kBlockInputs], codes[kBlockInputs];
};

// The segments of a masked weight with codes of so many bits on disk.
struct MaskedSegments {
    const PanelWeights& view;
    const DiskMask mask;
    const uint8_t* codes = nullptr;
    int stored_bits, columns;
    int64_t num_segments;  // of an output

    MaskedSegments(Packing& packing, int num_bits)
        : view(packing.view),
          mask(packing),
          stored_bits(num_bits),
          columns(4 * packing.view.steps_per_segment),
          num_segments(packing.view.num_blocks * (kBlockInputs / columns)) {
        const NamedArray& stored = packing.take("codes", Element::u8);
        require(stored.num_bytes == ceil_div(mask.row_starts.back() * stored_bits, 8),
                "the mask does not fit the values");
        codes = stored.bytes;
    }

    // Calls function(row, segment, entries, zero point) for all segments of a panel, row by row.
    template <class Function>
    void of_panel(int64_t panel, int64_t first, int num_rows, Function&& function) const {
        for (int row = 0; row < num_rows; ++row) {
            int64_t cursor = mask.row_starts[static_cast<size_t>(first + row)];
            for (int64_t segment = 0; segment < num_segments; ++segment) {
                const int first_column = static_cast<int>(segment * columns % kBlockInputs);
                uint64_t bits = mask.block(first + row, segment * columns / kBlockInputs) >> first_column;
                if (columns < kBlockInputs) bits &= (uint64_t{1} << columns) - 1;
                const int zero_point = zero_point_of(view, panel, segment, row);
                KeptEntries kept;
                for (; bits != 0; bits &= bits - 1) {
                    const uint8_t code = code_of_run(codes, cursor++, stored_bits);
                    if (code == zero_point) continue;
                    kept.columns[kept.count] = static_cast<uint8_t>(__builtin_ctzll(bits));
                    kept.codes[kept.count++] = code;
                }
                function(row, segment, kept, static_cast<uint8_t>(zero_point));
            }
        }
    }
};

// Codes of kBits, 4 or 8, stored as so many bits or fewer.
template <int kBits>
void pack_lists(Packing& packing, const MaskedSegments& segments, const uint8_t* steps) {
    constexpr int kStepBytes = 64 + 8 * kBits;
    uint8_t* const values = packing.place_values([&](int64_t panel) {
        int64_t sum = 0;
        for (int64_t i = 0; i < segments.num_segments; ++i) sum += steps[panel * segments.num_segments + i];
        return sum * kStepBytes;
    });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* const begin = values + packing.view.value_offsets[panel];
        uint8_t* out = begin;
        segments.of_panel(panel, first, num_rows,
                          [&](int row, int64_t segment, const KeptEntries& kept, uint8_t zero_point) {
                              if (segment == 0) out = begin;
                              const int places = 4 * steps[panel * segments.num_segments + segment];
                              for (int i = 0; i < places; ++i) {
                                  uint8_t* const step = out + i / 4 * kStepBytes;
                                  const uint8_t code = i < kept.count ? kept.codes[i] : zero_point;
                                  const int place = 4 * row + i % 4;
                                  step[place] = i < kept.count ? kept.columns[i] : 0;
                                  if (kBits == 8)
                                      step[64 + place] = code;
                                  else
                                      step[64 + place % 32] |= static_cast<uint8_t>(code << (place / 32 * 4));
                              }
                              out += places / 4 * kStepBytes;
                          });
    });
}

// As dense_int8.cc or dense_int4.cc has them.
template <int kBits>
void pack_all_codes(Packing& packing, const MaskedSegments& segments) {
    const int64_t panel_bytes = packing.view.num_blocks * kBlockInputs * kPanelOutputs * kBits / 8;
    uint8_t* const values = packing.place_values([&](int64_t) { return panel_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* const out = values + panel * panel_bytes;
        segments.of_panel(panel, first, num_rows,
                          [&](int row, int64_t segment, const KeptEntries& kept, uint8_t zero_point) {
                              uint8_t codes[kBlockInputs];
                              std::memset(codes, zero_point, sizeof(codes));
                              for (int i = 0; i < kept.count; ++i) codes[kept.columns[i]] = kept.codes[i];
                              for (int i = 0; i < segments.columns; ++i) {
                                  const int64_t step = (segment * segments.columns + i) / 4;
                                  const int place = 4 * row + i % 4;
                                  if (kBits == 8)
                                      out[step * 64 + place] = codes[i];
                                  else
                                      out[step / 2 * 64 + place] |= static_cast<uint8_t>(codes[i] << (step % 2 * 4));
                              }
                          });
    });
}

// Cycles for a block of a panel, measured on Zen 5: when many rows are multiplied by what is kept (lanes_avx2.h).
// Below so many rows finding it and filling vectors of 32 rows takes longer than the other kernels; 0: always.
inline int64_t fewest_lane_rows(Isa isa, int num_bits, double kept_of_64, bool lists, double steps) {
    const double dense = isa == Isa::avx_vnni ? 24 : num_bits == 4 ? 34 : 47;  // of a row
    const double other = lists ? 17 + 6 * steps : dense;
    const double begin = lists ? 100 + 30 * steps : 250 + 12 * kept_of_64;
    const double lanes = kPanelOutputs * (8 + kept_of_64 / 2 * (num_bits == 4 ? 2 : 3.2));  // of 32 rows
    for (int64_t num_rows = 8; num_rows <= kTaskRows; num_rows += 8) {
        if (begin + lanes * static_cast<double>(ceil_div(num_rows, 32)) < other * static_cast<double>(num_rows))
            return num_rows;
    }
    return 0;
}

template <int kBits>
void pack_lists_or_all(Packing& packing, int stored_bits) {
    const MaskedSegments segments(packing, stored_bits);
    PanelWeights& view = packing.view;
    const int64_t num_counts = view.num_panels * segments.num_segments;
    std::vector<uint8_t> steps(static_cast<size_t>(num_counts), 0);
    std::vector<int64_t> kept_of_panels(static_cast<size_t>(view.num_panels), 0);
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        segments.of_panel(panel, first, num_rows, [&](int, int64_t segment, const KeptEntries& kept, uint8_t) {
            uint8_t& most = steps[static_cast<size_t>(panel * segments.num_segments + segment)];
            const auto needed = static_cast<uint8_t>((kept.count + 3) / 4);
            if (needed > most) most = needed;
            kept_of_panels[static_cast<size_t>(panel)] += kept.count;
        });
    });
    int64_t all_steps = 0, all_kept = 0;
    for (const uint8_t count : steps) all_steps += count;
    for (const int64_t count : kept_of_panels) all_kept += count;
    const int64_t num_blocks = view.num_panels * view.num_blocks;
    const int64_t code_bytes = num_blocks * kBlockInputs * kPanelOutputs * kBits / 8;
    const int64_t list_bytes = all_steps * (64 + 8 * kBits) + num_counts;
    const bool lists = list_bytes < code_bytes * 7 / 10;
    const double blocks = static_cast<double>(num_blocks > 0 ? num_blocks : 1);
    view.lane_rows = fewest_lane_rows(packing.isa(), kBits, static_cast<double>(all_kept) / blocks / kPanelOutputs,
                                      lists, static_cast<double>(all_steps) / blocks);
    if (!lists) {
        pack_all_codes<kBits>(packing, segments);
        return;
    }
    uint8_t* const extra = packing.allocate(num_counts);
    std::memcpy(extra, steps.data(), steps.size());
    view.extra = extra;
    pack_lists<kBits>(packing, segments, extra);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

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
//   differences  codes less their zero points fit a signed byte; activations are q + 128, unsigned, and what the 128 add
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
        const __m256i codes =
            _mm256_and_si256(half == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
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

// kRows rows from `row` on by one panel, and by one half of it after the other.
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
            gatherers[r].load(q + r * rows.stride, Kind::kDifferences ? _mm256_set1_epi8(-128) : _mm256_setzero_si256());
        }
        const int count = num_steps[segment];
        for (int step = 0; step < count; ++step) {
            _mm_prefetch(reinterpret_cast<const char*>(stream + 4096 + step * kStepBytes), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(stream + 4096 + step * kStepBytes + 64), _MM_HINT_T0);
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256i zero_points = groups.zero_points(panel, half);
            const __m256i zero_bytes = _mm256_mullo_epi32(zero_points, _mm256_set1_epi32(0x01010101));
            __m256i dots[kRows];
            UNROLL for (int r = 0; r < kRows; ++r) { dots[r] = _mm256_setzero_si256(); }
            for (int begin = 0; begin < count; begin += Kind::kMostSteps) {
                const int steps = count - begin < Kind::kMostSteps ? count - begin : Kind::kMostSteps;
                const uint8_t* from = stream + begin * kStepBytes;
                ListSums<Kind> sums[kRows];
                __m256i too_much = _mm256_setzero_si256();
                for (int step = 0; step < steps; ++step, from += kStepBytes) {
                    const __m256i codes = Kind::codes(from, half, zero_bytes);
                    __m256i gathered[kRows];
                    Gatherer<kColumns>::gather(gatherers, load(from + 32 * half), gathered);
                    UNROLL for (int r = 0; r < kRows; ++r) { sums[r].add(codes, gathered[r]); }
                    if (Kind::kDifferences) too_much = add_bytes(too_much, _mm256_set1_epi8(-128), codes);
                }
                if (Kind::kActivations)
                    too_much = Kind::kSigns ? _mm256_sub_epi32(zero_points, _mm256_set1_epi32(128)) : zero_points;
                UNROLL for (int r = 0; r < kRows; ++r) { dots[r] = _mm256_add_epi32(dots[r], sums[r].dots(too_much)); }
            }
            const __m256 scales = groups.scales(panel, half);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256 row_scale = _mm256_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
                totals.store(r, half,
                             _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), _mm256_mul_ps(row_scale, scales),
                                             totals.load(r, half)));
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
    if (w.extra != nullptr)
        multiply_lists<kBits>(w, rows, part);
    else if (!reads_lanes(w, rows))
        dense(w, rows, part);
    else if (w.steps_per_segment == 16)
        multiply_lanes<kBits / 4, 64, CodeSource<kBits, 64> >(w, rows, part);
    else
        multiply_lanes<kBits / 4, 32, CodeSource<kBits, 32> >(w, rows, part);
}

}  // namespace rarefy::matmul::avx2

#endif
