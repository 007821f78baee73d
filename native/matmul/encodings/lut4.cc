// Codes of a table of 16 float32. 8 vectors per block, each with 8 columns: lane = output, column c is nibble c.
#include "matmul/encodings/lut.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

struct Coder {
    static constexpr int kBlockBytes = 512;
    static int code(const uint8_t* block, int column, int output) {
        return block[column / 8 * 64 + output * 4 + column % 8 / 2] >> (column % 2 * 4) & 15;
    }
    static float entry(const uint8_t* table, int code) {
        float entry;
        std::memcpy(&entry, table + 4 * code, 4);
        return entry;
    }
};

}  // namespace

void packers::lut4(Packing& packing) {
    pack_lut_scales(packing);
    uint8_t* table = packing.allocate(64);
    std::memcpy(table, packing.take("table", Element::f32, 64), 64);
    packing.view.table = table;
    const int64_t row_bytes = ceil_div(packing.view.num_inputs, 2);
    const uint8_t* codes = packing.take("codes", Element::u8, packing.view.num_outputs * row_bytes);
    pack_lut_codes(
        packing, Coder::kBlockBytes,
        [&](int64_t row, int64_t column) { return nibble(codes + row * row_bytes, column); },
        [](uint8_t* block, int column, int output, uint8_t code) {
            block[column / 8 * 64 + output * 4 + column % 8 / 2] |= static_cast<uint8_t>(code << (column % 2 * 4));
        });
}

void reference::lut4(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<LutStream<Coder>>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Lookup {
    static constexpr int kHalfBytes = 256;
    static void expand(const uint8_t* table, const uint8_t* codes, float* out) {
        // A permutation knows 8 entries: the fourth bit, moved to the sign, chooses between two.
        const __m256 low = _mm256_castsi256_ps(load(table)), high = _mm256_castsi256_ps(load(table + 32));
        for (int first = 0; first < 32; first += 8, codes += 64, out += 8 * kPanelOutputs) {
            UNROLL for (int half = 0; half < kHalves; ++half) {
                const __m256i eight = load(codes + 32 * half);
                UNROLL for (int c = 0; c < 8; ++c) {
                    const __m256i index = _mm256_srli_epi32(eight, 4 * c);
                    const __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28 - 4 * c));
                    _mm256_store_ps(out + c * kPanelOutputs + 8 * half,
                                    _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                     _mm256_permutevar8x32_ps(high, index), chosen));
                }
            }
        }
    }
};

}  // namespace

void lut4(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<LutStream<Lookup>>(w, rows, part);
}

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Lookup {
    static constexpr int kColumns = 8, kBytes = 64;
    __m512 table;
    explicit Lookup(const uint8_t* entries) : table(_mm512_castsi512_ps(load(entries))) {}
    using Codes = __m512i;
    Codes read(const uint8_t* from) const { return load(from); }
    __m512 column(Codes codes, int c) const {
        // the permutation reads the lowest four bits of a lane alone
        return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * c)), table);
    }
};

}  // namespace

void lut4(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_lut<Lookup>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Lookup {
    static constexpr int kHalfBytes = 256;
    static void expand(const uint8_t* table, const uint8_t* codes, float* out) {
        // The bytes of an entry stand at 4 * code and the three places after.
        const uint8x16x4_t entries = vld1q_u8_x4(table);
        for (int first = 0; first < 32; first += 8, codes += 64, out += 8 * kPanelOutputs) {
            UNROLL for (int i = 0; i < kQuarters; ++i) {
                Words eight = vreinterpretq_u32_u8(load(codes + 16 * i));
                UNROLL for (int c = 0; c < 8; ++c) {
                    const Words code = vandq_u32(eight, vdupq_n_u32(15));
                    const Words places = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
                    vst1q_f32(out + c * kPanelOutputs + 4 * i,
                              vreinterpretq_f32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_u32(places))));
                    eight = vshrq_n_u32(eight, 4);
                }
            }
        }
    }
};

}  // namespace

void lut4(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<LutStream<Lookup>>(w, rows, part);
}

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::lut4(const SampleSpec& spec) { return make_lut_sample<4>(spec); }

}  // namespace rarefy::matmul

#endif
