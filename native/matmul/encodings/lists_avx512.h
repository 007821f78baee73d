// What the AVX-512 kernels of lists share: those of N:M weights (nm_lists_avx512.h), and those that many rows make of
// masks (mask_lists_avx512.h).
#pragma once

#include "matmul/core_avx512.h"

namespace rarefy::matmul::avx512 {

// Zero points, one per lane, in every byte.
inline __m512i every_byte(__m512i lanes) { return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101)); }

// Entries 4s to 4s + 3 of 16 outputs as steps[s], from the lists of the outputs, list_of(output): of each the first
// 16 * kQuarters bytes.
template <int kQuarters, class ListOf>
inline void steps_of_lists(ListOf list_of, __m512i* steps) {
    // rows[quarter][i]: entries 16 * quarter on of outputs i, 4 + i, 8 + i, 12 + i
    __m512i rows[kQuarters][4];
    UNROLL for (int i = 0; i < 4; ++i) {
        const __m512i a = list_of(i), b = list_of(4 + i), c = list_of(8 + i), d = list_of(12 + i);
        if constexpr (kQuarters == 1) {
            const __m256i ab = _mm256_inserti128_si256(_mm512_castsi512_si256(a), _mm512_castsi512_si128(b), 1);
            const __m256i cd = _mm256_inserti128_si256(_mm512_castsi512_si256(c), _mm512_castsi512_si128(d), 1);
            rows[0][i] = _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
        } else {
            const __m512i ab = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
            const __m512i cd = _mm512_inserti64x4(c, _mm512_castsi512_si256(d), 1);
            rows[0][i] = _mm512_shuffle_i64x2(ab, cd, 0x88);
            rows[1][i] = _mm512_shuffle_i64x2(ab, cd, 0xdd);
        }
        if constexpr (kQuarters == 4) {
            const __m512i ab = _mm512_shuffle_i64x2(a, b, 0xee), cd = _mm512_shuffle_i64x2(c, d, 0xee);
            rows[2][i] = _mm512_shuffle_i64x2(ab, cd, 0x88);
            rows[3][i] = _mm512_shuffle_i64x2(ab, cd, 0xdd);
        }
    }
    UNROLL for (int quarter = 0; quarter < kQuarters; ++quarter) {
        const __m512i* r = rows[quarter];
        const __m512i low_01 = _mm512_unpacklo_epi32(r[0], r[1]), low_23 = _mm512_unpacklo_epi32(r[2], r[3]);
        const __m512i high_01 = _mm512_unpackhi_epi32(r[0], r[1]), high_23 = _mm512_unpackhi_epi32(r[2], r[3]);
        steps[4 * quarter] = _mm512_unpacklo_epi64(low_01, low_23);
        steps[4 * quarter + 1] = _mm512_unpackhi_epi64(low_01, low_23);
        steps[4 * quarter + 2] = _mm512_unpacklo_epi64(high_01, high_23);
        steps[4 * quarter + 3] = _mm512_unpackhi_epi64(high_01, high_23);
    }
}

}  // namespace rarefy::matmul::avx512
