// Vec: 4 floats. Included only by files named neon.cc.
#pragma once

#include <arm_neon.h>
#include <cstdint>

namespace rarefy::ops::neon {

constexpr int kLanes = 4;
constexpr int kColumns = 4;  // vectors that the attention products keep per row: 4 rows x 4 vectors of 32 registers

struct Vec {
    float32x4_t v;
};

inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load_n(const float* p, int64_t n) {  // zeros above n
    float lanes[kLanes] = {};
    __builtin_memcpy(lanes, p, static_cast<unsigned long>(n) * sizeof(float));
    return {vld1q_f32(lanes)};
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store_n(float* p, Vec a, int64_t n) {
    float lanes[kLanes];
    vst1q_f32(lanes, a.v);
    __builtin_memcpy(p, lanes, static_cast<unsigned long>(n) * sizeof(float));
}
inline Vec set1(float a) { return {vdupq_n_f32(a)}; }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// The same, in a register that is used again: compilers put loads into the instructions that need them, each time anew.
inline Vec held(Vec a) {
    __asm__("" : "+w"(a.v));
    return a;
}
inline Vec permute(Vec a, const int32_t* lanes) {  // lane i of the result is lane lanes[i] of a
    const uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(vld1q_s32(lanes)), 0x04040404);
    const uint8x16_t bytes = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100)));
    return {vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a.v), bytes))};
}
// c where a < b, else d.
inline Vec where_less(Vec a, Vec b, Vec c, Vec d) { return {vbslq_f32(vcltq_f32(a.v, b.v), c.v, d.v)}; }
inline Vec min(Vec a, Vec b) { return where_less(a, b, a, b); }  // b where either is NaN
inline Vec max(Vec a, Vec b) { return where_less(b, a, a, b); }  // b where either is NaN
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
// 2^n for whole n in [-126, 127].
inline Vec exp2_whole(Vec n) {
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
}
inline float reduce_add(Vec a) { return vaddvq_f32(a.v); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a.v); }
inline float square_root(float a) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(a)), 0); }

}  // namespace rarefy::ops::neon
