// The tile of the Gram matrix with vdpbf16ps. This file is compiled for AVX-512, its functions for AVX512_BF16 too.
#include <immintrin.h>

#include "gram/gram.h"

#define RAREFY_BF16 __attribute__((target("avx512bf16")))

namespace rarefy::gram::avx512 {
namespace {

constexpr int kVectors = kPanel / 16;

inline __mmask16 first(int64_t count) {
    return count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>(count <= 0 ? 0 : (1u << count) - 1);
}

}  // namespace

void pack_panel(const uint16_t* x, int64_t num_tokens, int64_t num_features, int64_t first_column, uint32_t* packed) {
    for (int64_t token = 0; token < num_tokens; token += 2, packed += kPanel) {
        const uint16_t* even = x + token * num_features + first_column;
        const bool paired = token + 1 < num_tokens;
        for (int v = 0; v < kVectors; ++v) {
            const __mmask16 mask = first(num_features - first_column - 16 * v);
            __m512i pair = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + 16 * v));
            if (paired) {
                const __m256i odd = _mm256_maskz_loadu_epi16(mask, even + num_features + 16 * v);
                pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
            }
            _mm512_storeu_si512(packed + 16 * v, pair);
        }
    }
}

RAREFY_BF16 void add_tile(const uint32_t* left, const uint32_t* right, int64_t num_pairs, float* total, int64_t stride,
                          int rows, int columns) {
    __m512 sum[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < num_pairs; ++pair, left += kPanel, right += kPanel) {
        __m512bh b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = (__m512bh)_mm512_loadu_si512(right + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[r]));
            for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a, b[v]);
        }
    }
    for (int r = 0; r < kTileRows && r < rows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            const __mmask16 mask = first(columns - 16 * v);
            float* place = total + r * stride + 16 * v;
            _mm512_mask_storeu_ps(place, mask, _mm512_add_ps(sum[r][v], _mm512_maskz_loadu_ps(mask, place)));
        }
    }
}

}  // namespace rarefy::gram::avx512
