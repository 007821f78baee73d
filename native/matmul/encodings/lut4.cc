// Codes of a table of 16 float32, rounded to bfloat16 as activations are. 8 vectors per block, each with 8 columns:
// lane = output, the even columns are the nibbles of its lower half and the odd ones those of its upper half. For
// AVX-512 and AMX the vectors of the two halves of a block lie in turns. PanelWeights::table: the entries as float32,
// then as bfloat16, twice: a permutation of 32 reads five bits, of which the last is another code's.
#include "matmul/encodings/lut.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

struct Coder {
    static constexpr int kBlockBytes = 512;
    static int position(int column, int output) {  // of the nibble in the block
        return column / 8 * 128 + output * 8 + column % 2 * 4 + column % 8 / 2;
    }
    static int code(const uint8_t* block, int column, int output) { return nibble(block, position(column, output)); }
    static float entry(const uint8_t* table, int code) {
        float entry;
        std::memcpy(&entry, table + 4 * code, 4);
        return entry;
    }
};

}  // namespace

void packers::lut4(Packing& packing) {
    pack_lut_scales(packing);
    float entries[16], numbers[kBlockInputs];
    uint16_t bits[kBlockInputs];
    std::memcpy(entries, packing.take("table", Element::f32, 64), 64);
    round_row_reference(entries, 16, bits, numbers);
    uint8_t* table = packing.allocate(128);
    std::memcpy(table, numbers, 64);
    std::memcpy(table + 64, bits, 32);
    std::memcpy(table + 96, bits, 32);
    packing.view.table = table;
    const bool in_turns = packing.isa() >= Isa::avx512;
    const int64_t row_bytes = ceil_div(packing.view.num_inputs, 2);
    const uint8_t* codes = packing.take("codes", Element::u8, packing.view.num_outputs * row_bytes);
    pack_lut_codes(
        packing, Coder::kBlockBytes,
        [&](int64_t row, int64_t column) { return nibble(codes + row * row_bytes, column); },
        [in_turns](uint8_t* block, int column, int output, uint8_t code) {
            const int vector = column / 8, place = in_turns ? vector % 4 * 2 + vector / 4 : vector;
            const int position = Coder::position(place * 8 + column % 8, output);
            block[position / 2] |= static_cast<uint8_t>(code << (position % 2 * 4));
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
                    const int bit = c % 2 * 16 + c / 2 * 4;
                    const __m256i index = _mm256_srli_epi32(eight, bit);
                    const __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28 - bit));
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
    static constexpr int kPairs = 4, kBytes = 64;
    static constexpr bool kInterleaved = true;
    __m512i table;
    explicit Lookup(const uint8_t* entries) : table(load(entries + 64)) {}
    void read(const uint8_t* from, __m512i (&pairs)[kPairs]) const {
        const __m512i codes = load(from);
        UNROLL for (int i = 0; i < kPairs; ++i) {
            const __m512i index = i == 0 ? codes : _mm512_srli_epi16(codes, static_cast<unsigned>(4 * i));
            pairs[i] = _mm512_permutexvar_epi16(index, table);
        }
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
                UNROLL for (int n = 0; n < 8; ++n) {
                    const int column = n % 4 * 2 + n / 4;
                    const Words code = vandq_u32(eight, vdupq_n_u32(15));
                    const Words places = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
                    vst1q_f32(out + column * kPanelOutputs + 4 * i,
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
