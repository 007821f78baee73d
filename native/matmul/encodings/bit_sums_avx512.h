// Sums of activations for weights of one bit: what four columns add up to under each of the 16 patterns of signs, so
// that two permutations of a vector of codes add up 256 weights. 32 bytes for every 4 columns of a row.
#pragma once

#include "matmul/vectors_avx512.h"

namespace rarefy::matmul::avx512 {

// A block of 64 columns in quarters, the first two of its first half. A quarter holds the steps 0, 1, 4 and 5 of its
// half, or 2, 3, 6 and 7: whose codes in the encoding `binary` are the bits 0, 1, 4 and 5 of a byte, or those shifted
// to the left by two. Column j of these four steps has sums of its own: where the bits are 16 * u + l, their sum is at
// 16 * u + 4 * j + l. It is of q where a bit is 1 and of -q where it is 0, and kBitSumStart more; its 6 lower bits
// and its 4 upper ones are apart, so that the sums of a whole block fit in bytes.
struct BitSums {
    alignas(64) uint8_t low[4][64], high[4][64];
};
constexpr int kBitSumStart = 512, kLowBits = 6;
static_assert(kBitSumStart > 4 * 127 && (2 * kBitSumStart >> kLowBits) * 4 <= 256 && 4 << kLowBits <= 256);

// Vectors that make them. Lane t of signs and starts is of the pattern whose bits are those of t; columns: where the
// four of each sum stand in a block.
struct BitPatterns {
    alignas(64) int8_t signs[16][4];
    alignas(64) int32_t starts[16];  // of sums of q + 128
    alignas(64) uint8_t columns[4][4][4];
    constexpr BitPatterns() : signs(), starts(), columns() {
        constexpr int kSteps[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};
        for (int t = 0; t < 16; ++t) {
            starts[t] = kBitSumStart;
            for (int k = 0; k < 4; ++k) {
                signs[t][k] = static_cast<int8_t>((t >> k & 1) * 2 - 1);
                starts[t] -= 128 * signs[t][k];
            }
        }
        for (int quarter = 0; quarter < 4; ++quarter)
            for (int j = 0; j < 4; ++j)
                for (int k = 0; k < 4; ++k)
                    columns[quarter][j][k] = static_cast<uint8_t>(quarter / 2 * 32 + kSteps[quarter % 2][k] * 4 + j);
    }
};
inline constexpr BitPatterns kBitPatterns;

inline void make_bit_sums(const int8_t* q, int64_t num_blocks, BitSums* sums) {
    const __m512i columns = load(kBitPatterns.columns), signs = load(kBitPatterns.signs);
    const __m512i starts = load(kBitPatterns.starts), lower = _mm512_set1_epi16((1 << kLowBits) - 1);
    for (int64_t block = 0; block < num_blocks; ++block, q += kBlockInputs, ++sums) {
        alignas(64) int32_t fours[4][4];
        const __m512i raised = _mm512_xor_si512(load(q), _mm512_set1_epi8(-128));
        _mm512_store_si512(fours, _mm512_permutexvar_epi8(columns, raised));
        UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
            __m512i of[4];
            UNROLL for (int j = 0; j < 4; ++j) {
                of[j] = _mm512_dpbusd_epi32(starts, _mm512_set1_epi32(fours[quarter][j]), signs);
            }
            // Packing takes quarters of vectors in turns, hence the order.
            const __m512i first = _mm512_packus_epi32(of[0], of[1]), second = _mm512_packus_epi32(of[2], of[3]);
            _mm512_store_si512(sums->low[quarter],
                               _mm512_packus_epi16(_mm512_and_si512(first, lower), _mm512_and_si512(second, lower)));
            _mm512_store_si512(sums->high[quarter], _mm512_packus_epi16(_mm512_srli_epi16(first, kLowBits),
                                                                        _mm512_srli_epi16(second, kLowBits)));
        }
    }
}

}  // namespace rarefy::matmul::avx512
