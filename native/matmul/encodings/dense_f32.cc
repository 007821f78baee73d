// Dense float32. A step is one column: 16 floats, one per output. 64 steps per block.
#include "matmul/encodings/dense.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::dense_f32(Packing& packing) { pack_dense_lanes(packing, "values", Element::f32, 4); }

namespace reference {
namespace {

struct Stream : PanelStream {
    using PanelStream::PanelStream;
    void block(float* out) {
        std::memcpy(out, values, kCodes * 4);
        values += kCodes * 4;
    }
};

}  // namespace

void dense_f32(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Stream : PanelStream {
    void next(__m256 (&even)[kHalves], __m256 (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            even[half] = _mm256_castsi256_ps(load(values + 32 * half));
            odd[half] = _mm256_castsi256_ps(load(values + 64 + 32 * half));
        }
        values += 128;
    }
};

}  // namespace

void dense_f32(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Stream : PanelStream {
    void fetch(int num_columns) const { prefetch<2048>(values, num_columns * 64); }
    void next(__m512& even, __m512& odd) {
        even = _mm512_castsi512_ps(load(values));
        odd = _mm512_castsi512_ps(load(values + 64));
        values += 128;
    }
};

}  // namespace

void dense_f32(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Stream : PanelStream {
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            even[i] = vreinterpretq_f32_u8(load(values + 16 * i));
            odd[i] = vreinterpretq_f32_u8(load(values + 64 + 16 * i));
        }
        values += 128;
    }
};

}  // namespace

void dense_f32(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::dense_f32(const SampleSpec& spec) { return make_float_sample(spec, Element::f32, false); }

}  // namespace rarefy::matmul

#endif
