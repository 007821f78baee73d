// The AVX-512 kernels of lists (nm.h). The activations of a segment are one vector, from which the indices gather.
#pragma once

#include "matmul/encodings/lists_avx512.h"

namespace rarefy::matmul::avx512 {

// How a panel's lists lie in memory, and what unpacks them.
struct ListShape {
    int64_t index_bytes, code_bytes;  // of one step
    int64_t column_bytes;             // of a segment, in front of its codes
    int64_t segment_bytes;
    int steps;
    __m512i spread, shifts, low_bits;
    const uint8_t* firsts = nullptr;
    ListShape(const PanelWeights& w, int code_bits) {
        const int64_t index_bits = w.parameter / 256;
        steps = static_cast<int>(w.parameter % 256);
        index_bytes = 8 * index_bits;
        code_bytes = 8 * code_bits;
        column_bytes = index_bits == 0 ? 128 : steps * index_bytes;
        segment_bytes = column_bytes + steps * code_bytes;
        spread = shifts = low_bits = _mm512_setzero_si512();
        if (index_bits == 0) return;
        spread = load(w.table);
        shifts = load(w.table + 64);
        low_bits = _mm512_set1_epi8(static_cast<char>((1 << index_bits) - 1));
        firsts = w.table + 128;
    }
    // Where in the values a segment begins.
    int64_t place_of(const PanelWeights& w, int64_t panel, int64_t segment) const {
        return w.group_place(panel, segment / w.segments_per_group) + w.group_bytes +
               segment % w.segments_per_group * segment_bytes;
    }
    // Numbers of a stream, with bits of others above theirs.
    __m512i unpacked(const uint8_t* stream) const {
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, load(stream)));
    }
    // Columns of the segment from indices that have other bits above theirs.
    __m512i columns(__m512i indices, int step) const {
        return _mm512_ternarylogic_epi32(indices, low_bits, load(firsts + 64 * step), 0xea);  // (a & b) | c
    }
};

// The same, read once: gcc would read what several instructions use with each of them, and most lie across two lines.
inline __m512i load_once(const void* from) {
    __m512i bytes = load(from);
    __asm__("" : "+v"(bytes));
    return bytes;
}

// 32 bytes; their low nibbles, and from element 32 on the high ones, with bits of others above.
inline __m512i spread_halves(const uint8_t* from) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_multishift_epi64_epi8(
        _mm512_set_epi64(0x3c342c241c140c04, 0x3c342c241c140c04, 0x3c342c241c140c04, 0x3c342c241c140c04,
                         0x3830282018100800, 0x3830282018100800, 0x3830282018100800, 0x3830282018100800),
        twice);
}

// The codes of kSteps steps; of 4 bits, those of odd steps come shifted left by 4 bits.
template <int kBits, int kSteps>
inline void load_codes(const uint8_t* from, __m512i (&codes)[kSteps]) {
    const __m512i low = _mm512_set1_epi8(15);
    if constexpr (kBits == 8) {
        UNROLL for (int i = 0; i < kSteps; ++i) { codes[i] = load(from + 64 * i); }
    } else if constexpr (kSteps == 1) {
        codes[0] = _mm512_and_si512(spread_halves(from), low);
    } else {
        UNROLL for (int i = 0; i < kSteps; i += 2) {
            const __m512i both = load_once(from + 32 * i);
            codes[i] = _mm512_and_si512(both, low);
            codes[i + 1] = _mm512_andnot_si512(low, both);
        }
    }
}

// How the columns of lists are told (nm.h): kUnit steps are read at once, and kTail may be left over. The columns of
// steps from `step` on; `from` is what belongs to them. vpermb passes over the upper two bits of a column.
struct StreamsOfIndices {
    static constexpr int kQuarters = 0, kUnit = 2, kTail = 1;
    template <int kSteps>
    static void unpack(const ListShape& shape, const uint8_t* from, int step, __m512i (&columns)[kSteps]) {
        UNROLL for (int i = 0; i < kSteps; ++i) {
            columns[i] = shape.columns(shape.unpacked(from + i * shape.index_bytes), step + i);
        }
    }
};

struct Fours {
    static constexpr int kQuarters = 0, kUnit = 4, kTail = 0;
    template <int kSteps>
    static void unpack(const ListShape& shape, const uint8_t* from, int step, __m512i (&columns)[kSteps]) {
        const __m512i four = load_once(from);
        UNROLL for (int i = 0; i < kSteps; ++i) {
            columns[i] = shape.columns(i == 0 ? four : _mm512_srli_epi16(four, 2 * i), step + i);
        }
    }
};

template <int kIndexBits>
struct Sixes {
    static constexpr int kTail = 6 / kIndexBits, kUnit = 2 * kTail, kQuarters = 0;
    template <int kSteps>
    static void unpack(const ListShape& shape, const uint8_t* from, int step, __m512i (&columns)[kSteps]) {
        __m512i sixes[kSteps / kTail];
        if constexpr (kSteps == kTail) {
            sixes[0] = shape.unpacked(from);
        } else {
            sixes[0] = load_once(from);
            sixes[1] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x30), _mm512_srli_epi16(sixes[0], 2),
                                                 spread_halves(from + 64), 0xca);  // a ? b : c
        }
        UNROLL for (int i = 0; i < kSteps; ++i) {
            const __m512i six = sixes[i / kTail];
            if constexpr (kIndexBits == 6)
                columns[i] = six;
            else
                columns[i] = shape.columns(i % 2 == 0 ? six : _mm512_srli_epi16(six, kIndexBits), step + i);
        }
    }
};

// Masks instead: of 16 * kQuarters entries.
template <int kSixteens>
struct Masks {
    static constexpr int kQuarters = kSixteens, kUnit = 2, kTail = 1;
};

// Calls run(StepCount of some steps, first step) for all steps of a segment.
template <int kSteps>
struct StepCount {
    static constexpr int value = kSteps;
};
template <class Lists, class Run>
__attribute__((always_inline)) inline void for_units(int steps, Run run) {
    int step = 0;
    for (; step + Lists::kUnit <= steps; step += Lists::kUnit) run(StepCount<Lists::kUnit>(), step);
    if constexpr (Lists::kTail > 0) {
        if (step < steps) run(StepCount<Lists::kTail>(), step);
    }
}

// What each output's mask keeps of `source`, as lists: steps[s] has entries 4s to 4s + 3 of every output. Places that
// no entry takes keep what `source` has there: their codes are zero points. (Where a mask zeroes them, vpcompressb
// waits for the old value of its register on Zen 5.)
template <int kQuarters>
inline void compress_lists(__m512i source, const uint8_t* masks, __m512i* steps) {
    const auto compress = [&](int output) {
        return _mm512_mask_compress_epi8(source, load_u64(masks + 8 * output), source);
    };
    steps_of_lists<kQuarters>(compress, steps);
}

template <int kColumns>
inline __m512i load_q(const int8_t* q) {
    if (kColumns == 64) return load(q);
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
}

// One row by kPanels panels, `distance` apart. Sums of codes are sums of levels plus those of the zero points, one more
// product for each step.
template <int kBits, int kPanels, int kColumns, class Lists>
void walk_lists(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    constexpr int kQuarters = Lists::kQuarters;
    const ListShape shape(w, kBits);
    const int8_t* q = rows.q + part.row_begin * rows.stride;
    const float* row_scales = rows.scales + part.row_begin * rows.num_blocks;
    const bool has_zero_points = w.zero_points != nullptr;
    const uint8_t* from[kPanels];
    __m512 totals[kPanels], scales[kPanels];
    __m512i zero_points[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        from[p] = w.values + w.value_offsets[panel + p * distance];
        totals[p] = _mm512_setzero_ps();
        zero_points[p] = _mm512_set1_epi8(static_cast<char>(w.zero_point));
    }
    constexpr int kSegments = kBlockInputs / kColumns;
    int64_t left = 0;  // segments of the group
    for (int64_t segment = 0; segment < w.num_blocks * kSegments; ++segment, q += kColumns, --left) {
        const __m512i segment_q = load_q<kColumns>(q);
        if (fetches<1>()) {
            const int64_t num_bytes = shape.segment_bytes + (left == 0 ? w.group_bytes : 0);
            UNROLL for (int p = 0; p < kPanels; ++p) { prefetch<4096>(from[p], num_bytes); }
        }
        if (left == 0) {
            UNROLL for (int p = 0; p < kPanels; ++p) {
                scales[p] = widen_bf16(from[p]);
                if (has_zero_points) zero_points[p] = quadruple_bytes(from[p] + 2 * kPanelOutputs);
                from[p] += w.group_bytes;
            }
            left = w.segments_per_group;
        }
        Sums evens[kPanels], odds[kPanels], subtracted[kPanels];
        __m512i lists[kPanels][kQuarters == 0 ? 1 : 4 * kQuarters];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            evens[p] = odds[p] = subtracted[p] = Sums{};
            if constexpr (kQuarters > 0) compress_lists<kQuarters>(segment_q, from[p], lists[p]);
        }
        for_units<Lists>(shape.steps, [&](auto count, int step) __attribute__((always_inline)) {
            constexpr int kSteps = decltype(count)::value;
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m512i gathered[kSteps], codes[kSteps];
                if constexpr (kQuarters == 0) {
                    __m512i columns[kSteps];
                    Lists::template unpack<kSteps>(shape, from[p] + step * shape.index_bytes, step, columns);
                    UNROLL for (int i = 0; i < kSteps; ++i) {
                        gathered[i] = _mm512_permutexvar_epi8(columns[i], segment_q);
                    }
                } else {
                    UNROLL for (int i = 0; i < kSteps; ++i) { gathered[i] = lists[p][step + i]; }
                }
                load_codes<kBits>(from[p] + shape.column_bytes + step * shape.code_bytes, codes);
                UNROLL for (int i = 0; i < kSteps; ++i) {
                    Sums& sums = i % 2 == 0 ? evens[p] : odds[p];
                    sums = dot_4(sums, codes[i], gathered[i]);
                    subtracted[p] = dot_4(subtracted[p], zero_points[p], gathered[i]);
                }
            }
        });
        const __m512 row_scale = _mm512_set1_ps(row_scales[segment / kSegments]);
        UNROLL for (int p = 0; p < kPanels; ++p) {
            const Sums sums = evens[p] + (kBits == 4 ? odds[p] >> 4 : odds[p]) - subtracted[p];
            totals[p] = _mm512_fmadd_ps(to_floats(sums), _mm512_mul_ps(row_scale, scales[p]), totals[p]);
            from[p] += shape.segment_bytes;
        }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t output = (panel + p * distance) * kPanelOutputs;
        const __m512 factor = output_factor(w, panel + p * distance, true);
        Lanes(w, panel + p * distance, part.y + part.row_begin * part.y_stride + output)
            .store(_mm512_mul_ps(totals[p], factor));
    }
}

// Many rows: the lists of a few segments and panels are unpacked to columns and signed levels, and the activations of a
// few rows moved to [1, 255], where they are the unsigned side of the products.

constexpr int kListSegments = 8;
constexpr int kListBytes = 24 << 10;  // of unpacked lists: they stay in the L1 cache

// An unpacked segment: what the sums start from, which takes the move back; for each step the columns and the levels.
// kWide: 8-bit codes minus zero points may need 9 bits, so that both come apart, each less 128: the zero points and
// what their sums start from are the second and third vector.
template <bool kWide>
inline int64_t unpacked_bytes(const ListShape& shape) {
    return 64 * ((kWide ? 3 : 1) + 2 * shape.steps);
}

template <int kBits, class Lists, bool kWide>
void unpack_lists(const PanelWeights& w, const ListShape& shape, int64_t panel, int64_t begin, int64_t end,
                  int64_t ahead, uint8_t* out) {
    constexpr int kQuarters = Lists::kQuarters;
    const uint8_t* from = w.values + shape.place_of(w, panel, begin);
    const __m512i moved_by = _mm512_set1_epi8(static_cast<char>(128));
    alignas(64) uint8_t identity[64];
    for (int i = 0; i < 64; ++i) identity[i] = static_cast<uint8_t>(i);
    Groups groups(w, begin);
    for (int64_t segment = begin; segment < end; ++segment) {
        prefetch<0>(from + ahead, shape.segment_bytes);
        __m512i lists[kQuarters == 0 ? 1 : 4 * kQuarters];
        const __m512i zero_points = every_byte(groups.zero_points(panel));
        if constexpr (kQuarters > 0) compress_lists<kQuarters>(load(identity), from, lists);
        Sums start{}, zero_start{};
        uint8_t* to = out + (kWide ? 192 : 64);
        for_units<Lists>(shape.steps, [&](auto count, int step) {
            constexpr int kSteps = decltype(count)::value;
            __m512i columns[kSteps], codes[kSteps];
            if constexpr (kQuarters == 0) {
                Lists::template unpack<kSteps>(shape, from + step * shape.index_bytes, step, columns);
            } else {
                UNROLL for (int i = 0; i < kSteps; ++i) { columns[i] = lists[step + i]; }
            }
            load_codes<kBits>(from + shape.column_bytes + step * shape.code_bytes, codes);
            UNROLL for (int i = 0; i < kSteps; ++i, to += 128) {
                const __m512i code = kBits == 4 && i % 2 == 1 ? _mm512_srli_epi16(codes[i], 4) : codes[i];
                const __m512i levels = kWide ? _mm512_xor_si512(code, moved_by) : _mm512_sub_epi8(code, zero_points);
                start = dot_4(start, moved_by, levels);
                _mm512_store_si512(to, columns[i]);
                _mm512_store_si512(to + 64, levels);
            }
        });
        if (kWide) {
            const __m512i moved = _mm512_xor_si512(zero_points, moved_by);
            for (int step = 0; step < shape.steps; ++step) zero_start = dot_4(zero_start, moved_by, moved);
            _mm512_store_si512(out + 64, moved);
            _mm512_store_si512(out + 128, reinterpret_cast<__m512i>(-zero_start));
        }
        _mm512_store_si512(out, reinterpret_cast<__m512i>(-start));
        out = to;
        from += shape.segment_bytes;
        if (groups.advance()) from += w.group_bytes;
    }
}

struct ListTile {
    const uint8_t* lists;
    int64_t panel, num_panels;
    int64_t segment_begin, segment_end;
    int steps;
};

// kRows rows from `row` on by the panels of a tile; adds to y unless the tile starts at segment 0.
template <int kRows, int kColumns, bool kWide>
void tile_lists(const PanelWeights& w, const Rows& rows, const Part& part, const ListTile& tile, int64_t row) {
    constexpr int kSegments = kBlockInputs / kColumns;
    alignas(64) uint8_t moved_q[kListSegments][kRows][64];
    const __m512i moved_by = _mm512_set1_epi8(static_cast<char>(128));
    const int64_t num_segments = tile.segment_end - tile.segment_begin;
    for (int r = 0; r < kRows; ++r) {
        const int8_t* q = rows.q + (row + r) * rows.stride + tile.segment_begin * kColumns;
        for (int64_t i = 0; i < num_segments; ++i)
            _mm512_store_si512(moved_q[i][r], _mm512_xor_si512(load_q<kColumns>(q + i * kColumns), moved_by));
    }
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const uint8_t* from = tile.lists;
    for (int64_t panel = tile.panel; panel < tile.panel + tile.num_panels; ++panel) {
        float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
        __m512 totals[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) {
            totals[r] = Lanes(w, panel, y + r * part.y_stride).load_unless(tile.segment_begin == 0);
        }
        Groups groups(w, tile.segment_begin);
        for (int64_t i = 0; i < num_segments; ++i) {
            Sums sums[kRows], zero_sums[kRows];
            UNROLL for (int r = 0; r < kRows; ++r) {
                sums[r] = reinterpret_cast<Sums>(load(from));
                if (kWide) zero_sums[r] = reinterpret_cast<Sums>(load(from + 128));
            }
            __m512i zero_points = _mm512_setzero_si512();
            if (kWide) zero_points = load(from + 64);
            from += kWide ? 192 : 64;
            for (int step = 0; step < tile.steps; ++step, from += 128) {
                const __m512i columns = load(from), levels = load(from + 64);
                const uint8_t* step_q = moved_q[i][0];
                __asm__ volatile("" : "+r"(step_q));  // or gcc keeps all rows in registers, and the sums in memory
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512i gathered = _mm512_permutexvar_epi8(columns, load(step_q + 64 * r));
                    sums[r] = dot_4(sums[r], gathered, levels);
                    if (kWide) zero_sums[r] = dot_4(zero_sums[r], gathered, zero_points);
                }
            }
            const __m512 scales = groups.scales(panel);
            const int64_t block = (tile.segment_begin + i) / kSegments;
            add_scaled(w, [&](auto scaling) {
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks + block]);
                    totals[r] = _mm512_fmadd_ps(to_floats(kWide ? sums[r] - zero_sums[r] : sums[r]),
                                                scaling.factor(row_scale, scales), totals[r]);
                }
            });
            groups.advance();
        }
        const __m512 factor = output_factor(w, panel, tile.segment_end == w.num_blocks * kSegments);
        UNROLL for (int r = 0; r < kRows; ++r) {
            Lanes(w, panel, y + r * part.y_stride).store(_mm512_mul_ps(totals[r], factor));
        }
    }
}

using ListTileFunction = void (*)(const PanelWeights&, const Rows&, const Part&, const ListTile&, int64_t);

template <int kColumns, bool kWide>
inline constexpr ListTileFunction kListTiles[6] = {tile_lists<1, kColumns, kWide>, tile_lists<2, kColumns, kWide>,
                                                   tile_lists<3, kColumns, kWide>, tile_lists<4, kColumns, kWide>,
                                                   tile_lists<5, kColumns, kWide>, tile_lists<6, kColumns, kWide>};

template <int kColumns, bool kWide>
void multiply_list_tile(const PanelWeights& w, const Rows& rows, const Part& part, const ListTile& tile) {
    int64_t row = part.row_begin;
    if constexpr (!kWide) {
        for (; part.row_end - row >= 12; row += 12) tile_lists<12, kColumns, kWide>(w, rows, part, tile, row);
    }
    while (row < part.row_end) {
        const int64_t count = part.row_end - row < 6 ? part.row_end - row : 6;
        kListTiles<kColumns, kWide>[count - 1](w, rows, part, tile, row);
        row += count;
    }
}

template <int kBits, int kColumns, class Lists, bool kWide>
void many_rows_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    const ListShape shape(w, kBits);
    const int64_t segment_bytes = unpacked_bytes<kWide>(shape);
    alignas(64) uint8_t unpacked[kListBytes];
    const int64_t fit = kListBytes / (segment_bytes * kListSegments);
    const int64_t num_segments = w.num_blocks * (kBlockInputs / kColumns);
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += fit) {
        const int64_t num_panels = part.panel_end - panel < fit ? part.panel_end - panel : fit;
        for (int64_t begin = 0; begin < num_segments; begin += kListSegments) {
            const int64_t end = begin + kListSegments < num_segments ? begin + kListSegments : num_segments;
            // The next tile: of these panels, or of the next ones.
            const int64_t ahead = (end < num_segments ? shape.place_of(w, 0, end) : shape.place_of(w, fit, 0)) -
                                  shape.place_of(w, 0, begin);
            for (int64_t p = 0; p < num_panels; ++p)
                unpack_lists<kBits, Lists, kWide>(w, shape, panel + p, begin, end, ahead,
                                                  unpacked + p * (end - begin) * segment_bytes);
            const ListTile tile{unpacked, panel, num_panels, begin, end, shape.steps};
            multiply_list_tile<kColumns, kWide>(w, rows, part, tile);
        }
    }
}

template <int kBits, int kColumns, class Lists>
void multiply_lists_as(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin == 1) {
        walk_panels(w, rows, part, walk_lists<kBits, 2, kColumns, Lists>, walk_lists<kBits, 1, kColumns, Lists>);
    } else if (kBits == 8 && w.zero_points != nullptr) {
        many_rows_lists<kBits, kColumns, Lists, true>(w, rows, part);
    } else {
        many_rows_lists<kBits, kColumns, Lists, false>(w, rows, part);
    }
}

template <int kBits, int kColumns>
void multiply_indexed(const PanelWeights& w, const Rows& rows, const Part& part) {
    const int64_t index_bits = w.parameter / 256;
    const Indices indices = arrangement_of(index_bits, w.parameter % 256);
    if (indices == Indices::fours)
        multiply_lists_as<kBits, kColumns, Fours>(w, rows, part);
    else if (indices == Indices::sixes && index_bits == 3)
        multiply_lists_as<kBits, kColumns, Sixes<3> >(w, rows, part);
    else if (indices == Indices::sixes)
        multiply_lists_as<kBits, 64, Sixes<6> >(w, rows, part);
    else
        multiply_lists_as<kBits, kColumns, StreamsOfIndices>(w, rows, part);
}

template <int kBits>
void multiply_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    const int64_t index_bits = w.parameter / 256, steps = w.parameter % 256;
    if (w.steps_per_segment == 8)
        multiply_indexed<kBits, 32>(w, rows, part);
    else if (index_bits > 0)
        multiply_indexed<kBits, 64>(w, rows, part);
    else if (steps <= 4)
        multiply_lists_as<kBits, 64, Masks<1> >(w, rows, part);
    else
        multiply_lists_as<kBits, 64, Masks<2> >(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
