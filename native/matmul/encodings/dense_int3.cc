// Dense 3-bit codes. Half a block is 3 vectors, A, B and C, whose bytes hold the codes of the steps 0 to 7 so:
//   bits   7 6        5 4 3   2 1 0
//   A      upper of 6   1       0
//   B      upper of 7   3       2
//   C      lowest of    5       4
//          7 and 6
// so that six steps are one AND away, and the others two operations more.
#include "matmul/encodings/bits.h"

namespace rarefy::matmul {

constexpr int kInt3HalfBytes = 192;

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt3HalfBytes;
    static uint8_t code(const uint8_t* half, int step, int byte) {
        if (step < 6) return half[step / 2 * 64 + byte] >> (step % 2 * 3) & 7;
        const int upper = half[(step - 6) * 64 + byte] >> 6, lowest = half[128 + byte] >> step & 1;
        return static_cast<uint8_t>(upper << 1 | lowest);
    }
    static void place(uint8_t* half, int step, int byte, uint8_t code) {
        if (step < 6) {
            half[step / 2 * 64 + byte] |= static_cast<uint8_t>(code << (step % 2 * 3));
        } else {
            half[(step - 6) * 64 + byte] |= static_cast<uint8_t>(code >> 1 << 6);
            half[128 + byte] |= static_cast<uint8_t>((code & 1) << step);
        }
    }
};

}  // namespace

void packers::dense_int3(Packing& packing) { pack_runs<Bits, 3>(packing); }

void reference::dense_int3(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt3HalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        UNROLL for (int i = 0; i < 64; i += 32) {
            const __m256i a = load(half + i), b = load(half + 64 + i), c = load(half + 128 + i);
            uint8_t* to = out + i;
            store(to, low(a));
            store(to + 64, low(_mm256_srli_epi16(a, 3)));
            store(to + 128, low(b));
            store(to + 192, low(_mm256_srli_epi16(b, 3)));
            store(to + 256, low(c));
            store(to + 320, low(_mm256_srli_epi16(c, 3)));
            store(to + 384, join(a, _mm256_srli_epi16(c, 6)));
            store(to + 448, join(b, _mm256_srli_epi16(c, 7)));
        }
    }

private:
    static __m256i low(__m256i codes) { return _mm256_and_si256(codes, bytes(7)); }
    static __m256i join(__m256i upper, __m256i lowest) {
        return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(upper, 5), bytes(6)),
                               _mm256_and_si256(lowest, bytes(1)));
    }
};

}  // namespace

void dense_int3(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt3HalfBytes;
    static constexpr int kSums = 3;
    static constexpr int kShifts[kSums] = {0, 3, 5};
    static void add(int line, const __m512i* lines, const __m512i (&q)[kHalfSteps], Sums (&sums)[kSums]) {
        sums[0] = dot_4(sums[0], _mm512_and_si512(lines[line], bytes(0x07)), q[2 * line]);
        sums[1] = dot_4(sums[1], _mm512_and_si512(lines[line], bytes(0x38)), q[2 * line + 1]);
        if (line < 2) return;
        sums[2] = dot_4(sums[2], join(lines[0], _mm512_srli_epi16(lines[2], 1)), q[6]);
        sums[2] = dot_4(sums[2], join(lines[1], _mm512_srli_epi16(lines[2], 2)), q[7]);
    }
    static void expand(const uint8_t* half, uint8_t* out) {
        const __m512i c = load(half + 128);
        const __m512i lowest[2] = {_mm512_srli_epi16(c, 1), _mm512_srli_epi16(c, 2)};
        UNROLL for (int i = 0; i < 3; ++i) {
            const __m512i codes = load(half + 64 * i);
            _mm512_store_si512(out + 128 * i, _mm512_and_si512(codes, bytes(7)));
            _mm512_store_si512(out + 128 * i + 64, _mm512_and_si512(_mm512_srli_epi16(codes, 3), bytes(7)));
            if (i < 2)
                _mm512_store_si512(out + 384 + 64 * i,
                                   _mm512_and_si512(_mm512_srli_epi16(join(codes, lowest[i]), 5), bytes(7)));
        }
    }

private:
    // A code in the upper three bits.
    static __m512i join(__m512i upper, __m512i lowest) {
        constexpr int kAndOr = 0xea;  // (a & b) | c
        return _mm512_ternarylogic_epi32(upper, bytes(0xc0), _mm512_and_si512(lowest, bytes(0x20)), kAndOr);
    }
};

}  // namespace

void dense_int3(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_bits<Bits>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt3HalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        const Bytes a = load(half), b = load(half + 64), c = load(half + 128);
        vst1q_u8(out, low(a));
        vst1q_u8(out + 64, low(vshrq_n_u8(a, 3)));
        vst1q_u8(out + 128, low(b));
        vst1q_u8(out + 192, low(vshrq_n_u8(b, 3)));
        vst1q_u8(out + 256, low(c));
        vst1q_u8(out + 320, low(vshrq_n_u8(c, 3)));
        vst1q_u8(out + 384, join(a, vshrq_n_u8(c, 6)));
        vst1q_u8(out + 448, join(b, vshrq_n_u8(c, 7)));
    }

private:
    static Bytes low(Bytes codes) { return vandq_u8(codes, vdupq_n_u8(7)); }
    static Bytes join(Bytes upper, Bytes lowest) {
        return vorrq_u8(vshlq_n_u8(vshrq_n_u8(upper, 6), 1), vandq_u8(lowest, vdupq_n_u8(1)));
    }
};

}  // namespace

void dense_int3(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::dense_int3(const SampleSpec& spec) { return make_code_sample(spec, 3, false); }

}  // namespace rarefy::matmul

#endif
