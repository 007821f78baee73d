// Block sparse 8-bit codes: cells of steps of four columns as in dense_int8. Pruned entries have no code.
#include "matmul/encodings/block.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::block_int8(Packing& packing) {
    packing.put_scales_last();
    pack_blocks(packing, "codes", Element::u8, 1);
}

namespace reference {
namespace {

struct Stream : CellStream {
    using CellStream::CellStream;
    void block(const uint8_t* pruned, uint8_t* out) {
        const int stored = halves();
        for (int half = 0; half < 2; ++half) {
            const bool is_stored = stored >> half & 1;
            for (int i = half * kCodes / 2; i < (half + 1) * kCodes / 2; ++i)
                out[(i / 64 * 4 + i % 4) * kPanelOutputs + i % 64 / 4] =
                    is_stored ? *values++ : pruned[half * kPanelOutputs + i % 64 / 4];
        }
    }
};

}  // namespace

void block_int8(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

void rarefy::matmul::avx2::block_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_cells_int8(w, rows, part);
}

#elif RAREFY_PASS_AVX512

void rarefy::matmul::avx512::block_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_cells_int8(w, rows, part);
}

#elif RAREFY_PASS_NEON

void rarefy::matmul::neon::block_int8(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_cells_int8(w, rows, part);
}

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::block_int8(const SampleSpec& spec) {
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    std::vector<size_t> order;
    const std::vector<uint8_t> kept = add_block_mask(sample, spec, maker, order);
    const std::vector<int> zero_points = maker.add_grid(sample, spec, 8);
    SampleArray codes{"codes", Element::u8, {}};
    sample.levels.resize(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) {
        const int code = maker.below(256);
        sample.levels[order[i]] = kept[i] ? code - zero_points[order[i]] : 0;
        if (kept[i]) codes.bytes.push_back(static_cast<uint8_t>(code));
    }
    sample.arrays.push_back(codes);
    return sample;
}

}  // namespace rarefy::matmul

#endif
