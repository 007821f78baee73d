// Vec: 4 floats in plain C++, which compilers turn into the baseline vectors of the target (SSE2, NEON). Included only
// by files named ref.cc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace rarefy::ops::ref {

constexpr int kLanes = 4;
constexpr int kColumns = 2;  // vectors that the attention products keep per row

struct Vec {
    float v[kLanes];
};

template <class Function>
inline Vec map(Function function) {
    Vec y;
    for (int i = 0; i < kLanes; ++i) y.v[i] = function(i);
    return y;
}

inline Vec load(const float* p) {
    return map([&](int i) { return p[i]; });
}
inline Vec load_n(const float* p, int64_t n) {  // zeros above n
    return map([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_n(float* p, Vec a, int64_t n) { std::memcpy(p, a.v, static_cast<size_t>(n) * sizeof(float)); }
inline Vec set1(float a) {
    return map([&](int) { return a; });
}
inline Vec operator+(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
}
// Not fused: std::fma is a slow library call where the baseline target has no such instruction.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec min(Vec a, Vec b) {  // b where either is NaN
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec max(Vec a, Vec b) {  // b where either is NaN
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// To the nearest whole number, for |a| < 2^22.
inline Vec round(Vec a) {
    const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no bits for a fraction
    return (a + magic) - magic;
}
inline Vec abs(Vec a) {
    return map([&](int i) { return std::fabs(a.v[i]); });
}
inline Vec held(Vec a) { return a; }
inline Vec permute(Vec a, const int32_t* lanes) {  // lane i of the result is lane lanes[i] of a
    return map([&](int i) { return a.v[lanes[i] & (kLanes - 1)]; });
}
// c where a < b, else d.
inline Vec where_less(Vec a, Vec b, Vec c, Vec d) {
    return map([&](int i) { return a.v[i] < b.v[i] ? c.v[i] : d.v[i]; });
}
// 2^n for whole n in [-126, 127].
inline Vec exp2_whole(Vec n) {
    return map([&](int i) {
        // A NaN may not be converted to an integer; the caller multiplies by a NaN in that case.
        const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
        const int32_t bits = (whole + 127) << 23;
        float y;
        std::memcpy(&y, &bits, sizeof y);
        return y;
    });
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
    float y = a.v[0];
    for (int i = 1; i < kLanes; ++i) y = a.v[i] > y ? a.v[i] : y;
    return y;
}
inline float square_root(float a) { return std::sqrt(a); }

}  // namespace rarefy::ops::ref
