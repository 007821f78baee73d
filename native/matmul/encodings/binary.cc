// Binary weights, as codes 0 and 2 with zero point 1. 2 vectors per block: step s is bit s % 8 of vector s / 8.
#include "matmul/encodings/bits.h"
#if RAREFY_PASS_AVX512
#include "matmul/encodings/bit_sums_avx512.h"
#endif

namespace rarefy::matmul {

constexpr int kBinaryHalfBytes = 64;

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static uint8_t code(const uint8_t* half, int step, int byte) {
        return static_cast<uint8_t>((half[byte] >> step & 1) * 2);
    }
    static void place(uint8_t* half, int step, int byte, uint8_t bit) {
        half[byte] |= static_cast<uint8_t>(bit << step);
    }
};

}  // namespace

void packers::binary(Packing& packing) {
    require(packing.view.zero_points == nullptr, "unexpected zero_points");
    packing.view.zero_point = 1;
    pack_runs<Bits, 1>(packing);
}

void reference::binary(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_int<BitStream<Bits>>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        UNROLL for (int i = 0; i < 64; i += 32) {
            const __m256i bits = load(half + i);
            store(out + i, _mm256_and_si256(_mm256_slli_epi16(bits, 1), bytes(2)));
            store(out + 64 + i, _mm256_and_si256(bits, bytes(2)));
            UNROLL for (int step = 2; step < kHalfSteps; ++step) {
                store(out + 64 * step + i, _mm256_and_si256(_mm256_srli_epi16(bits, step - 1), bytes(2)));
            }
        }
    }
};

}  // namespace

void binary(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<BitStream<Bits>>(w, rows, part); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static constexpr int kSums = 4;
    static constexpr int kShifts[kSums] = {0, 1, 2, 3};
    static void add(int, const __m512i* lines, const __m512i (&q)[kHalfSteps], Sums (&sums)[kSums]) {
        // Step s stands where code 2 is shifted left by s - 1 bits; the others are brought to such places.
        const __m512i bits = *lines;
        const __m512i late = _mm512_srli_epi16(bits, 4), first = _mm512_slli_epi16(bits, 4);
        UNROLL for (int k = 0; k < kSums; ++k) {
            sums[k] = dot_4(sums[k], _mm512_and_si512(bits, bytes(2 << k)), q[1 + k]);
        }
        UNROLL for (int k = 0; k < 3; ++k) {
            sums[k] = dot_4(sums[k], _mm512_and_si512(late, bytes(2 << k)), q[5 + k]);
        }
        sums[3] = dot_4(sums[3], _mm512_and_si512(first, bytes(16)), q[0]);
    }
    static void expand(const uint8_t* half, uint8_t* out) {
        const __m512i bits = load(half);
        _mm512_store_si512(out, _mm512_and_si512(_mm512_slli_epi16(bits, 1), bytes(2)));
        UNROLL for (int step = 1; step < kHalfSteps; ++step) {
            const __m512i moved = _mm512_srli_epi16(bits, static_cast<unsigned>(step - 1));
            _mm512_store_si512(out + 64 * step, _mm512_and_si512(moved, bytes(2)));
        }
    }
};

// One row by kPanels panels, `distance` apart, whose sums of four columns are looked up; see walk_bits. They are the
// BitSums in w.table.
template <int kPanels, int kSteps>
void walk_bit_sums(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    constexpr int kHalves = kSteps / kHalfSteps, kAndOr = 0xea;  // (a & b) | c
    const float* row_scales = rows.scales + part.row_begin * rows.num_blocks;
    const auto* bit_sums = reinterpret_cast<const BitSums*>(w.table);
    const __m512i mask = bytes(0x33), places = _mm512_set1_epi32(0x0c080400);  // each of four columns has its own sums
    const __m512i ones = bytes(1), units = bytes(1 << kLowBits);
    const uint8_t* values[kPanels];
    __m512 totals[kPanels], scales[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        values[p] = w.values + w.value_offsets[panel + p * distance];
        totals[p] = _mm512_setzero_ps();
    }
    const int64_t ahead = near_or_far();
    int64_t left = 0;  // segments of the group
    for (int64_t segment = 0; segment < w.num_blocks * (16 / kSteps); ++segment, --left) {
        if (left == 0) {
            left = w.segments_per_group;
            UNROLL for (int p = 0; p < kPanels; ++p) {
                prefetch_in_order(values[p] + ahead);
                scales[p] = widen_bf16(values[p]);
                values[p] += w.group_bytes;
            }
        }
        const BitSums& sums = bit_sums[segment * kSteps / 16];
        const int first = kSteps == 16 ? 0 : static_cast<int>(segment % 2 * 2);
        __m512i low[kPanels], high[kPanels];
        UNROLL for (int half = 0; half < kHalves; ++half) {
            UNROLL for (int p = 0; p < kPanels; ++p) {
                const __m512i bits = load_next(values[p], ahead);
                values[p] += Bits::kHalfBytes;
                UNROLL for (int i = 0; i < 2; ++i) {
                    const int quarter = first + 2 * half + i;
                    const __m512i moved = i == 0 ? bits : _mm512_srli_epi16(bits, 2);
                    const __m512i index = _mm512_ternarylogic_epi32(moved, mask, places, kAndOr);
                    const __m512i more_low = _mm512_permutexvar_epi8(index, load(sums.low[quarter]));
                    const __m512i more_high = _mm512_permutexvar_epi8(index, load(sums.high[quarter]));
                    low[p] = half + i == 0 ? more_low : _mm512_add_epi8(low[p], more_low);
                    high[p] = half + i == 0 ? more_high : _mm512_add_epi8(high[p], more_high);
                }
            }
        }
        const __m512 row_scale = _mm512_set1_ps(row_scales[segment * kSteps / 16]);
        UNROLL for (int p = 0; p < kPanels; ++p) {
            const auto start = reinterpret_cast<Sums>(_mm512_set1_epi32(-kBitSumStart * kSteps));
            const Sums dots = dot_4(dot_4(start, low[p], ones), high[p], units);
            totals[p] = _mm512_fmadd_ps(to_floats(dots), _mm512_mul_ps(row_scale, scales[p]), totals[p]);
        }
    }
    float* const y = part.y + part.row_begin * part.y_stride;
    UNROLL for (int p = 0; p < kPanels; ++p) {
        const int64_t of = panel + p * distance;
        Lanes(w, of, y + of * kPanelOutputs).store(_mm512_mul_ps(totals[p], output_factor(w, of, true)));
    }
}

// Of more blocks the L1 cache does not hold the sums beside the weights that pass through it; and so many panels pay
// for making them.
constexpr int64_t kMostSummedBlocks = 16, kFewestSummedPanels = 8;

// Every thread makes sums of its own: from another core they would come more slowly.
void one_row_by_bit_sums(const PanelWeights& w, const Rows& rows, const Part& part) {
    BitSums sums[kMostSummedBlocks];
    make_bit_sums(rows.q + part.row_begin * rows.stride, w.num_blocks, sums);
    PanelWeights with_sums = w;
    with_sums.table = reinterpret_cast<const uint8_t*>(sums);
    if (w.steps_per_segment == 16)
        walk_panels(with_sums, rows, part, walk_bit_sums<2, 16>, walk_bit_sums<1, 16>);
    else
        walk_panels(with_sums, rows, part, walk_bit_sums<2, 8>, walk_bit_sums<1, 8>);
}

}  // namespace

void binary(const PanelWeights& w, const Rows& rows, const Part& part) {
    const int64_t num_panels = (part.panel_end - part.panel_begin) * (part.distance == 0 ? 1 : 2);
    if (part.row_end - part.row_begin == 1 && w.num_blocks <= kMostSummedBlocks && num_panels >= kFewestSummedPanels)
        one_row_by_bit_sums(w, rows, part);
    else
        multiply_bits<Bits>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
namespace {

struct Bits {
    static constexpr int kHalfBytes = kBinaryHalfBytes;
    static void expand(const uint8_t* half, uint8_t* out) {
        Bytes bits = load(half);
        UNROLL for (int step = 0; step < kHalfSteps; ++step) {
            vst1q_u8(out + 64 * step, vandq_u8(vshlq_n_u8(bits, 1), vdupq_n_u8(2)));
            bits = vshrq_n_u8(bits, 1);
        }
    }
};

}  // namespace

void binary(const PanelWeights& w, const Rows& rows, const Part& part) { multiply_int<BitStream<Bits>>(w, rows, part); }

}  // namespace rarefy::matmul::neon

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::binary(const SampleSpec& spec) {
    SampleSpec symmetric = spec;
    symmetric.symmetric = true;
    Sample sample(spec);
    SampleMaker maker(spec.seed);
    maker.add_grid(sample, symmetric, 1);
    SampleArray codes{"codes", Element::u8, {}};
    for (int64_t row = 0; row < spec.num_outputs; ++row) {
        for (int64_t column = 0; column < spec.num_inputs; ++column) {
            if (column % 8 == 0) codes.bytes.push_back(0);
            const int bit = maker.below(2);
            sample.levels.push_back(2 * bit - 1);
            codes.bytes.back() |= static_cast<uint8_t>(bit << column % 8);
        }
    }
    sample.arrays.push_back(codes);
    return sample;
}

}  // namespace rarefy::matmul

#endif
