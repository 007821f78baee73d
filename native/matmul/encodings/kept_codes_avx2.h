// What all codes (dense_int8.cc, dense_int4.cc) keep, found in a call with many rows: every 8 codes of an output are
// compressed by a table of shuffles, for AVX2 has no vpcompressb.
#pragma once

#include "matmul/encodings/lanes_avx2.h"

namespace rarefy::matmul::avx2 {

// The places of the set bits of a byte, in order; 0 behind the last.
struct SetBits {
    uint64_t places[256];
};

constexpr SetBits make_set_bits() {
    SetBits bits{};
    for (int mask = 0; mask < 256; ++mask) {
        int count = 0;
        for (int bit = 0; bit < 8; ++bit)
            if (mask >> bit & 1) bits.places[mask] |= static_cast<uint64_t>(bit) << (8 * count++);
    }
    return bits;
}

alignas(64) inline constexpr SetBits kSetBits = make_set_bits();

// 16 x 16 elements of 4 bytes, rows and columns exchanged.
inline void transpose_lanes(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    for (int row = 0; row < 16; row += 8) {
        for (int column = 0; column < 16; column += 8) {
            __m256 some[8];
            UNROLL for (int i = 0; i < 8; ++i) {
                some[i] = _mm256_castsi256_ps(load(from + (row + i) * from_stride + 4 * column));
            }
            transpose_floats(some);
            UNROLL for (int i = 0; i < 8; ++i) {
                store(to + (column + i) * to_stride + 4 * row, _mm256_castps_si256(some[i]));
            }
        }
    }
}

template <int kBits, int kColumns>
struct CodeSource {
    static constexpr int kSteps = kColumns / 4;
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel, int64_t) { values = w.values + w.value_offsets[panel]; }
    void next(KeptFiller<kBits / 4>& filler) {
        // Exclusive-ored with the zero points, what is zero becomes 0; of each output side by side.
        alignas(32) uint8_t steps[16][64], codes[16][64 + 8], columns[16][64 + 8];
        __builtin_memset(codes, 0, sizeof(codes));
        __builtin_memset(columns, 0, sizeof(columns));
        if constexpr (kSteps < 16) __builtin_memset(steps[kSteps], 0, (16 - kSteps) * sizeof(steps[0]));
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256i zero_points = filler.zero_points(half);
            for (int step = 0; step < kSteps; ++step) {
                __m256i some;
                if (kBits == 8) {
                    some = load(values + 64 * step + 32 * half);
                } else {
                    const __m256i both = load(values + 64 * (step / 2) + 32 * half);
                    some = _mm256_and_si256(step % 2 == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
                }
                store(steps[step] + 32 * half, _mm256_xor_si256(some, zero_points));
            }
        }
        values += kSteps * 8 * kBits;
        alignas(32) uint8_t rows[16][64];
        transpose_lanes(steps[0], 64, rows[0], 64);
        int most = 0;
        for (int output = 0; output < kPanelOutputs; ++output) {
            int count = 0;
            for (int first = 0; first < kColumns; first += 32) {
                const __m256i zeros = _mm256_cmpeq_epi8(load(rows[output] + first), _mm256_setzero_si256());
                auto kept = ~static_cast<uint32_t>(_mm256_movemask_epi8(zeros));
                UNROLL for (int i = 0; i < 4; ++i) {
                    const auto* some = reinterpret_cast<const __m128i*>(rows[output] + first + 8 * i);
                    const __m128i places = _mm_cvtsi64_si128(static_cast<int64_t>(kSetBits.places[kept & 0xff]));
                    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes[output] + count),
                                     _mm_shuffle_epi8(_mm_loadl_epi64(some), places));
                    _mm_storel_epi64(reinterpret_cast<__m128i*>(columns[output] + count),
                                     _mm_add_epi8(places, _mm_set1_epi8(static_cast<char>(first + 8 * i))));
                    count += _mm_popcnt_u32(kept & 0xff);
                    kept >>= 8;
                }
            }
            _mm_storel_epi64(reinterpret_cast<__m128i*>(codes[output] + count), _mm_setzero_si128());
            most = count > most ? count : most;
        }
        alignas(32) uint8_t code_steps[16][64], column_steps[16][64];
        transpose_lanes(codes[0], sizeof(codes[0]), code_steps[0], 64);
        transpose_lanes(columns[0], sizeof(columns[0]), column_steps[0], 64);
        for (int step = 0; step < (most + 3) / 4; ++step) {
            __m256i some[kHalves];
            UNROLL for (int half = 0; half < kHalves; ++half) {
                some[half] = _mm256_xor_si256(load(code_steps[step] + 32 * half), filler.zero_points(half));
            }
            filler.add(column_steps[step], some);
        }
    }
};

}  // namespace rarefy::matmul::avx2
