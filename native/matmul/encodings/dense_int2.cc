// Dense 2-bit codes, and ternary digits. 4 vectors per block: step s has the bits 2 (s % 4) and the next of vector s
// / 4.
#include "matmul/encodings/bits.h"

namespace rarefy::matmul {

constexpr int kInt2HalfBytes = 128;
constexpr int kDigits = 5;  // to the base 3, in a byte of ternary-v1

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt2HalfBytes;
    static uint8_t code(const uint8_t* half, int step, int byte) {
        return half[step / 4 * 64 + byte] >> (step % 4 * 2) & 3;
    }
    static void place(uint8_t* half, int step, int byte, uint8_t code) {
        half[step / 4 * 64 + byte] |= static_cast<uint8_t>(code << (step % 4 * 2));
    }
};

}  // namespace

void packers::dense_int2(Packing& packing) {
    if (packing.format() != "ternary-v1") return pack_runs<Bits, 2>(packing);
    require(packing.view.zero_points == nullptr, "unexpected zero_points");
    packing.view.zero_point = 1;
    const int64_t row_bytes = ceil_div(packing.view.num_inputs, kDigits);
    const uint8_t* codes = packing.take("codes", Element::u8, packing.view.num_outputs * row_bytes);
    pack_bits<Bits, true>(packing, [&](int64_t row, int64_t column) {
        constexpr uint8_t kPowers[kDigits] = {1, 3, 9, 27, 81};
        return static_cast<uint8_t>(codes[row * row_bytes + column / kDigits] / kPowers[column % kDigits] % 3);
    });
}

void reference::dense_int2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt2HalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        UNROLL for (int i = 0; i < kHalfBytes; i += 32) {
            const __m256i codes = load(half + i);
            uint8_t* to = out + i / 64 * 256 + i % 64;
            store(to, _mm256_and_si256(codes, bytes(3)));
            store(to + 64, _mm256_and_si256(_mm256_srli_epi16(codes, 2), bytes(3)));
            store(to + 128, _mm256_and_si256(_mm256_srli_epi16(codes, 4), bytes(3)));
            store(to + 192, _mm256_and_si256(_mm256_srli_epi16(codes, 6), bytes(3)));
        }
    }
};

}  // namespace

void dense_int2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt2HalfBytes;
    static constexpr int kSums = 4;
    static constexpr int kShifts[kSums] = {0, 2, 4, 6};
    static void add(int line, const __m512i* lines, const __m512i (&q)[kHalfSteps], Sums (&sums)[kSums]) {
        UNROLL for (int k = 0; k < kSums; ++k) {
            sums[k] = dot_4(sums[k], _mm512_and_si512(lines[line], bytes(3 << kShifts[k])), q[4 * line + k]);
        }
    }
    static void expand(const uint8_t* half, uint8_t* out) {
        UNROLL for (int step = 0; step < kHalfSteps; ++step) {
            const __m512i codes = _mm512_srli_epi16(load(half + step / 4 * 64), static_cast<unsigned>(step % 4 * 2));
            _mm512_store_si512(out + 64 * step, _mm512_and_si512(codes, bytes(3)));
        }
    }
};

}  // namespace

void dense_int2(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_bits<Bits>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kInt2HalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        const Bytes lowest = vdupq_n_u8(3);
        UNROLL for (int i = 0; i < 2; ++i) {
            const Bytes codes = load(half + 64 * i);
            uint8_t* to = out + 256 * i;
            vst1q_u8(to, vandq_u8(codes, lowest));
            vst1q_u8(to + 64, vandq_u8(vshrq_n_u8(codes, 2), lowest));
            vst1q_u8(to + 128, vandq_u8(vshrq_n_u8(codes, 4), lowest));
            vst1q_u8(to + 192, vshrq_n_u8(codes, 6));
        }
    }
};

}  // namespace

void dense_int2(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::dense_int2(const SampleSpec& spec) {
    if (spec.format != "ternary-v1") return make_code_sample(spec, 2, false);
    SampleSpec symmetric = spec;
    symmetric.symmetric = true;
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    maker.add_grid(sample, symmetric, 2);
    SampleArray codes{"codes", Element::u8, {}};
    for (int64_t row = 0; row < spec.num_outputs; ++row) {
        for (int64_t column = 0, power = 1; column < spec.num_inputs; ++column, power *= 3) {
            if (column % kDigits == 0) {
                codes.bytes.push_back(0);
                power = 1;
            }
            const int digit = maker.below(3);
            sample.levels.push_back(digit - 1);
            codes.bytes.back() = static_cast<uint8_t>(codes.bytes.back() + digit * power);
        }
    }
    sample.arrays.push_back(codes);
    return sample;
}

}  // namespace rarefy::matmul

#endif
