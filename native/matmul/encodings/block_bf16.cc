// Block sparse bfloat16: cells of steps of two columns as in dense_bf16.
#include "matmul/encodings/block.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::block_bf16(Packing& packing) { pack_blocks(packing, "values", Element::u16, 2); }

namespace reference {
namespace {

struct Stream : CellStream {
    using CellStream::CellStream;
    void block(float* out) {
        std::memset(out, 0, kCodes * sizeof(float));
        const int stored = halves();
        for (int half = 0; half < 2; ++half) {
            if ((stored >> half & 1) == 0) continue;
            for (int i = half * kCodes / 2; i < (half + 1) * kCodes / 2; ++i, values += 2) {
                uint16_t bits;
                std::memcpy(&bits, values, 2);
                out[(i / 32 * 2 + i % 2) * kPanelOutputs + i % 32 / 2] = widen(bits);
            }
        }
    }
};

}  // namespace

void block_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

void rarefy::matmul::avx2::block_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_cells_bf16(w, rows, part);
}

#elif RAREFY_PASS_AVX512

void rarefy::matmul::avx512::block_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_cells_bf16(w, rows, part);
}

#elif RAREFY_PASS_NEON

void rarefy::matmul::neon::block_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_cells_bf16(w, rows, part);
}

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::block_bf16(const SampleSpec& spec) {
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    std::vector<size_t> order;
    const std::vector<uint8_t> kept = add_block_mask(sample, spec, maker, order);
    SampleArray values{"values", Element::u16, {}};
    sample.floats.resize(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) {
        const uint16_t bits = maker.bf16();
        sample.floats[order[i]] = kept[i] ? bf16_value(bits) : 0.0f;
        if (kept[i]) SampleMaker::append(values.bytes, &bits, 2);
    }
    sample.arrays.push_back(values);
    return sample;
}

}  // namespace rarefy::matmul

#endif
