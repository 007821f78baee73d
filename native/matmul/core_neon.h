// What the NEON kernels of all encodings share: register tiles of a few rows by one panel, straight from the packed
// bytes for one row, from expanded codes or floats for many. A step of a panel is four vectors of 4 outputs by 4 codes,
// or by 1 float.
//
// An encoding gives a `Stream` that reads a panel from its start, two steps at a time:
//   void start(w, panel)
//   void begin_segment(int num_columns)    if there is one: comes before the first step of each segment, or block of
//           floats
//   codes:  static constexpr bool kSmallCodes    below 128
//           void set_zero_points(const Bytes (&)[kQuarters])    in every byte; comes before the first step of each
//           group void next(Bytes (&even)[kQuarters], Bytes (&odd)[kQuarters])
//   floats: void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters])
// and its kernel is multiply_int<Stream> or multiply_float<Stream>.
#pragma once

#include "matmul/vectors_neon.h"

namespace rarefy::matmul::neon {

constexpr int kTileRows = 4;    // 16 sums of 32 registers
constexpr int kTileBlocks = 8;  // 32 KiB of expanded floats, 8 KiB of codes

// A stretch of blocks of one panel.
struct Stretch {
    int64_t panel, begin, end;
};

// What `expand` wrote.
template <bool kSmall>
struct ExpandedCodes {
    static constexpr bool kSmallCodes = kSmall;
    const uint8_t* values;
    void set_zero_points(const Bytes (&)[kQuarters]) {}
    void next(Bytes (&even)[kQuarters], Bytes (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            even[i] = load(values + 16 * i);
            odd[i] = load(values + 64 + 16 * i);
        }
        values += 128;
    }
};

struct ExpandedFloats {
    const float* values;
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            even[i] = vld1q_f32(values + 4 * i);
            odd[i] = vld1q_f32(values + kPanelOutputs + 4 * i);
        }
        values += 2 * kPanelOutputs;
    }
};

// The outputs of kRows rows while a stretch is multiplied; they start at 0 with block 0, else at y.
template <int kRows>
inline void load_totals(const PanelWeights& w, const Part& part, const Stretch& stretch, int64_t row,
                        Floats (&totals)[kRows][kQuarters]) {
    UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int i = 0; i < kQuarters; ++i) { totals[r][i] = vdupq_n_f32(0.0f); }
        if (stretch.begin > 0) Outputs(w, part, row + r, stretch.panel).load(totals[r]);
    }
}

template <int kRows>
inline void store_totals(const PanelWeights& w, const Part& part, const Stretch& stretch, int64_t row,
                         Floats (&totals)[kRows][kQuarters]) {
    UNROLL for (int i = 0; i < kQuarters; ++i) {
        const Floats factor = output_factor(w, stretch.panel, i, stretch.end == w.num_blocks);
        UNROLL for (int r = 0; r < kRows; ++r) { totals[r][i] = vmulq_f32(totals[r][i], factor); }
    }
    UNROLL for (int r = 0; r < kRows; ++r) { Outputs(w, part, row + r, stretch.panel).store(totals[r]); }
}

// dots += two steps by 8 activations of each row.
template <bool kSmallCodes, int kRows>
inline void add_pair(const int8_t* q, int64_t stride, const Bytes (&even)[kQuarters], const Bytes (&odd)[kQuarters],
                     int32x4_t (&dots)[kRows][kQuarters]) {
    UNROLL for (int r = 0; r < kRows; ++r) {
        const int8x8_t eight = vld1_s8(q + r * stride);
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            dots[r][i] = vdotq_lane_s32(dots[r][i], as_signed<kSmallCodes>(even[i]), eight, 0);
            dots[r][i] = vdotq_lane_s32(dots[r][i], as_signed<kSmallCodes>(odd[i]), eight, 1);
        }
    }
}

// What the dot products of a segment start from: the zero points' part, and what as_signed subtracts.
template <bool kSmallCodes>
inline int32x4_t start_dot(const Groups& groups, int64_t panel, int quarter, int32_t sum) {
    return vmulq_n_s32(vsubq_s32(vdupq_n_s32(kSubtracted<kSmallCodes>), groups.zero_points(panel, quarter)), sum);
}

template <class Stream, int kRows, int kSteps>
void tile_int(const PanelWeights& w, const Rows& rows, const Part& part, const Stretch& stretch, int64_t row,
              Stream stream) {
    constexpr int kSegments = 16 / kSteps;
    const int8_t* q = rows.q + row * rows.stride + stretch.begin * kBlockInputs;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    Floats totals[kRows][kQuarters];
    load_totals(w, part, stretch, row, totals);
    Groups groups(w, stretch.begin * kSegments);
    bool new_group = true;
    for (int64_t segment = stretch.begin * kSegments; segment < stretch.end * kSegments; ++segment) {
        if (new_group) groups.give_zero_points(stream, stretch.panel);
        begin_segment(stream, 4 * kSteps);
        int32x4_t dots[kRows][kQuarters];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t sum = segment_sum<kSteps>(half_sums + r * rows.num_blocks * 2, segment);
            UNROLL for (int i = 0; i < kQuarters; ++i) {
                dots[r][i] = start_dot<Stream::kSmallCodes>(groups, stretch.panel, i, sum);
            }
        }
        for (int pair = 0; pair < kSteps / 2; ++pair, q += 8) {
            Bytes even[kQuarters], odd[kQuarters];
            stream.next(even, odd);
            add_pair<Stream::kSmallCodes>(q, rows.stride, even, odd, dots);
        }
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            const Floats scales = groups.scales(stretch.panel, i);
            UNROLL for (int r = 0; r < kRows; ++r) {
                const float row_scale = row_scales[r * rows.num_blocks + segment / kSegments];
                totals[r][i] = vfmaq_f32(totals[r][i], vcvtq_f32_s32(dots[r][i]), vmulq_n_f32(scales, row_scale));
            }
        }
        new_group = groups.advance();
    }
    store_totals(w, part, stretch, row, totals);
}

// sums += two columns by 2 activations of each row.
template <int kRows>
inline void add_pair(const float* x, int64_t stride, const Floats (&even)[kQuarters], const Floats (&odd)[kQuarters],
                     Floats (&sums)[kRows][kQuarters]) {
    UNROLL for (int r = 0; r < kRows; ++r) {
        const float32x2_t two = vld1_f32(x + r * stride);
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            sums[r][i] = vfmaq_lane_f32(sums[r][i], odd[i], two, 1);
            sums[r][i] = vfmaq_lane_f32(sums[r][i], even[i], two, 0);
        }
    }
}

template <class Stream, int kRows>
void tile_float(const PanelWeights& w, const Rows& rows, const Part& part, const Stretch& stretch, int64_t row,
                Stream stream) {
    const float* x = rows.x + row * rows.stride + stretch.begin * kBlockInputs;
    Floats totals[kRows][kQuarters];
    load_totals(w, part, stretch, row, totals);
    for (int64_t block = stretch.begin; block < stretch.end; ++block) {
        begin_segment(stream, kBlockInputs);
        Floats sums[kRows][kQuarters];
        UNROLL for (int r = 0; r < kRows; ++r) {
            UNROLL for (int i = 0; i < kQuarters; ++i) { sums[r][i] = vdupq_n_f32(0.0f); }
        }
        for (int half_of_block = 0; half_of_block < 2; ++half_of_block) {
            for (int pair = 0; pair < kBlockInputs / 4; ++pair, x += 2) {
                Floats even[kQuarters], odd[kQuarters];
                stream.next(even, odd);
                add_pair(x, rows.stride, even, odd, sums);
            }
            if (sums_go_on(w, half_of_block)) continue;
            UNROLL for (int i = 0; i < kQuarters; ++i) {
                const Floats scales = half_block_scales(w, stretch.panel, 2 * block + half_of_block, i);
                UNROLL for (int r = 0; r < kRows; ++r) {
                    totals[r][i] = vfmaq_f32(totals[r][i], sums[r][i], scales);
                    sums[r][i] = vdupq_n_f32(0.0f);
                }
            }
        }
    }
    store_totals(w, part, stretch, row, totals);
}

// Expands blocks [begin, end) of one panel.
template <int kSteps, class Stream>
void expand(const PanelWeights& w, Stream& stream, const Stretch& stretch, uint8_t* out) {
    constexpr int kSegments = 16 / kSteps;
    Groups groups(w, stretch.begin * kSegments);
    bool new_group = true;
    for (int64_t segment = stretch.begin * kSegments; segment < stretch.end * kSegments; ++segment) {
        if (new_group) groups.give_zero_points(stream, stretch.panel);
        begin_segment(stream, 4 * kSteps);
        for (int pair = 0; pair < kSteps / 2; ++pair, out += 128) {
            Bytes even[kQuarters], odd[kQuarters];
            stream.next(even, odd);
            UNROLL for (int i = 0; i < kQuarters; ++i) {
                vst1q_u8(out + 16 * i, even[i]);
                vst1q_u8(out + 64 + 16 * i, odd[i]);
            }
        }
        new_group = groups.advance();
    }
}

template <class Stream>
void expand(Stream& stream, const Stretch& stretch, float* out) {
    for (int64_t pair = 0; pair < (stretch.end - stretch.begin) * kBlockInputs / 2; ++pair, out += 2 * kPanelOutputs) {
        if (pair % (kBlockInputs / 2) == 0) begin_segment(stream, kBlockInputs);
        Floats even[kQuarters], odd[kQuarters];
        stream.next(even, odd);
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            vst1q_f32(out + 4 * i, even[i]);
            vst1q_f32(out + kPanelOutputs + 4 * i, odd[i]);
        }
    }
}

// Calls tile(first row, Count<number of rows>()) for all rows of a part.
template <int kRows>
struct Count {
    static constexpr int value = kRows;
};

template <class Tile>
void for_each_tile(const Part& part, Tile tile) {
    for (int64_t row = part.row_begin; row < part.row_end; row += kTileRows) {
        switch (part.row_end - row) {
            case 1: tile(row, Count<1>()); break;
            case 2: tile(row, Count<2>()); break;
            case 3: tile(row, Count<3>()); break;
            default: tile(row, Count<kTileRows>());
        }
    }
}

template <class Stream, int kSteps>
void multiply_int_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) uint8_t expanded[kTileBlocks * kBlockInputs * kPanelOutputs];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream;
        stream.start(w, panel);
        if (part.row_end - part.row_begin == 1) {
            tile_int<Stream, 1, kSteps>(w, rows, part, {panel, 0, w.num_blocks}, part.row_begin, stream);
            continue;
        }
        for (int64_t begin = 0; begin < w.num_blocks; begin += kTileBlocks) {
            const int64_t end = begin + kTileBlocks < w.num_blocks ? begin + kTileBlocks : w.num_blocks;
            const Stretch stretch{panel, begin, end};
            expand<kSteps>(w, stream, stretch, expanded);
            using Codes = ExpandedCodes<Stream::kSmallCodes>;
            for_each_tile(part, [&](int64_t row, auto count) {
                tile_int<Codes, decltype(count)::value, kSteps>(w, rows, part, stretch, row, Codes{expanded});
            });
        }
    }
}

template <class Stream>
void multiply_int(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        multiply_int_steps<Stream, 16>(w, rows, part);
    else
        multiply_int_steps<Stream, 8>(w, rows, part);
}

template <class Stream>
void multiply_float(const PanelWeights& w, const Rows& rows, const Part& part) {
    alignas(64) float expanded[kTileBlocks * kBlockInputs * kPanelOutputs];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        Stream stream;
        stream.start(w, panel);
        if (part.row_end - part.row_begin == 1) {
            tile_float<Stream, 1>(w, rows, part, {panel, 0, w.num_blocks}, part.row_begin, stream);
            continue;
        }
        for (int64_t begin = 0; begin < w.num_blocks; begin += kTileBlocks) {
            const int64_t end = begin + kTileBlocks < w.num_blocks ? begin + kTileBlocks : w.num_blocks;
            const Stretch stretch{panel, begin, end};
            expand(stream, stretch, expanded);
            for_each_tile(part, [&](int64_t row, auto count) {
                tile_float<ExpandedFloats, decltype(count)::value>(w, rows, part, stretch, row, {expanded});
            });
        }
    }
}

}  // namespace rarefy::matmul::neon
