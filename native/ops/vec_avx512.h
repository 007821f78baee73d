// Vec: 16 floats. Included only by files named avx512.cc.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC warns about its own intrinsics, which start from undefined registers on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#include <cstdint>

namespace rarefy::ops::avx512 {

constexpr int kLanes = 16;
constexpr int kColumns = 4;  // vectors that the attention products keep per row: 4 rows x 4 vectors of 32 registers

struct Vec {
    __m512 v;
};

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }  // 0 <= n < 16

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }  // zeros above n
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline Vec set1(float a) { return {_mm512_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// The same, in a register that is used again: compilers put loads into the instructions that need them, each time anew.
inline Vec held(Vec a) {
    __asm__("" : "+v"(a.v));
    return a;
}
inline Vec permute(Vec a, const int32_t* lanes) {  // lane i of the result is lane lanes[i] of a
    return {_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), a.v)};
}
// c where a < b, else d.
inline Vec where_less(Vec a, Vec b, Vec c, Vec d) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), d.v, c.v)};
}
// 2^n for whole n in [-126, 127].
inline Vec exp2_whole(Vec n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float square_root(float a) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a))); }

}  // namespace rarefy::ops::avx512
