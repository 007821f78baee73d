// Exchanges rows and columns of 16 x 16 elements of 32 bits.
#pragma once

#include "matmul/vectors_avx512.h"

namespace rarefy::matmul::avx512 {

inline void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16], fours[16], eights[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Each 128 bits of fours[4 * k + column % 4] are column, column + 4, ... of the rows 4 * k to 4 * k + 3.
    UNROLL for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        eights[i] = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        eights[4 + i] = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
        eights[8 + i] = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
        eights[12 + i] = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(eights[i], eights[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(eights[i], eights[8 + i], 0xdd);
        rows[4 + i] = _mm512_shuffle_i32x4(eights[4 + i], eights[12 + i], 0x88);
        rows[12 + i] = _mm512_shuffle_i32x4(eights[4 + i], eights[12 + i], 0xdd);
    }
}

}  // namespace rarefy::matmul::avx512
