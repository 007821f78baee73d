// Four vectors of 4 outputs, scales and zero points: what all NEON kernels use. This header and those that include it
// belong to files with the flags of the dot product (asimddp) alone.
#pragma once

#include <arm_neon.h>

#include "matmul/kernels.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace rarefy::matmul::neon {

constexpr int kQuarters = 4;

using Bytes = uint8x16_t;    // 4 outputs by 4 codes
using Words = uint32x4_t;    // 4 outputs
using Floats = float32x4_t;  // 4 outputs

inline Bytes load(const uint8_t* from) { return vld1q_u8(from); }

inline uint32_t load_u32(const void* from) {
    uint32_t bits;
    __builtin_memcpy(&bits, from, 4);
    return bits;
}

inline Floats widen_bf16(const uint16_t* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }

inline void widen_pairs(Bytes pairs, Floats& even, Floats& odd) {
    const Words words = vreinterpretq_u32_u8(pairs);
    even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
}

// The outputs of one row and panel in y, without the lanes that are padding.
struct Outputs {
    float* y;
    int64_t count;
    Outputs(const PanelWeights& w, const Part& part, int64_t row, int64_t panel)
        : y(part.y + row * part.y_stride + panel * kPanelOutputs), count(w.num_outputs - panel * kPanelOutputs) {
        if (count > kPanelOutputs) count = kPanelOutputs;
    }
    void load(Floats (&values)[kQuarters]) const {
        float all[kPanelOutputs] = {};
        __builtin_memcpy(all, y, static_cast<unsigned long>(count) * 4);
        UNROLL for (int i = 0; i < kQuarters; ++i) { values[i] = vld1q_f32(all + 4 * i); }
    }
    void store(const Floats (&values)[kQuarters]) const {
        float all[kPanelOutputs];
        UNROLL for (int i = 0; i < kQuarters; ++i) { vst1q_f32(all + 4 * i, values[i]); }
        __builtin_memcpy(y, all, static_cast<unsigned long>(count) * 4);
    }
};

// What sums of codes are multiplied by to become outputs: nothing more until they are finished.
inline Floats output_factor(const PanelWeights& w, int64_t panel, int quarter, bool finished) {
    if (w.output_scales == nullptr || !finished) return vdupq_n_f32(1.0f);
    return widen_bf16(w.output_scales + panel * kPanelOutputs + 4 * quarter);
}

// Scales and zero points of the group that a segment lies in, walking the segments in order.
struct Groups {
    const PanelWeights& w;
    int64_t group, left;
    Groups(const PanelWeights& weights, int64_t segment)
        : w(weights),
          group(segment / weights.segments_per_group),
          left(weights.segments_per_group - segment % weights.segments_per_group) {}
    // True when the next segment lies in another group.
    bool advance() {
        if (--left != 0) return false;
        left = w.segments_per_group;
        ++group;
        return true;
    }
    Floats scales(int64_t panel, int quarter) const {
        return widen_bf16(w.scales_at(w.group_place(panel, group)) + 4 * quarter);
    }
    int32x4_t zero_points(int64_t panel, int quarter) const {
        if (w.zero_points == nullptr) return vdupq_n_s32(w.zero_point);
        const uint32_t four = load_u32(w.zero_points + w.group_place(panel, group) + 4 * quarter);
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
    }
    template <class Stream>
    void give_zero_points(Stream& stream, int64_t panel) const {
        Bytes codes[kQuarters];
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            codes[i] = vreinterpretq_u8_s32(vmulq_n_s32(zero_points(panel, i), 0x01010101));
        }
        stream.set_zero_points(codes);
    }
};

// What the sums over half a block of floats are multiplied by: 1 where there are no scales.
inline Floats half_block_scales(const PanelWeights& w, int64_t panel, int64_t half_block, int quarter) {
    if (w.scales == nullptr) return vdupq_n_f32(1.0f);
    return Groups(w, half_block * 8 / w.steps_per_segment).scales(panel, quarter);
}
// Without scales sums go on to the end of the block.
inline bool sums_go_on(const PanelWeights& w, int half_of_block) { return half_of_block == 0 && w.scales == nullptr; }

// Tells a stream that the next columns are a segment, or a block of floats, where it wants to know.
template <class Stream>
inline auto begin_segment(Stream& stream, int num_columns) -> decltype(stream.begin_segment(num_columns)) {
    stream.begin_segment(num_columns);
}
template <class... Others>
inline void begin_segment(const Others&...) {}

template <int kSteps>
inline int32_t segment_sum(const int32_t* half_sums, int64_t segment) {
    return kSteps == 8 ? half_sums[segment] : half_sums[2 * segment] + half_sums[2 * segment + 1];
}

// The dot product multiplies signed bytes alone. Codes below 128 are the same when signed; larger ones meet it with
// 128 subtracted, which the zero point makes good.
template <bool kSmallCodes>
constexpr int32_t kSubtracted = kSmallCodes ? 0 : 128;

template <bool kSmallCodes>
inline int8x16_t as_signed(Bytes codes) {
    return vreinterpretq_s8_u8(kSmallCodes ? codes : veorq_u8(codes, vdupq_n_u8(128)));
}

}  // namespace rarefy::matmul::neon
