// bfloat16 under a mask: steps of two columns as in dense_bf16, 32 bits of mask each. For AVX2 and AVX-VNNI, which have
// no vpexpandw, all values as dense_bf16 has them; many rows are multiplied by what is kept alone.
#include "matmul/encodings/lists.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

namespace {

void pack_all_values(Packing& packing) {
    const DiskMask mask(packing);
    PanelWeights& view = packing.view;
    const int64_t num_kept = mask.row_starts.back();
    const uint8_t* from = packing.take("values", Element::u16, num_kept * 2);
    const int64_t panel_bytes = view.num_blocks * kBlockInputs * kPanelOutputs * 2;
    uint8_t* const values = packing.place_values([&](int64_t) { return panel_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        for (int row = 0; row < num_rows; ++row) {
            int64_t cursor = mask.row_starts[static_cast<size_t>(first + row)];
            for (int64_t block = 0; block < view.num_blocks; ++block) {
                for (uint64_t bits = mask.block(first + row, block); bits != 0; bits &= bits - 1) {
                    const int64_t column = block * kBlockInputs + __builtin_ctzll(bits);
                    std::memcpy(values + panel * panel_bytes + column / 2 * 64 + row * 4 + column % 2 * 2,
                                from + 2 * cursor++, 2);
                }
            }
        }
    });
    // A row with a NaN or an infinity goes the dense way, where zeros meet it too; so rows say which they are.
    view.skips_blocks = true;
    view.lane_rows = fewest_float_lane_rows(view.num_outputs * view.num_inputs, num_kept);
}

}  // namespace

void packers::mask_bf16(Packing& packing) {
    if (has_no_expand(packing.isa()))
        pack_all_values(packing);
    else
        pack_masked<16>(packing, DiskValues(packing, "values", Element::u16, 16));
}

namespace reference {
namespace {

struct Stream : MaskedStream {
    using MaskedStream::MaskedStream;
    void block(float* out) {
        begin_segment(kBlockInputs);
        for (int step = 0; step < 32; ++step) {
            const uint64_t bits = step_mask(mask, step, 4);
            for (int i = 0; i < 32; ++i) {
                uint16_t value = 0;
                if (bits >> i & 1) {
                    std::memcpy(&value, values, 2);
                    values += 2;
                }
                out[(step * 2 + i % 2) * kPanelOutputs + i / 2] = widen(value);
            }
        }
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

#include "matmul/encodings/float_lanes_avx2.h"

void rarefy::matmul::avx2::mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (reads_lanes(w, rows) && all_finite(rows, part))
        multiply_float_lanes(w, rows, part);
    else
        dense_bf16(w, rows, part);
}

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Stream : MaskedStream {
    static constexpr bool kIsPlain = false;
    void fetch(int num_columns) const { prefetch<4096>(values, num_columns * 18); }
    __m512i pairs() {
        uint32_t kept;
        __builtin_memcpy(&kept, mask, sizeof kept);
        const __m512i expanded = _mm512_mask_expand_epi16(unknown_zero(), kept, load(values));
        values += 2 * _mm_popcnt_u32(kept);
        mask += 4;
        return expanded;
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_bf16<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Stream : MaskedStream {
    void next(Floats (&even)[kQuarters], Floats (&odd)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            const uint8_t bits = mask[i];
            const Bytes order = load(reinterpret_cast<const uint8_t*>(kShuffles.words[bits]));
            widen_pairs(vqtbl1q_u8(load(values), order), even[i], odd[i]);
            values += 2 * __builtin_popcount(bits);
        }
        mask += 4;
    }
};

}  // namespace

void mask_bf16(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_float<Stream>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::mask_bf16(const SampleSpec& spec) { return make_float_sample(spec, Element::u16, true); }

}  // namespace rarefy::matmul

#endif
