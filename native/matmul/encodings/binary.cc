// Binary weights, as codes 0 and 2 with zero point 1. 2 vectors per block: step s is bit s % 8 of vector s / 8.
#include "matmul/encodings/bits.h"

namespace rarefy::matmul {

constexpr int kBinaryHalfBytes = 64;

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static uint8_t code(const uint8_t* half, int step, int byte) {
        return static_cast<uint8_t>((half[byte] >> step & 1) * 2);
    }
    static void place(uint8_t* half, int step, int byte, uint8_t bit) {
        half[byte] |= static_cast<uint8_t>(bit << step);
    }
};

}  // namespace

void packers::binary(Packing& packing) {
    require(packing.view.zero_points == nullptr, "unexpected zero_points");
    packing.view.zero_point = 1;
    pack_runs<Bits, 1>(packing);
}

void reference::binary(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        UNROLL for (int i = 0; i < 64; i += 32) {
            const __m256i bits = load(half + i);
            store(out + i, _mm256_and_si256(_mm256_slli_epi16(bits, 1), bytes(2)));
            store(out + 64 + i, _mm256_and_si256(bits, bytes(2)));
            UNROLL for (int step = 2; step < kHalfSteps; ++step) {
                store(out + 64 * step + i, _mm256_and_si256(_mm256_srli_epi16(bits, step - 1), bytes(2)));
            }
        }
    }
};

}  // namespace

void binary(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<BitStream<Bits>>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static constexpr int kSums = 4;
    static constexpr int kShifts[kSums] = {0, 1, 2, 3};
    static void dot(const uint8_t* half, const __m512i (&q)[kHalfSteps], Sums (&sums)[kSums]) {
        // Step s stands where code 2 is shifted left by s - 1 bits; the others are brought to such places.
        const __m512i bits = load(half);
        const __m512i late = _mm512_srli_epi16(bits, 4), first = _mm512_slli_epi16(bits, 4);
        UNROLL for (int k = 0; k < kSums; ++k) {
            sums[k] = dot_4(sums[k], _mm512_and_si512(bits, bytes(2 << k)), q[1 + k]);
        }
        UNROLL for (int k = 0; k < 3; ++k) {
            sums[k] = dot_4(sums[k], _mm512_and_si512(late, bytes(2 << k)), q[5 + k]);
        }
        sums[3] = dot_4(sums[3], _mm512_and_si512(first, bytes(16)), q[0]);
    }
    static void expand(const uint8_t* half, uint8_t* out) {
        const __m512i bits = load(half);
        _mm512_store_si512(out, _mm512_and_si512(_mm512_slli_epi16(bits, 1), bytes(2)));
        UNROLL for (int step = 1; step < kHalfSteps; ++step) {
            const __m512i moved = _mm512_srli_epi16(bits, static_cast<unsigned>(step - 1));
            _mm512_store_si512(out + 64 * step, _mm512_and_si512(moved, bytes(2)));
        }
    }
};

}  // namespace

void binary(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_bits<Bits>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        Bytes bits = load(half);
        UNROLL for (int step = 0; step < kHalfSteps; ++step) {
            vst1q_u8(out + 64 * step, vandq_u8(vshlq_n_u8(bits, 1), vdupq_n_u8(2)));
            bits = vshrq_n_u8(bits, 1);
        }
    }
};

}  // namespace

void binary(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<BitStream<Bits>>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::binary(const SampleSpec& spec) {
    SampleSpec symmetric = spec;
    symmetric.symmetric = true;
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    maker.add_grid(sample, symmetric, 1);
    SampleArray codes{"codes", Element::u8, {}};
    for (int64_t row = 0; row < spec.num_outputs; ++row) {
        for (int64_t column = 0; column < spec.num_inputs; ++column) {
            if (column % 8 == 0) codes.bytes.push_back(0);
            const int bit = maker.below(2);
            sample.levels.push_back(2 * bit - 1);
            codes.bytes.back() |= static_cast<uint8_t>(bit << column % 8);
        }
    }
    sample.arrays.push_back(codes);
    return sample;
}

}  // namespace rarefy::matmul

#endif
