// Dense 4-bit codes. 8 vectors per block, each for two steps of four columns: the low nibbles are step 2j, the high
// ones step 2j + 1.
#include "matmul/encodings/dense.h"
#if RAREFY_PASS_AVX512
#include "matmul/held_tiles_avx512.h"
#endif

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::dense_int4(Packing& packing) {
    const int64_t num_inputs = packing.view.num_inputs, row_bytes = ceil_div(num_inputs, 2);
    const uint8_t* codes = packing.take("codes", Element::u8, packing.view.num_outputs * row_bytes);
    const int64_t panel_bytes = packing.view.num_blocks * kBlockInputs * kPanelOutputs / 2;
    uint8_t* values = packing.place_values([&](int64_t) { return panel_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* out = values + panel * panel_bytes;
        for (int64_t column = 0; column < num_inputs; column += 4) {
            const int64_t step = column / 4;
            const int64_t count = num_inputs - column < 4 ? num_inputs - column : 4;
            for (int row = 0; row < num_rows; ++row) {
                const uint8_t* from = codes + (first + row) * row_bytes;
                uint8_t* to = out + step / 2 * 64 + row * 4;
                for (int64_t i = 0; i < count; ++i) to[i] |= nibble(from, column + i) << (step % 2 * 4);
            }
        }
    });
}

namespace reference {
namespace {

struct Stream : PanelStream {
    using PanelStream::PanelStream;
    void block(const uint8_t*, uint8_t* out) {
        for (int i = 0; i < kCodes / 2; ++i, ++values) {
            const int column = i / 64 * 8 + i % 4;
            out[column * kPanelOutputs + i % 64 / 4] = *values & 15;
            out[(column + 4) * kPanelOutputs + i % 64 / 4] = *values >> 4;
        }
    }
};

}  // namespace

void dense_int4(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Stream : PanelStream {
    static constexpr bool kSmallCodes = true;
    void set_zero_points(const __m256i (&)[kHalves]) {}
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        const __m256i low = _mm256_set1_epi8(15);
        UNROLL for (int half = 0; half < kHalves; ++half) {
            const __m256i both = load(values + 32 * half);
            even[half] = _mm256_and_si256(both, low);
            odd[half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
        values += 64;
    }
};

}  // namespace

void dense_int4(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Stream : PanelStream {
    static constexpr int kFetchSteps = 2;
    static constexpr int kOddShift = 4;
    static constexpr bool kExpandsOnce = false;
    void fetch(int num_steps) const { prefetch<4096>(values, num_steps * 32); }
    void next(__m512i, __m512i& even, __m512i& odd) {
        const __m512i both = load(values);
        even = _mm512_and_si512(both, _mm512_set1_epi8(0x0f));
        odd = _mm512_and_si512(both, _mm512_set1_epi8(static_cast<char>(0xf0)));
        values += 64;
    }
};

}  // namespace

void dense_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
#if !RAREFY_PASS_AMX
    if (holds_tiles<HeldNibbles>(w, part)) return walk_held_tiles<HeldNibbles>(w, rows, part);
#endif
    multiply_int<Stream>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Stream : PanelStream {
    static constexpr bool kSmallCodes = true;
    void set_zero_points(const Bytes (&)[kQuarters]) {}
    void next(Bytes (&even)[kQuarters], Bytes (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            const Bytes both = load(values + 16 * i);
            even[i] = vandq_u8(both, vdupq_n_u8(15));
            odd[i] = vshrq_n_u8(both, 4);
        }
        values += 64;
    }
};

}  // namespace

void dense_int4(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::dense_int4(const SampleSpec& spec) { return make_code_sample(spec, 4, false); }

}  // namespace rarefy::matmul

#endif
