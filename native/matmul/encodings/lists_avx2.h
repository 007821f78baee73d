// Codes under a mask for AVX2 and AVX-VNNI, which have no vpexpandb: lists of what is kept, or all codes (dense.h),
// whatever takes fewer bytes. Less is read and less multiplied, the more zeros there are; nothing is expanded.
//
// The lists of a segment have as many steps as the fullest of the panel's 16 outputs needs, four entries a step.
// Entries that are the zero point are left out; places that no entry takes have the zero point as their code. `extra`
// has the number of steps, a byte for each segment of each panel; `values` has the steps, one after the other:
//   64 bytes of columns within the segment, in the order of the vectors' bytes: 16 outputs, four entries each
//   the codes in that order: 64 bytes, for AVX2 alone less 128 as int8; or 32 bytes, outputs 0 to 7 in the low nibbles
//   and 8 to 15 in the high ones
// Lists have an `extra`, all codes have none. parameter = the mean number of steps of 64 columns, rounded up.
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
    const uint8_t moved = kBits == 8 && packing.isa() == Isa::avx2 ? 128 : 0;
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
                                      step[64 + place] = code ^ moved;
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

template <int kBits>
void pack_lists_or_all(Packing& packing, int stored_bits) {
    const MaskedSegments segments(packing, stored_bits);
    PanelWeights& view = packing.view;
    const int64_t num_counts = view.num_panels * segments.num_segments;
    std::vector<uint8_t> steps(static_cast<size_t>(num_counts), 0);
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        segments.of_panel(panel, first, num_rows, [&](int, int64_t segment, const KeptEntries& kept, uint8_t) {
            uint8_t& most = steps[static_cast<size_t>(panel * segments.num_segments + segment)];
            const auto needed = static_cast<uint8_t>((kept.count + 3) / 4);
            if (needed > most) most = needed;
        });
    });
    int64_t all_steps = 0;
    for (const uint8_t count : steps) all_steps += count;
    if (all_steps * (64 + 8 * kBits) + num_counts >=
        view.num_panels * view.num_blocks * kBlockInputs * kPanelOutputs * kBits / 8) {
        pack_all_codes<kBits>(packing, segments);
        return;
    }
    uint8_t* const extra = packing.allocate(num_counts);
    std::memcpy(extra, steps.data(), steps.size());
    view.extra = extra;
    view.parameter = ceil_div(all_steps, view.num_panels * view.num_blocks);
    pack_lists<kBits>(packing, segments, extra);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {

// The activations of a segment: 16 to a table, in both halves of the vector. All but the first are exclusive-ored with
// the one before, so that the tables up to the one with a column give its activation.
template <int kColumns>
struct Gatherer {
    static constexpr int kTables = kColumns / 16;
    __m256i tables[kTables];
    void load(const int8_t* q) {
        __m256i before = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < kTables; ++i) {
            const __m256i table =
                _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 16 * i)));
            tables[i] = _mm256_xor_si256(table, before);
            before = table;
        }
    }
    // Negative numbers, those of columns before a table, find 0 there.
    static void places(__m256i columns, __m256i (&in_tables)[kTables]) {
        UNROLL for (int i = 0; i < kTables; ++i) {
            in_tables[i] = _mm256_sub_epi8(columns, _mm256_set1_epi8(static_cast<char>(16 * i)));
        }
    }
    __m256i gather(const __m256i (&in_tables)[kTables]) const {
        __m256i gathered = _mm256_shuffle_epi8(tables[0], in_tables[0]);
        UNROLL for (int i = 1; i < kTables; ++i) {
            gathered = _mm256_xor_si256(gathered, _mm256_shuffle_epi8(tables[i], in_tables[i]));
        }
        return gathered;
    }
};

// Without AVX-VNNI, codes of 8 bits less 128 meet activations that have their signs: 128 * 127 * 2 fits 16 bits.
template <int kBits>
constexpr bool kSigned = kBits == 8 && !kVnni;

// Sums of codes times activations, and of the activations, which the zero points are multiplied by.
template <int kBits>
struct ListSums {
    __m256i products = _mm256_setzero_si256(), activations = _mm256_setzero_si256();
    void add(__m256i codes, __m256i q) {
        if constexpr (kSigned<kBits>) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(q, codes));
            products = _mm256_add_epi32(products, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        } else {
            products = add_bytes(products, codes, q);
        }
        activations = add_bytes(activations, _mm256_set1_epi8(1), q);
    }
    // After at most 8 steps.
    __m256i dots(__m256i zero_points) const {
        const __m256i zero = _mm256_setzero_si256();
        const __m256i sums = kSigned<kBits> ? products : fold(zero, products);
        const __m256i from = kSigned<kBits> ? _mm256_sub_epi32(zero_points, _mm256_set1_epi32(128)) : zero_points;
        return _mm256_sub_epi32(sums, _mm256_mullo_epi32(fold(zero, activations), from));
    }
};

// kRows rows from `row` on by one panel.
template <int kBits, int kRows, int kColumns>
void rows_by_lists(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel) {
    constexpr int kSegments = kBlockInputs / kColumns;
    constexpr int kStepBytes = 64 + 8 * kBits;
    constexpr int kMostSteps = 8;  // at once
    const int8_t* q = rows.q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const uint8_t* stream = w.values + w.value_offsets[panel];
    const uint8_t* num_steps = w.extra + panel * w.num_blocks * kSegments;
    Totals<kRows> totals;
    Groups groups(w, 0);
    for (int64_t segment = 0; segment < w.num_blocks * kSegments; ++segment, q += kColumns) {
        Gatherer<kColumns> gatherers[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) { gatherers[r].load(q + r * rows.stride); }
        const __m256i zero_points[kHalves] = {groups.zero_points(panel, 0), groups.zero_points(panel, 1)};
        __m256i dots[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) { dots[r][half] = _mm256_setzero_si256(); }
        }
        for (int left = num_steps[segment]; left > 0; left -= kMostSteps) {
            ListSums<kBits> sums[kRows][kHalves];
            for (int step = left < kMostSteps ? left : kMostSteps; step > 0; --step, stream += kStepBytes) {
                _mm_prefetch(reinterpret_cast<const char*>(stream + 4096), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(stream + 4096 + 64), _MM_HINT_T0);
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    __m256i in_tables[Gatherer<kColumns>::kTables];
                    Gatherer<kColumns>::places(load(stream + 32 * half), in_tables);
                    __m256i codes = load(stream + 64 + (kBits == 8 ? 32 * half : 0));
                    if (kBits == 4)
                        codes = _mm256_and_si256(half == 0 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
                    UNROLL for (int r = 0; r < kRows; ++r) { sums[r][half].add(codes, gatherers[r].gather(in_tables)); }
                }
            }
            UNROLL for (int r = 0; r < kRows; ++r) {
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    dots[r][half] = _mm256_add_epi32(dots[r][half], sums[r][half].dots(zero_points[half]));
                }
            }
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256 scales = groups.scales(panel, half);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const __m256 row_scale = _mm256_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
                totals.store(r, half,
                             _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][half]), _mm256_mul_ps(row_scale, scales),
                                             totals.load(r, half)));
            }
        }
        groups.advance();
    }
    totals.write(w, part, row, panel);
}

template <int kBits, int kColumns>
constexpr RowsFunction kRowsByLists[kMaxRows] = {rows_by_lists<kBits, 1, kColumns>, rows_by_lists<kBits, 2, kColumns>,
                                                 rows_by_lists<kBits, 3, kColumns>, rows_by_lists<kBits, 4, kColumns>};

// The codes of lists in their columns, for tiles of many rows.
template <int kBits, int kColumns>
struct ListStream {
    static constexpr int kFewRows = 0;
    static constexpr bool kSmallCodes = kBits == 4;
    const uint8_t *values, *num_steps, *codes;
    __m256i pruned[kHalves];
    alignas(32) uint8_t columns[kColumns * kPanelOutputs];
    void start(const PanelWeights& w, int64_t panel) {
        values = w.values + w.value_offsets[panel];
        num_steps = w.extra + panel * w.num_blocks * (kBlockInputs / kColumns);
        codes = columns + sizeof(columns);
    }
    void set_zero_points(const __m256i (&zero_points)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) { pruned[half] = zero_points[half]; }
    }
    // Backwards, so that what an output keeps of column 0 comes behind the places that no entry takes.
    void expand() {
        constexpr int kStepBytes = 64 + 8 * kBits;
        for (unsigned at = 0; at < sizeof(columns); at += 64) {
            UNROLL for (int half = 0; half < kHalves; ++half) { store(columns + at + 32 * half, pruned[half]); }
        }
        const int count = *num_steps++;
        for (int step = count - 1; step >= 0; --step) {
            const uint8_t* from = values + step * kStepBytes;
            alignas(32) uint16_t places[64];
            alignas(32) uint8_t step_codes[64];
            UNROLL for (int i = 0; i < 4; ++i) {
                const __m256i column =
                    _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
                const __m256i lane =
                    _mm256_add_epi16(_mm256_set1_epi16(static_cast<short>(16 * i)),
                                     _mm256_setr_epi16(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
                const __m256i in_lane = _mm256_and_si256(column, _mm256_set1_epi16(3));
                const __m256i vector = _mm256_slli_epi16(_mm256_sub_epi16(column, in_lane), 4);
                store(places + 16 * i, _mm256_add_epi16(_mm256_add_epi16(vector, in_lane), lane));
            }
            UNROLL for (int half = 0; half < kHalves; ++half) {
                __m256i some = load(from + 64 + (kBits == 8 ? 32 * half : 0));
                if (kBits == 4)
                    some = _mm256_and_si256(half == 0 ? some : _mm256_srli_epi16(some, 4), _mm256_set1_epi8(15));
                else if (kSigned<kBits>)
                    some = _mm256_xor_si256(some, _mm256_set1_epi8(-128));
                store(step_codes + 32 * half, some);
            }
            UNROLL for (int i = 0; i < 64; ++i) { columns[places[63 - i]] = step_codes[63 - i]; }
        }
        values += count * kStepBytes;
        codes = columns;
    }
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        if (codes == columns + sizeof(columns)) expand();
        UNROLL for (int half = 0; half < kHalves; ++half) {
            even[half] = load(codes + 32 * half);
            odd[half] = load(codes + 64 + 32 * half);
        }
        codes += 128;
    }
};

// What gathers activations for every row, or for many rows expands lists once, where they have more steps than the
// first is faster for.
template <int kBits>
void multiply_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr int64_t kFewRows = 16;
    constexpr int64_t kFewSteps = kVnni ? 1 : kBits == 4 ? 2 : 3;
    const bool whole = w.steps_per_segment == 16;
    if (part.row_end - part.row_begin <= kFewRows || w.parameter <= kFewSteps)
        walk_rows(w, rows, part, whole ? kRowsByLists<kBits, 64> : kRowsByLists<kBits, 32>);
    else if (whole)
        many_rows_int<ListStream<kBits, 64> >(w, rows, part);
    else
        many_rows_int<ListStream<kBits, 32> >(w, rows, part);
}

}  // namespace rarefy::matmul::avx2

#endif
