// Dense 8-bit codes. A step is four columns: one byte each in the lane of their output. 16 steps per block.
#include "matmul/encodings/dense.h"
#if RAREFY_PASS_AVX512
#include "matmul/held_tiles_avx512.h"
#endif

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::dense_int8(Packing& packing) {
    packing.put_scales_last();
    pack_dense_lanes(packing, "codes", Element::u8, 1);
}

namespace reference {
namespace {

struct Stream : PanelStream {
    using PanelStream::PanelStream;
    void block(const uint8_t*, uint8_t* out) {
        for (int i = 0; i < kCodes; ++i) out[(i / 64 * 4 + i % 4) * kPanelOutputs + i % 64 / 4] = *values++;
    }
};

}  // namespace

void dense_int8(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Stream : PanelStream {
    static constexpr bool kSmallCodes = false;
    void set_zero_points(const __m256i (&)[kHalves]) {}
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        UNROLL for (int half = 0; half < kHalves; ++half) {
            even[half] = load(values + 32 * half);
            odd[half] = load(values + 64 + 32 * half);
        }
        values += 128;
    }
};

}  // namespace

void dense_int8(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Stream : PanelStream {
    static constexpr int kFetchSteps = 2;  // a line after the other, as they are read: in bursts they wait
    static constexpr int kOddShift = 0;
    static constexpr bool kExpandsOnce = false;
    void fetch(int num_steps) const { prefetch<2048>(values, num_steps * 64); }
    void next(__m512i, __m512i& even, __m512i& odd) {
        even = load(values);
        odd = load(values + 64);
        values += 128;
    }
};

}  // namespace

void dense_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
#if !RAREFY_PASS_AMX
    if (holds_tiles<HeldBytes>(w, part)) return walk_held_tiles<HeldBytes>(w, rows, part);
#endif
    multiply_int<Stream>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Stream : PanelStream {
    static constexpr bool kSmallCodes = false;
    void set_zero_points(const Bytes (&)[kQuarters]) {}
    void next(Bytes (&even)[kQuarters], Bytes (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            even[i] = load(values + 16 * i);
            odd[i] = load(values + 64 + 16 * i);
        }
        values += 128;
    }
};

}  // namespace

void dense_int8(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::dense_int8(const SampleSpec& spec) { return make_code_sample(spec, 8, false); }

}  // namespace rarefy::matmul

#endif
