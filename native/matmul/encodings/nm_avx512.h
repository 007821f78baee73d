// The AVX-512 kernels of lists (nm.h). The activations of a segment are one vector, from which the indices gather.
#pragma once

#include "matmul/encodings/nm_lists_avx512.h"

namespace rarefy::matmul::avx512 {

template <int kColumns>
inline __m512i load_q(const int8_t* q) {
    if (kColumns == 64) return load(q);
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
}

// kRows rows by kPanels panels, `distance` apart. Sums of codes are sums of levels plus those of the zero points, one
// more product for each step.
template <int kBits, int kRows, int kPanels, int kColumns, class Lists>
void walk_lists(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    constexpr int kQuarters = Lists::kQuarters;
    static_assert(kQuarters == 0 || kRows == 1, "lists under a mask are those of one row");
    const ListShape shape(w, kBits);
    const int8_t* q = rows.q + part.row_begin * rows.stride;
    const float* row_scales = rows.scales + part.row_begin * rows.num_blocks;
    const bool has_zero_points = w.zero_points != nullptr;
    const uint8_t* from[kPanels];
    __m512 totals[kPanels][kRows], scales[kPanels];
    __m512i zero_points[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        from[p] = w.values + w.value_offsets[panel + p * distance];
        UNROLL for (int r = 0; r < kRows; ++r) { totals[p][r] = _mm512_setzero_ps(); }
        zero_points[p] = _mm512_set1_epi8(static_cast<char>(w.zero_point));
    }
    constexpr int kSegments = kBlockInputs / kColumns;
    int64_t left = 0;  // segments of the group
    for (int64_t segment = 0; segment < w.num_blocks * kSegments; ++segment, q += kColumns, --left) {
        __m512i segment_q[kRows];
        UNROLL for (int r = 0; r < kRows; ++r) { segment_q[r] = load_q<kColumns>(q + r * rows.stride); }
        if (fetches<kRows>()) {
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
        Sums evens[kPanels][kRows], odds[kPanels][kRows], subtracted[kPanels][kRows];
        __m512i lists[kPanels][kQuarters == 0 ? 1 : 4 * kQuarters];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            UNROLL for (int r = 0; r < kRows; ++r) { evens[p][r] = odds[p][r] = subtracted[p][r] = Sums{}; }
            if constexpr (kQuarters > 0) compress_lists<kQuarters>(segment_q[0], from[p], lists[p]);
        }
        for_units<Lists>(shape.steps, [&](auto count, int step) __attribute__((always_inline)) {
            constexpr int kSteps = decltype(count)::value;
            UNROLL for (int p = 0; p < kPanels; ++p) {
                __m512i columns[kSteps], codes[kSteps];
                if constexpr (kQuarters == 0)
                    Lists::template unpack<kSteps>(shape, from[p] + step * shape.index_bytes, step, columns);
                load_codes<kBits>(from[p] + shape.column_bytes + step * shape.code_bytes, codes);
                UNROLL for (int i = 0; i < kSteps; ++i) {
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        __m512i gathered;
                        if constexpr (kQuarters == 0)
                            gathered = _mm512_permutexvar_epi8(columns[i], segment_q[r]);
                        else
                            gathered = lists[p][step + i];
                        Sums& sums = kBits == 8 || i % 2 == 0 ? evens[p][r] : odds[p][r];
                        sums = dot_4(sums, codes[i], gathered);
                        subtracted[p][r] = dot_4(subtracted[p][r], zero_points[p], gathered);
                    }
                }
            }
        });
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks + segment / kSegments]);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const Sums sums = evens[p][r] + (odds[p][r] >> 4) - subtracted[p][r];
                totals[p][r] = _mm512_fmadd_ps(to_floats(sums), _mm512_mul_ps(row_scale, scales[p]), totals[p][r]);
            }
        }
        UNROLL for (int p = 0; p < kPanels; ++p) { from[p] += shape.segment_bytes; }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        float* y = part.y + part.row_begin * part.y_stride + (panel + p * distance) * kPanelOutputs;
        const __m512 factor = output_factor(w, panel + p * distance, true);
        UNROLL for (int r = 0; r < kRows; ++r) {
            Lanes(w, panel + p * distance, y + r * part.y_stride).store(_mm512_mul_ps(totals[p][r], factor));
        }
    }
}

// A few rows meet lists as one does, up to four at a time while a panel is in a cache: storing what is unpacked and
// loading it takes longer.
constexpr int64_t kFewListRows = 8;

template <int kBits, int kColumns, class Lists>
void few_rows_lists(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr OneRowFunction kFunctions[4] = {
        walk_lists<kBits, 1, 1, kColumns, Lists>, walk_lists<kBits, 2, 1, kColumns, Lists>,
        walk_lists<kBits, 3, 1, kColumns, Lists>, walk_lists<kBits, 4, 1, kColumns, Lists>};
    const int64_t num_rows = part.row_end - part.row_begin, num_runs = (num_rows + 3) / 4;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Part run = part;
        for (int64_t i = 0; i < num_runs; ++i) {
            const int64_t count = (num_rows + i) / num_runs;
            kFunctions[count - 1](w, rows, run, panel, 0);
            run.row_begin += count;
        }
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
    const int64_t num_rows = part.row_end - part.row_begin;
    if (num_rows == 1)
        return walk_panels(w, rows, part, walk_lists<kBits, 1, 2, kColumns, Lists>,
                           walk_lists<kBits, 1, 1, kColumns, Lists>);
    if constexpr (Lists::kQuarters == 0) {
        if (num_rows <= kFewListRows) return few_rows_lists<kBits, kColumns, Lists>(w, rows, part);
    }
    if (kBits == 8 && w.zero_points != nullptr)
        many_rows_lists<kBits, kColumns, Lists, true>(w, rows, part);
    else
        many_rows_lists<kBits, kColumns, Lists, false>(w, rows, part);
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
    if (w.steps_per_segment == 8) return multiply_indexed<kBits, 32>(w, rows, part);
    if constexpr (kBits == 8) {
        if (w.parameter / 256 == 0) {
            return w.parameter <= 4 ? multiply_lists_as<kBits, 64, Masks<1> >(w, rows, part)
                                    : multiply_lists_as<kBits, 64, Masks<2> >(w, rows, part);
        }
    }
    multiply_indexed<kBits, 64>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512
