// Two vectors of 8 outputs, scales and zero points: what all AVX2 kernels use. This header and those that include it
// belong to files with AVX2 flags alone. With AVX-VNNI they are compiled a second time, as the namespace avx_vnni
// (CMakeLists.txt), and differ in how codes meet activations.
#pragma once

#include <immintrin.h>

#include "matmul/kernels.h"

#define UNROLL _Pragma("GCC unroll 32")
// Unrolled, gcc puts the additions behind all products, for which there are no registers. vpdpbusd adds by itself.
#if RAREFY_PASS_AVX_VNNI
#define UNROLL_PRODUCTS UNROLL
#else
#define UNROLL_PRODUCTS _Pragma("GCC unroll 1")
#endif

namespace rarefy::matmul::avx2 {

constexpr int kHalves = 2;

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

inline uint64_t load_u64(const uint8_t* from) {
    uint64_t bits;
    __builtin_memcpy(&bits, from, 8);
    return bits;
}

inline uint32_t load_u32(const void* from) {
    uint32_t bits;
    __builtin_memcpy(&bits, from, 4);
    return bits;
}

inline __m256i broadcast_u32(const void* from) { return _mm256_set1_epi32(static_cast<int>(load_u32(from))); }

inline __m256 widen_bf16(const uint16_t* from) {
    const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The lanes of 8 outputs from `output` on that exist, as a mask of AVX.
inline __m256i output_lanes(const PanelWeights& w, int64_t output) {
    const int64_t left = w.num_outputs - output;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left > 8 ? 8 : left < 0 ? 0 : static_cast<int>(left)), lane);
}

inline void widen_pairs(__m256i pairs, __m256& even, __m256& odd) {
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

// What sums of codes are multiplied by to become outputs: nothing more until they are finished.
inline __m256 output_factor(const PanelWeights& w, int64_t panel, int half, bool finished) {
    if (w.output_scales == nullptr || !finished) return _mm256_set1_ps(1.0f);
    return widen_bf16(w.output_scales + panel * kPanelOutputs + 8 * half);
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
    __m256 scales(int64_t panel, int half) const {
        return widen_bf16(w.scales_at(w.group_place(panel, group)) + 8 * half);
    }
    __m256i zero_points(int64_t panel, int half) const {
        if (w.zero_points == nullptr) return _mm256_set1_epi32(w.zero_point);
        const auto* from = reinterpret_cast<const __m128i*>(w.zero_points + w.group_place(panel, group) + 8 * half);
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(from));
    }
    template <class Stream>
    void give_zero_points(Stream& stream, int64_t panel) const {
        __m256i codes[kHalves];
        UNROLL for (int half = 0; half < kHalves; ++half) {
            codes[half] = _mm256_mullo_epi32(zero_points(panel, half), _mm256_set1_epi32(0x01010101));
        }
        stream.set_zero_points(codes);
    }
};

// What the sums over half a block of floats are multiplied by: 1 where there are no scales.
inline __m256 half_block_scales(const PanelWeights& w, int64_t panel, int64_t half_block, int half) {
    if (w.scales == nullptr) return _mm256_set1_ps(1.0f);
    return Groups(w, half_block * 8 / w.steps_per_segment).scales(panel, half);
}
// Without scales sums go on to the end of the block.
inline bool sums_go_on(const PanelWeights& w, int half_of_block) { return half_of_block == 0 && w.scales == nullptr; }

// Fetches a panel's values ahead of the stream that reads them, a block (or a kPieces-th of one) at a time. Where the
// values of a block are depends on a mask; that they are spread evenly is near enough.
template <int kPieces>
struct Ahead {
    const uint8_t* values;
    int64_t num_bytes;  // of a piece
    void start(const PanelWeights& w, int64_t panel) {
        values = w.values + w.value_offsets[panel] + 4096;
        num_bytes = (w.value_offsets[panel + 1] - w.value_offsets[panel]) / (w.num_blocks * kPieces);
    }
    void fetch(int64_t piece) const {
        const auto* from = reinterpret_cast<const char*>(values + piece * num_bytes);
        for (int64_t offset = 0; offset < num_bytes; offset += 64) _mm_prefetch(from + offset, _MM_HINT_T0);
    }
};

template <int kSteps>
inline int32_t segment_sum(const int32_t* half_sums, int64_t segment) {
    return kSteps == 8 ? half_sums[segment] : half_sums[2 * segment] + half_sums[2 * segment + 1];
}

// Sums of a step of codes by four activations, and what they add to the dot products of 32 bits after 8 steps.
#if RAREFY_PASS_AVX_VNNI
constexpr bool kVnni = true;
inline __m256i add_bytes(__m256i sums, __m256i codes, __m256i q) { return _mm256_dpbusd_avx_epi32(sums, codes, q); }
inline __m256i fold(__m256i dots, __m256i sums) { return _mm256_add_epi32(dots, sums); }
#else
constexpr bool kVnni = false;
inline __m256i add_bytes(__m256i sums_16, __m256i codes, __m256i q) {
    return _mm256_add_epi16(sums_16, _mm256_maddubs_epi16(codes, q));
}
inline __m256i fold(__m256i dots, __m256i sums_16) {
    return _mm256_add_epi32(dots, _mm256_madd_epi16(sums_16, _mm256_set1_epi16(1)));
}
#endif
// Adds in the register of the sum: gcc takes the one of the product, and moves it back in every round of a loop.
inline void add_in_place_16(__m256i& sum, __m256i product) { __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product)); }
inline void add_in_place_32(__m256i& sum, __m256i product) { __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product)); }
// Loads once what gcc would load again for every product.
inline __m256i load_once(const void* from) {
    __m256i values = load(from);
    __asm__("" : "+x"(values));
    return values;
}

// Whether codes meet activations as bytes.
template <class Stream>
constexpr bool kAsBytes = kVnni || Stream::kSmallCodes;

inline __m256i low_bytes(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi16(0xff)); }
inline __m256i high_bytes(__m256i codes) { return _mm256_srli_epi16(codes, 8); }

inline __m256i add_int8(__m256i dots, __m256i codes_02, __m256i codes_13, __m256i q_02, __m256i q_13) {
    const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(codes_02, q_02), _mm256_madd_epi16(codes_13, q_13));
    return _mm256_add_epi32(dots, sums);
}

// Exchanges rows and columns of 8 x 8 floats.
inline void transpose_floats(__m256 (&rows)[8]) {
    __m256 pairs[8], fours[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        UNROLL for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
        }
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        rows[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
}

}  // namespace rarefy::matmul::avx2
