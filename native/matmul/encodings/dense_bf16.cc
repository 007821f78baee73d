// Dense bfloat16. A step is two columns: of each output the even one in the low half of its lane. 32 steps per block.
#include "matmul/encodings/dense.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::dense_bf16(Packing& packing) { pack_dense_lanes(packing, "values", Element::u16, 2); }

namespace reference {
namespace {

struct Stream : PanelStream {
    using PanelStream::PanelStream;
    void block(float* out) {
        for (int i = 0; i < kCodes; ++i, values += 2) {
            uint16_t bits;
            std::memcpy(&bits, values, 2);
            out[(i / 32 * 2 + i % 2) * kPanelOutputs + i % 32 / 2] = widen(bits);
        }
    }
};

}  // namespace

void dense_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Stream : PanelStream {
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            widen_pairs(load(values + 32 * half), even[half], odd[half]);
        }
        values += 64;
    }
};

}  // namespace

void dense_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Stream : PanelStream {
    static constexpr bool kIsPlain = true;
    void fetch(int num_columns) const { prefetch<2048>(values, num_columns * 32); }
    __m512i pairs() {
        const __m512i next = load(values);
        values += 64;
        return next;
    }
};

}  // namespace

void dense_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_bf16<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Stream : PanelStream {
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) { widen_pairs(load(values + 16 * i), even[i], odd[i]); }
        values += 64;
    }
};

}  // namespace

void dense_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::dense_bf16(const SampleSpec& spec) { return make_float_sample(spec, Element::u16, false); }

}  // namespace rarefy::matmul

#endif
