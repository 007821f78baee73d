// Vectors of 16 outputs, prefetching, scales and zero points: what all AVX-512 kernels use. This header and those that
// include it belong to files with AVX-512 flags alone.
#pragma once

#include <immintrin.h>

#include "matmul/kernels.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace rarefy::matmul::avx512 {

// Whether kRows rows fetch ahead. More than a few compute for so long between two reads that all processors gain.
template <int kRows>
inline bool fetches() {
    constexpr int kFewRows = 3;
    return kRows > kFewRows || fetches_ahead;
}

// Fetches what a stream reads kAhead bytes later. A page ahead is measured to be best; the hardware fetches dense
// streams well by itself, but loses the thread of values whose number the mask decides.
template <int kAhead>
__attribute__((always_inline)) inline void prefetch(const void* at, int64_t num_bytes) {
    const auto* from = static_cast<const uint8_t*>(at);
    for (int64_t offset = 0; offset < num_bytes; offset += 64)
        _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + offset), _MM_HINT_T0);
}

// Fetches an output that is stored soon, for writing: a store to a line that is not this core's own holds up those
// behind it.
inline void fetch_output(const float* y) { __asm__ volatile("prefetchw %0" : : "m"(*y)); }

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// What is read once and in the order of memory: gcc would read it with each instruction that uses it, and what lies
// behind before what lies in front, which one row waits for.
inline __m512i in_order(__m512i bytes) {
    __asm__ volatile("" : "+v"(bytes));
    return bytes;
}

// How far ahead one row asks for what it computes with for long. Processors that fetch best alone bring lines into the
// L2 cache in time, but not always into L1, where arithmetic waits for them, most of all beside others on the same
// core. Asking for some that they have begun to fetch helps; from half a kilobyte on it holds them up.
constexpr int kNear = 256;
inline int64_t near_or_far() { return fetches_ahead ? 4096 : kNear; }

// Asks for a line just where this stands: gcc gathers other prefetches at the beginning of a segment, and such a burst
// reaches farther than the processor has begun to fetch.
__attribute__((always_inline)) inline void prefetch_in_order(const uint8_t* line) {
    __asm__ volatile("prefetcht0 %0" : : "m"(*line));
}

// 64 bytes of a stream that one row reads in the order of memory.
__attribute__((always_inline)) inline __m512i load_next(const uint8_t* from, int64_t ahead) {
    prefetch_in_order(from + ahead);
    return in_order(load(from));
}

// Zero, but the compiler does not know. Where a mask zeroes the other elements, vpexpand still waits for the old value
// of its register on Zen 5; merged into this it does not.
inline __m512i unknown_zero() {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

// Sums of 32 bits. As __m512i, which is 8 times 64 bits to gcc, an accumulator would change its type in every
// iteration, and gcc then keeps two registers or the stack for it.
using Sums = int __attribute__((vector_size(64)));

inline Sums dot_4(Sums sums, __m512i codes, __m512i q) {
    return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, q));
}
inline __m512 to_floats(Sums sums) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sums)); }
inline Sums times(__m512i a, int32_t b) { return reinterpret_cast<Sums>(_mm512_mullo_epi32(a, _mm512_set1_epi32(b))); }

inline __m512i broadcast_4(const int8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

inline __m512 widen_bf16(const void* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512i widen_bytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// 16 bytes, each four times, one after the other.
inline __m512i quadruple_bytes(const uint8_t* from) {
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
        _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                         0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0));
}

inline uint64_t load_u64(const uint8_t* from) {
    uint64_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);  // in any alignment
    return bits;
}

// The same, read once: gcc would read bits that are a mask and are counted too a second time to count them. One row
// has no load to spare beside its unaligned values; many rows have, and wait longer for a count that comes by way of a
// mask register.
template <bool kOnce>
inline uint64_t load_mask(const uint8_t* from) {
    __mmask64 mask = load_u64(from);
    if constexpr (kOnce) __asm__("" : "+k"(mask));
    return mask;
}

// The lanes of a panel that are outputs.
inline __mmask16 output_lanes(const PanelWeights& w, int64_t panel) {
    const int64_t left = w.num_outputs - panel * kPanelOutputs;
    return static_cast<__mmask16>(left >= kPanelOutputs ? 0xffff : (1 << left) - 1);
}

// The outputs of one row and panel in y, without the lanes that are padding.
struct Lanes {
    float* y;
    __mmask16 lanes;
    Lanes(const PanelWeights& w, int64_t panel, float* where) : y(where), lanes(output_lanes(w, panel)) {}
    __m512 load_unless(bool zero) const { return _mm512_maskz_loadu_ps(zero ? 0 : lanes, y); }
    __m512 load(int64_t offset) const { return _mm512_maskz_loadu_ps(lanes, y + offset); }
    void store(__m512 values, int64_t offset = 0) const { _mm512_mask_storeu_ps(y + offset, lanes, values); }
};

// What sums of codes are multiplied by to become outputs: nothing more until they are finished.
inline __m512 output_factor(const PanelWeights& w, int64_t panel, bool finished) {
    if (w.output_scales == nullptr || !finished) return _mm512_set1_ps(1.0f);
    return widen_bf16(w.output_scales + panel * kPanelOutputs);
}

// Calls add(Scaling()), where Scaling::factor says what the sums of a segment are multiplied by. Chosen once for many
// sums, for the compiler would choose for each.
struct WithScales {
    static __m512 factor(__m512 row_scale, __m512 scales) { return _mm512_mul_ps(row_scale, scales); }
};
struct ScalesLast {
    static __m512 factor(__m512 row_scale, __m512) { return row_scale; }
};
template <class Add>
__attribute__((always_inline)) inline void add_scaled(const PanelWeights& w, Add add) {
    if (w.output_scales != nullptr)
        add(ScalesLast());
    else
        add(WithScales());
}

inline void widen_pairs(__m512i pairs, __m512& even, __m512& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Two columns of bfloat16 in every lane, weights and activations: sums += odd * odd, then += even * even.
inline __m512 add_pairs(__m512 sums, __m512i weights, __m512i x) {
#if RAREFY_PASS_AVX512_BF16
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
#else
    __m512 even_weights, odd_weights, even_x, odd_x;
    widen_pairs(weights, even_weights, odd_weights);
    widen_pairs(x, even_x, odd_x);
    return _mm512_fmadd_ps(even_x, even_weights, _mm512_fmadd_ps(odd_x, odd_weights, sums));
#endif
}

inline __m512i broadcast_pair(const uint16_t* from) {
    int32_t pair;
    __builtin_memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
}

// Scales and zero points of the group that a segment lies in, walking the segments in order.
struct Groups {
    const PanelWeights& w;
    int64_t place, left;
    Groups(const PanelWeights& weights, int64_t segment)
        : w(weights),
          place(segment / weights.segments_per_group * weights.group_stride),
          left(weights.segments_per_group - segment % weights.segments_per_group) {}
    // True when the next segment lies in another group.
    bool advance() {
        if (--left != 0) return false;
        left = w.segments_per_group;
        place += w.group_stride;
        return true;
    }
    int64_t place_of(int64_t panel) const { return w.group_place(panel, 0) + place; }
    // Fetches what stands a kilobyte later, or another number of bytes.
    void fetch(int64_t panel, int64_t ahead = 1024) const { prefetch<0>(w.scales_at(place_of(panel) + ahead), 64); }
    __m512 scales(int64_t panel) const { return widen_bf16(w.scales_at(place_of(panel))); }
    __m512i zero_points(int64_t panel) const {
        return w.zero_points == nullptr ? _mm512_set1_epi32(w.zero_point)
                                        : widen_bytes(w.zero_points + place_of(panel));
    }
};

// Zero points (one per lane) in every byte; for 4-bit codes in both nibbles.
template <class Stream>
inline __m512i pruned_codes(__m512i zero_points) {
    return _mm512_mullo_epi32(zero_points, _mm512_set1_epi32(Stream::kOddShift == 4 ? 0x11111111 : 0x01010101));
}

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

}  // namespace rarefy::matmul::avx512
