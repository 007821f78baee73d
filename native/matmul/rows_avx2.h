// Products with few rows of activations: what is decoded into registers is multiplied with up to 4 rows at once,
// without the way through an expanded tile.
#pragma once

#include "matmul/vectors_avx2.h"

namespace rarefy::matmul::avx2 {

constexpr int kMaxRows = 4;

// The outputs of one panel for kRows rows.
template <int kRows>
struct Totals {
    alignas(32) float sums[kRows][kPanelOutputs] = {};
    __m256 load(int row, int half) const { return _mm256_load_ps(sums[row] + 8 * half); }
    void store(int row, int half, __m256 values) { _mm256_store_ps(sums[row] + 8 * half, values); }
    // The sums of a segment.
    void add(int row, int half, __m256i dots, float row_scale, __m256 scales) {
        store(row, half,
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_mul_ps(_mm256_set1_ps(row_scale), scales),
                              load(row, half)));
    }
    void write(const PanelWeights& w, const Part& part, int64_t row, int64_t panel) const {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const int64_t output = panel * kPanelOutputs + 8 * half;
            const __m256i lanes = output_lanes(w, output);
            const __m256 factor = output_factor(w, panel, half, true);
            UNROLL for (int r = 0; r < kRows; ++r) {
                _mm256_maskstore_ps(part.y + (row + r) * part.y_stride + output, lanes,
                                    _mm256_mul_ps(load(r, half), factor));
            }
        }
    }
};

// kRows rows from `row` on by one panel.
template <class Stream, int kRows>
void rows_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel) {
    const int8_t* q = rows.q + row * rows.stride;
    const int16_t* wide_q = kAsBytes<Stream> ? nullptr : rows.wide_q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    Stream stream;
    stream.start(w, panel);
    Ahead<1> ahead;
    ahead.start(w, panel);
    Totals<kRows> totals;
    const int num_segments = 16 / w.steps_per_segment;  // of a block
    const int num_eighths = w.steps_per_segment / 8;
    Groups groups(w, 0);
    bool new_group = true;
    for (int64_t segment = 0; segment < w.num_blocks * num_segments; ++segment) {
        if (new_group) groups.give_zero_points(stream, panel);
        if (num_segments == 1 || segment % 2 == 0) ahead.fetch(segment / num_segments);
        __m256i dots[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t* sums = half_sums + r * rows.num_blocks * 2;
            const int32_t sum = num_segments == 2 ? segment_sum<8>(sums, segment) : segment_sum<16>(sums, segment);
            UNROLL for (int half = 0; half < kHalves; ++half) {
                dots[r][half] = _mm256_mullo_epi32(groups.zero_points(panel, half), _mm256_set1_epi32(-sum));
            }
        }
        for (int eighth = 0; eighth < num_eighths; ++eighth) {
            if constexpr (kAsBytes<Stream>) {
                __m256i sums[kRows][kHalves];
                UNROLL for (int r = 0; r < kRows; ++r) {
                    UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_si256(); }
                }
                for (int pair = 0; pair < 4; ++pair, q += 8) {
                    __m256i even[kHalves], odd[kHalves];
                    stream.next(even, odd);
                    UNROLL for (int r = 0; r < kRows; ++r) {
                        const int8_t* row_q = q + r * rows.stride;
                        const __m256i even_q = broadcast_u32(row_q), odd_q = broadcast_u32(row_q + 4);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            sums[r][half] = add_bytes(sums[r][half], even[half], even_q);
                            sums[r][half] = add_bytes(sums[r][half], odd[half], odd_q);
                        }
                    }
                }
                UNROLL for (int r = 0; r < kRows; ++r) {
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        dots[r][half] = fold(dots[r][half], sums[r][half]);
                    }
                }
            } else {
                for (int pair = 0; pair < 4; ++pair) {
                    __m256i codes[2][kHalves];
                    stream.next(codes[0], codes[1]);
                    UNROLL for (int step = 0; step < 2; ++step, wide_q += 4) {
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            const __m256i codes_02 = low_bytes(codes[step][half]);
                            const __m256i codes_13 = high_bytes(codes[step][half]);
                            UNROLL for (int r = 0; r < kRows; ++r) {
                                const int16_t* row_q = wide_q + r * rows.stride;
                                dots[r][half] = add_int8(dots[r][half], codes_02, codes_13, broadcast_u32(row_q),
                                                         broadcast_u32(row_q + 2));
                            }
                        }
                    }
                }
            }
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256 scales = groups.scales(panel, half);
            UNROLL for (int r = 0; r < kRows; ++r) {
                totals.add(r, half, dots[r][half], row_scales[r * rows.num_blocks + segment / num_segments], scales);
            }
        }
        new_group = groups.advance();
    }
    totals.write(w, part, row, panel);
}

template <class Stream, int kRows>
void rows_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t row, int64_t panel) {
    const float* x = rows.x + row * rows.stride;
    Stream stream;
    stream.start(w, panel);
    Ahead<4> ahead;
    ahead.start(w, panel);
    Totals<kRows> totals;
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m256 sums[kRows][kHalves];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int half = 0; half < kHalves; ++half) { sums[r][half] = _mm256_setzero_ps(); }
        }
        for (int half_of_block = 0; half_of_block < 2; ++half_of_block) {
            for (int pair = 0; pair < kBlockInputs / 4; ++pair, x += 2) {
                if (pair % 8 == 0) ahead.fetch(4 * block + 2 * half_of_block + pair / 8);
                __m256 even[kHalves], odd[kHalves];
                stream.next(even, odd);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m256 row_x = _mm256_broadcast_ss(x + r * rows.stride + 1);
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        sums[r][half] = _mm256_fmadd_ps(row_x, odd[half], sums[r][half]);
                    }
                }
                UNROLL for (int r = 0; r < kRows; ++r) {
                    const __m256 row_x = _mm256_broadcast_ss(x + r * rows.stride);
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        sums[r][half] = _mm256_fmadd_ps(row_x, even[half], sums[r][half]);
                    }
                }
            }
            if (sums_go_on(w, half_of_block)) continue;
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256 scales = half_block_scales(w, panel, 2 * block + half_of_block, half);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    totals.store(r, half, _mm256_fmadd_ps(sums[r][half], scales, totals.load(r, half)));
                    sums[r][half] = _mm256_setzero_ps();
                }
            }
        }
    }
    totals.write(w, part, row, panel);
}

using RowsFunction = void (*)(const PanelWeights&, const Rows&, const Part&, int64_t row, int64_t panel);

template <class Stream>
constexpr RowsFunction kRowsInt[kMaxRows] = {rows_int<Stream, 1>, rows_int<Stream, 2>, rows_int<Stream, 3>,
                                             rows_int<Stream, 4>};
template <class Stream>
constexpr RowsFunction kRowsFloat[kMaxRows] = {rows_float<Stream, 1>, rows_float<Stream, 2>, rows_float<Stream, 3>,
                                               rows_float<Stream, 4>};

// Splits the rows of a part evenly.
template <int kMost = kMaxRows>
inline void walk_rows(const PanelWeights& w, const Rows& rows, const Part& part, const RowsFunction* functions) {
    const int64_t num_rows = part.row_end - part.row_begin;
    const int64_t num_groups = (num_rows + kMost - 1) / kMost;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        int64_t row = part.row_begin;
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t count = (num_rows + group) / num_groups;
            functions[count - 1](w, rows, part, row, panel);
            row += count;
        }
    }
}

}  // namespace rarefy::matmul::avx2
