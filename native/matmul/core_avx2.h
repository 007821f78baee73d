// What the AVX2 kernels of all encodings share: one row and few rows straight from the packed bytes, and many rows
// through expanded tiles. A step of a panel is two vectors of 8 outputs by 4 codes, or by 1 float.
//
// Codes below 16: vpmaddubsw of unsigned codes and activations; 8 steps fit 16 bits (8 * 2 * 15 * 127 < 2^15).
// Others: that would saturate, so columns 0 and 2, then 1 and 3, are widened to 16 bits and meet wide activations.
// With AVX-VNNI all codes meet activations as bytes, in vpdpbusd.
//
// An encoding gives a `Stream` that reads a panel from its start, two steps at a time:
//   static constexpr int kFewRows    up to so many rows it decodes a panel again for every 4; beyond, tiles expand it
//   once void start(w, panel) codes:  static constexpr bool kSmallCodes    below 16
//           void set_zero_points(const __m256i (&)[kHalves])    in every byte; called before each group's first step
//           void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves])
//   floats: void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves])
// and its kernel is multiply_int<Stream> or multiply_float<Stream>, or a function of its own that may call their two
// halves, one_row_* and many_rows_*.
#pragma once

#include "matmul/rows_avx2.h"
#include "matmul/tiles_avx2.h"

namespace rarefy::matmul::avx2 {

template <class Stream, int kSteps>
void walk_int(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    const int64_t row = part.row_begin;
    const int8_t* q = rows.q + row * rows.stride;
    const int16_t* wide_q = kAsBytes<Stream> ? nullptr : rows.wide_q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    Stream stream;
    stream.start(w, panel);
    Ahead<1> ahead;
    ahead.start(w, panel);
    __m256 totals[kHalves] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    Groups groups(w, 0);
    bool new_group = true;
    for (int64_t segment = 0; segment < w.num_blocks * (16 / kSteps); ++segment) {
        if (new_group) groups.give_zero_points(stream, panel);
        if (kSteps == 16 || segment % 2 == 0) ahead.fetch(segment * kSteps / 16);
        const __m256i sum = _mm256_set1_epi32(-segment_sum<kSteps>(half_sums, segment));
        __m256i dots[kHalves], odd_dots[kHalves];
        UNROLL for (int half = 0; half < kHalves; ++half) {
            dots[half] = _mm256_mullo_epi32(groups.zero_points(panel, half), sum);
            odd_dots[half] = _mm256_setzero_si256();
        }
        UNROLL_PRODUCTS for (int eighth = 0; eighth < kSteps / 8; ++eighth) {
            constexpr int kChains = kVnni ? 4 : 2;  // of additions, which take longer in vpdpbusd
            __m256i sums[kChains][kHalves];
            UNROLL for (int chain = 0; chain < kChains; ++chain) {
                UNROLL for (int half = 0; half < kHalves; ++half) { sums[chain][half] = _mm256_setzero_si256(); }
            }
            UNROLL_PRODUCTS for (int i = 0; i < 4; ++i) {
                __m256i codes[2][kHalves];
                stream.next(codes[0], codes[1]);
                UNROLL for (int step = 0; step < 2; ++step) {
                    if constexpr (kAsBytes<Stream>) {
                        const __m256i four = broadcast_u32(q);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            __m256i& chain = sums[kVnni ? (2 * i + step) % 4 : step][half];
                            chain = add_bytes(chain, codes[step][half], four);
                        }
                        q += 4;
                    } else {
                        const __m256i q_02 = broadcast_u32(wide_q), q_13 = broadcast_u32(wide_q + 2);
                        UNROLL for (int half = 0; half < kHalves; ++half) {
                            __m256i& chain = step == 0 ? dots[half] : odd_dots[half];
                            chain = add_int8(chain, low_bytes(codes[step][half]), high_bytes(codes[step][half]), q_02,
                                             q_13);
                        }
                        wide_q += 4;
                    }
                }
            }
            if constexpr (kAsBytes<Stream>) {
                UNROLL for (int chain = 0; chain < kChains; ++chain) {
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        dots[half] = fold(dots[half], sums[chain][half]);
                    }
                }
            }
        }
        const __m256 row_scale = _mm256_set1_ps(row_scales[segment * kSteps / 16]);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            totals[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(dots[half], odd_dots[half])),
                                           _mm256_mul_ps(row_scale, groups.scales(panel, half)), totals[half]);
        }
        new_group = groups.advance();
    }
    float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
    UNROLL for (int half = 0; half < kHalves; ++half) {
        _mm256_maskstore_ps(y + 8 * half, output_lanes(w, panel * kPanelOutputs + 8 * half),
                            _mm256_mul_ps(totals[half], output_factor(w, panel, half, true)));
    }
}

// kPanels panels together, so that the chains of additions overlap.
template <class Stream, int kPanels>
void walk_float(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel) {
    const float* x = rows.x + part.row_begin * rows.stride;
    Stream streams[kPanels];
    Ahead<4> ahead[kPanels];
    __m256 totals[kPanels][kHalves];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        streams[p].start(w, panel + p);
        ahead[p].start(w, panel + p);
        UNROLL for (int half = 0; half < kHalves; ++half) { totals[p][half] = _mm256_setzero_ps(); }
    }
    for (int64_t block = 0; block < w.num_blocks; ++block) {
        __m256 sums[kPanels][kHalves];
        UNROLL for (int p = 0; p < kPanels; ++p) {
            UNROLL for (int half = 0; half < kHalves; ++half) { sums[p][half] = _mm256_setzero_ps(); }
        }
        for (int half_of_block = 0; half_of_block < 2; ++half_of_block) {
            for (int pair = 0; pair < kBlockInputs / 4; ++pair, x += 2) {
                if (pair % 8 == 0) {
                    UNROLL for (int p = 0; p < kPanels; ++p) {
                        ahead[p].fetch(4 * block + 2 * half_of_block + pair / 8);
                    }
                }
                const __m256 even_x = _mm256_broadcast_ss(x), odd_x = _mm256_broadcast_ss(x + 1);
                UNROLL for (int p = 0; p < kPanels; ++p) {
                    __m256 even[kHalves], odd[kHalves];
                    streams[p].next(even, odd);
                    UNROLL for (int half = 0; half < kHalves; ++half) {
                        sums[p][half] = _mm256_fmadd_ps(odd_x, odd[half], sums[p][half]);
                        sums[p][half] = _mm256_fmadd_ps(even_x, even[half], sums[p][half]);
                    }
                }
            }
            if (sums_go_on(w, half_of_block)) continue;
            UNROLL for (int p = 0; p < kPanels; ++p) {
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    const __m256 scales = half_block_scales(w, panel + p, 2 * block + half_of_block, half);
                    totals[p][half] = _mm256_fmadd_ps(sums[p][half], scales, totals[p][half]);
                    sums[p][half] = _mm256_setzero_ps();
                }
            }
        }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const int64_t output = (panel + p) * kPanelOutputs + 8 * half;
            _mm256_maskstore_ps(part.y + part.row_begin * part.y_stride + output, output_lanes(w, output),
                                totals[p][half]);
        }
    }
}

// Expands blocks [begin, end) of one panel.
template <class Stream, int kSteps>
void expand_int(const PanelWeights& w, Stream& stream, int64_t panel, int64_t begin, int64_t end, uint8_t* out) {
    constexpr int kSegments = 16 / kSteps;
    Groups groups(w, begin * kSegments);
    bool new_group = true;
    for (int64_t segment = begin * kSegments; segment < end * kSegments; ++segment) {
        if (new_group) groups.give_zero_points(stream, panel);
        for (int pair = 0; pair < kSteps / 2; ++pair) {
            __m256i codes[2][kHalves];
            stream.next(codes[0], codes[1]);
            UNROLL for (int step = 0; step < 2; ++step) {
                UNROLL for (int half = 0; half < kHalves; ++half) {
                    if constexpr (kAsBytes<Stream>) {
                        store(out + 32 * half, codes[step][half]);
                    } else {
                        store(out + 32 * half, low_bytes(codes[step][half]));
                        store(out + 64 + 32 * half, high_bytes(codes[step][half]));
                    }
                }
                out += kStepBytes<kAsBytes<Stream>>;
            }
        }
        new_group = groups.advance();
    }
}

template <class Stream>
void expand_float(Stream& stream, int64_t num_blocks, uint8_t* out) {
    for (int64_t pair = 0; pair < num_blocks * kBlockInputs / 2; ++pair, out += 128) {
        __m256 even[kHalves], odd[kHalves];
        stream.next(even, odd);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            store(out + 32 * half, _mm256_castps_si256(even[half]));
            store(out + 64 + 32 * half, _mm256_castps_si256(odd[half]));
        }
    }
}

// Calls expand(stream, panel, begin, end) and then multiply(panel, begin, end, totals, next) for stretches of panels.
template <class Stream, class Expand, class Multiply>
void walk_stretches(const PanelWeights& w, const Part& part, int64_t num_blocks, const Expand& expand,
                    const Multiply& multiply) {
    alignas(64) float totals[kTilePanels][kTaskRows][kPanelOutputs];
    for (int64_t first = part.panel_begin; first < part.panel_end; first += kTilePanels) {
        const int64_t last = first + kTilePanels < part.panel_end ? first + kTilePanels : part.panel_end;
        Stream streams[kTilePanels];
        for (int64_t panel = first; panel < last; ++panel) streams[panel - first].start(w, panel);
        for (int64_t begin = 0; begin < w.num_blocks; begin += num_blocks) {
            const int64_t end = begin + num_blocks < w.num_blocks ? begin + num_blocks : w.num_blocks;
            for (int64_t panel = first; panel < last; ++panel) {
                expand(streams[panel - first], panel, begin, end);
                const auto multiply_before = [&](const NextValues& next) {
                    multiply(panel, begin, end, totals[panel - first], next);
                };
                if (panel + 1 < last)
                    multiply_before(NextValues(w, panel + 1, begin, end));
                else if (end < w.num_blocks)
                    multiply_before(NextValues(w, first, end, end + num_blocks));
                else
                    multiply_before(NextValues(w, last < w.num_panels ? last : first, 0, num_blocks));
            }
        }
    }
}

template <class Stream, int kSteps>
void expanded_rows_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    constexpr bool kBytes = kAsBytes<Stream>;
    alignas(64) uint8_t expanded[kExpandedBytes];
    walk_stretches<Stream>(
        w, part, kIntTileBlocks<kBytes>,
        [&](Stream& stream, int64_t panel, int64_t begin, int64_t end) {
            expand_int<Stream, kSteps>(w, stream, panel, begin, end, expanded);
        },
        [&](int64_t panel, int64_t begin, int64_t end, float (*totals)[kPanelOutputs], const NextValues& next) {
            const Tile tile(w, expanded, panel, begin, end, totals);
            const Groups groups(w, begin * (16 / kSteps));
            for_groups_of_rows(part, kIntTileRows, next, [&](int64_t row, int64_t count) {
                kIntTiles<kBytes, kSteps>[count - 1](tile, groups, rows, part, row);
            });
        });
}

template <class Stream>
void expanded_rows_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) uint8_t expanded[kExpandedBytes];
    walk_stretches<Stream>(
        w, part, kFloatTileBlocks,
        [&](Stream& stream, int64_t, int64_t begin, int64_t end) { expand_float(stream, end - begin, expanded); },
        [&](int64_t panel, int64_t begin, int64_t end, float (*totals)[kPanelOutputs], const NextValues& next) {
            const Tile tile(w, expanded, panel, begin, end, totals);
            for_groups_of_rows(part, kFloatTileRows, next,
                               [&](int64_t row, int64_t count) { kFloatTiles[count - 1](tile, rows, part, row); });
        });
}

template <class Stream, int kSteps>
void one_row_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel)
        walk_int<Stream, kSteps>(w, rows, part, panel);
}

template <class Stream>
void many_rows_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin <= Stream::kFewRows)
        walk_rows(w, rows, part, kRowsInt<Stream>);
    else if (w.steps_per_segment == 16)
        expanded_rows_int<Stream, 16>(w, rows, part);
    else
        expanded_rows_int<Stream, 8>(w, rows, part);
}

template <class Stream>
void multiply_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin > 1)
        many_rows_int<Stream>(w, rows, part);
    else if (w.steps_per_segment == 16)
        one_row_int<Stream, 16>(w, rows, part);
    else
        one_row_int<Stream, 8>(w, rows, part);
}

template <class Stream>
void one_row_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    int64_t panel = part.panel_begin;
    for (; panel + 2 <= part.panel_end; panel += 2) walk_float<Stream, 2>(w, rows, part, panel);
    if (panel < part.panel_end) walk_float<Stream, 1>(w, rows, part, panel);
}

template <class Stream>
void many_rows_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin <= Stream::kFewRows)
        walk_rows(w, rows, part, kRowsFloat<Stream>);
    else
        expanded_rows_float<Stream>(w, rows, part);
}

template <class Stream>
void multiply_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (part.row_end - part.row_begin > 1)
        many_rows_float<Stream>(w, rows, part);
    else
        one_row_float<Stream>(w, rows, part);
}

}  // namespace rarefy::matmul::avx2
