// Codes of a table of 256 bfloat16. 16 vectors per block, each with 4 columns, four outputs in 16 bytes: columns 0 and
// 1 of each output, then columns 2 and 3 of each. So the low and the high bytes of the entries, looked up apart,
// interleave to pairs of columns in the lanes of their outputs.
// PanelWeights::table: the low bytes of all entries, the high bytes, and the entries as float32.
#include "matmul/encodings/lut.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

constexpr int kEntries = 256;

struct Coder {
    static constexpr int kBlockBytes = 1024;
    static int position(int column, int output) {
        return column / 4 * 64 + output / 4 * 16 + column % 4 / 2 * 8 + output % 4 * 2 + column % 2;
    }
    static int code(const uint8_t* block, int column, int output) { return block[position(column, output)]; }
    static float entry(const uint8_t* table, int code) {
        return reference::widen(static_cast<uint16_t>(table[code] | table[kEntries + code] << 8));
    }
};

}  // namespace

void packers::lut8(Packing& packing) {
    pack_lut_scales(packing);
    const uint8_t* entries = packing.take("table", Element::u16, 2 * kEntries);
    uint8_t* table = packing.allocate(6 * kEntries);
    for (int code = 0; code < kEntries; ++code) {
        uint16_t bits;
        std::memcpy(&bits, entries + 2 * code, 2);
        table[code] = static_cast<uint8_t>(bits);
        table[kEntries + code] = static_cast<uint8_t>(bits >> 8);
        const float entry = reference::widen(bits);
        std::memcpy(table + 2 * kEntries + 4 * code, &entry, 4);
    }
    packing.view.table = table;
    const int64_t num_inputs = packing.view.num_inputs;
    const uint8_t* codes = packing.take("codes", Element::u8, packing.view.num_outputs * num_inputs);
    pack_lut_codes(
        packing, Coder::kBlockBytes, [&](int64_t row, int64_t column) { return codes[row * num_inputs + column]; },
        [](uint8_t* block, int column, int output, uint8_t code) { block[Coder::position(column, output)] = code; });
}

void reference::lut8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<LutStream<Coder>>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Lookup {
    static constexpr int kHalfBytes = 512;
    // Plain loads: measured to be faster than gathers.
    static void expand(const uint8_t* table, const uint8_t* codes, float* out) {
        const auto* entries = reinterpret_cast<const float*>(table + 512);
        for (int first = 0; first < 32; first += 4, codes += 64, out += 4 * kPanelOutputs) {
            UNROLL for (int c = 0; c < 4; ++c) {
                UNROLL for (int o = 0; o < kPanelOutputs; ++o) {
                    out[c * kPanelOutputs + o] = entries[codes[o / 4 * 16 + c / 2 * 8 + o % 4 * 2 + c % 2]];
                }
            }
        }
    }
};

}  // namespace

void lut8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<LutStream<Lookup>>(w, rows, part);
}

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Lookup {
    static constexpr int kPairs = 2, kBytes = 64;
    static constexpr bool kInterleaved = false;
    __m512i low[4], high[4];
    explicit Lookup(const uint8_t* entries) {
        UNROLL for (int i = 0; i < 4; ++i) {
            low[i] = load(entries + 64 * i);
            high[i] = load(entries + 256 + 64 * i);
        }
    }
    void read(const uint8_t* from, __m512i (&pairs)[kPairs]) const {
        const __m512i codes = load(from);
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        const __m512i low_bytes = look_up(low, codes, upper), high_bytes = look_up(high, codes, upper);
        pairs[0] = _mm512_unpacklo_epi8(low_bytes, high_bytes);
        pairs[1] = _mm512_unpackhi_epi8(low_bytes, high_bytes);
    }

private:
    // A permutation of two vectors knows 128 bytes: the last bit of a code chooses between two.
    static __m512i look_up(const __m512i (&table)[4], __m512i codes, __mmask64 upper) {
        return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                      _mm512_permutex2var_epi8(table[2], codes, table[3]));
    }
};

}  // namespace

void lut8(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_lut<Lookup>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Lookup {
    static constexpr int kHalfBytes = 512;
    static void expand(const uint8_t* table, const uint8_t* codes, float* out) {
        const auto* entries = reinterpret_cast<const float*>(table + 512);
        for (int first = 0; first < 32; first += 4, codes += 64, out += 4 * kPanelOutputs) {
            UNROLL for (int c = 0; c < 4; ++c) {
                UNROLL for (int o = 0; o < kPanelOutputs; ++o) {
                    out[c * kPanelOutputs + o] = entries[codes[o / 4 * 16 + c / 2 * 8 + o % 4 * 2 + c % 2]];
                }
            }
        }
    }
};

}  // namespace

void lut8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_float<LutStream<Lookup>>(w, rows, part);
}

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::lut8(const SampleSpec& spec) { return make_lut_sample<8>(spec); }

}  // namespace rarefy::matmul

#endif
