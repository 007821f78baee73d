// What the dense encodings of 1, 2 and 3 bits share. Every panel has the same bytes, in order; half a block, 8 steps of
// four columns, is a few vectors of 64 bytes, and in each of their bytes lie bits of several steps. For AVX-512 and AMX
// the scales and zero points of a group stand in front of its first half block: a second stream of memory with so few
// bytes costs one row more than its bytes do. An encoding says in `Bits` which:
//   reference   static uint8_t code(const uint8_t* half, int step, int byte)    the code of a byte of a step
//               static void place(uint8_t* half, int step, int byte, uint8_t code)    zeroes before
//   AVX2        static void expand(const uint8_t* half, uint8_t* out)    8 steps of 64 codes
//   NEON        static void expand(const uint8_t* half, uint8_t* out)    of 8 steps the first 16 codes
//   AVX-512     as AVX2, and for one row, whose sums take the codes where they stand in their bytes:
//               kSums, kShifts    by how many bits to the left each sum is off; the first by none
//               static void add(int line, const __m512i* lines, const __m512i (&q)[8], Sums (&sums)[kSums])
//               the products of a line of half a block, which lies behind those before it in `lines`
// and kHalfBytes, the bytes of half a block.
// `extra`, for AVX-512, where codes may be zero points: as of a mask (mask.h), for many rows list the others.
#pragma once

#include "matmul/encodings/dense.h"
#include "matmul/encodings/mask.h"

namespace rarefy::matmul {

constexpr int kHalfSteps = 8;
constexpr int kHalfColumns = 4 * kHalfSteps;

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

// Lays out all panels; read(row, column) gives the codes. kZeros: some may be zero points.
template <class Bits, bool kZeros, class Read>
void pack_bits(Packing& packing, Read read) {
    const PanelWeights& view = packing.view;
    const int64_t num_inputs = view.num_inputs, halves_per_segment = view.steps_per_segment / kHalfSteps;
    const bool beside = packing.isa() >= Isa::avx512;
    uint8_t* const values = beside
                                ? packing.place_segments(halves_per_segment * Bits::kHalfBytes)
                                : packing.place_values([&](int64_t) { return view.num_blocks * 2 * Bits::kHalfBytes; });
    int32_t* const list_steps = kZeros && beside ? allocate_list_steps(packing) : nullptr;
    const int64_t group_inputs = view.segments_per_group * halves_per_segment * kHalfColumns;
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* half = values + view.value_offsets[panel];
        int counts[kPanelOutputs] = {};  // of codes of a block that are not the zero point
        for (int64_t begin = 0; begin < view.num_blocks * kBlockInputs; begin += kHalfColumns) {
            if (beside && begin % group_inputs == 0) half += view.group_bytes;
            const int count = static_cast<int>(std::clamp<int64_t>(num_inputs - begin, 0, kHalfColumns));
            for (int row = 0; row < num_rows; ++row) {
                const int zero_point =
                    list_steps == nullptr ? 0 : zero_point_of(view, panel, begin / kBlockInputs, row);
                uint8_t codes[kHalfColumns];  // or each store to the panel might change what is read next
                int kept = 0;
                for (int i = 0; i < count; ++i) codes[i] = read(first + row, begin + i);
                for (int i = 0; i < count; ++i) kept += codes[i] != zero_point;
                for (int i = 0; i < count; ++i) Bits::place(half, i / 4, row * 4 + i % 4, codes[i]);
                counts[row] += kept;
            }
            if (list_steps != nullptr) {
                // Padding would make lists long.
                for (int row = 0; row < kPanelOutputs; ++row)
                    for (int i = row < num_rows ? count : 0; i < kHalfColumns; ++i)
                        Bits::place(half, i / 4, row * 4 + i % 4,
                                    static_cast<uint8_t>(zero_point_of(view, panel, begin / kBlockInputs, row)));
                if (begin % kBlockInputs != 0) {
                    list_steps[panel] += steps_of_lists(counts);
                    std::fill(counts, counts + kPanelOutputs, 0);
                }
            }
            half += Bits::kHalfBytes;
        }
    });
}

// `codes`: every row a run of codes of kBits bits.
template <class Bits, int kBits>
void pack_runs(Packing& packing) {
    const int64_t row_bytes = ceil_div(packing.view.num_inputs * kBits, 8);
    const uint8_t* codes = packing.take("codes", Element::u8, packing.view.num_outputs * row_bytes);
    pack_bits<Bits, (kBits > 1)>(
        packing, [&](int64_t row, int64_t column) { return code_of_run(codes + row * row_bytes, column, kBits); });
}

namespace reference {

template <class Bits>
struct BitStream : PanelStream {
    using PanelStream::PanelStream;
    void block(const uint8_t*, uint8_t* out) {
        for (int step = 0; step < 2 * kHalfSteps; ++step) {
            const uint8_t* half = values + step / kHalfSteps * Bits::kHalfBytes;
            for (int byte = 0; byte < 64; ++byte)
                out[(step * 4 + byte % 4) * kPanelOutputs + byte / 4] = Bits::code(half, step % kHalfSteps, byte);
        }
        values += 2 * Bits::kHalfBytes;
    }
};

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {

// Expands half a block at a time.
template <class Bits>
struct BitStream : PanelStream {
    static constexpr bool kSmallCodes = true;
    alignas(32) uint8_t steps[kHalfSteps * 64];
    int next_step = 0;
    void set_zero_points(const __m256i (&)[kHalves]) {}
    void next(__m256i (&even)[kHalves], __m256i (&odd)[kHalves]) {
        if (next_step == 0) {
            Bits::expand(values, steps);
            values += Bits::kHalfBytes;
        }
        UNROLL for (int half = 0; half < kHalves; ++half) {
            even[half] = load(steps + next_step * 64 + 32 * half);
            odd[half] = load(steps + next_step * 64 + 64 + 32 * half);
        }
        next_step = (next_step + 2) % kHalfSteps;
    }
};

inline __m256i bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

#include "matmul/encodings/mask_lists_avx512.h"

namespace rarefy::matmul::avx512 {

// For many rows: expands half a block at a time.
template <class Bits>
struct BitStream : PanelStream {
    static constexpr int kOddShift = 0;
    static constexpr bool kExpandsOnce = true;
    alignas(64) uint8_t steps[kHalfSteps * 64];
    int64_t group_bytes, group_halves, left = 0;  // left: half blocks of the group
    int next_step = 0;
    void start(const PanelWeights& w, int64_t panel) {
        PanelStream::start(w, panel);
        group_bytes = w.group_bytes;
        group_halves = w.segments_per_group * (w.steps_per_segment / kHalfSteps);
    }
    void fetch(int num_steps) const {
        prefetch<2048>(values, num_steps * Bits::kHalfBytes / kHalfSteps + (left == 0 ? group_bytes : 0));
    }
    void next(__m512i, __m512i& even, __m512i& odd) {
        if (next_step == 0) {
            if (left == 0) {
                left = group_halves;
                values += group_bytes;
            }
            --left;
            Bits::expand(values, steps);
            values += Bits::kHalfBytes;
        }
        even = load(steps + next_step * 64);
        odd = load(steps + next_step * 64 + 64);
        next_step = (next_step + 2) % kHalfSteps;
    }
};

inline __m512i bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// kRows rows of activations by kPanels panels, `distance` apart; see walk_int.
template <class Bits, int kRows, int kPanels, int kSteps, bool kSymmetric>
void walk_bits(const PanelWeights& w, const Rows& rows, const Part& part, int64_t panel, int64_t distance) {
    const int64_t row = part.row_begin;
    const int8_t* q = rows.q + row * rows.stride;
    const float* row_scales = rows.scales + row * rows.num_blocks;
    const int32_t* half_sums = rows.sums + row * rows.num_blocks * 2;
    const uint8_t *values[kPanels], *groups[kPanels];
    __m512 totals[kPanels][kRows], scales[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
        values[p] = w.values + w.value_offsets[panel + p * distance];
        UNROLL for (int r = 0; r < kRows; ++r) { totals[p][r] = _mm512_setzero_ps(); }
    }
    const int64_t ahead = near_or_far();
    int64_t left = 0;  // segments of the group
    for (int64_t segment = 0; segment < w.num_blocks * (16 / kSteps); ++segment, --left) {
        if (left == 0) {
            left = w.segments_per_group;
            UNROLL for (int p = 0; p < kPanels; ++p) {
                prefetch_in_order(values[p] + ahead);
                groups[p] = values[p];
                values[p] += w.group_bytes;
                scales[p] = widen_bf16(groups[p]);
            }
        }
        Sums sums[kPanels][kRows][Bits::kSums];
        UNROLL for (int r = 0; r < kRows; ++r) {
            const int32_t sum = segment_sum<kSteps>(half_sums + r * rows.num_blocks * 2, segment);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                sums[p][r][0] = kSymmetric ? reinterpret_cast<Sums>(_mm512_set1_epi32(-w.zero_point * sum))
                                           : times(widen_bytes(groups[p] + 2 * kPanelOutputs), -sum);
                UNROLL for (int k = 1; k < Bits::kSums; ++k) { sums[p][r][k] = Sums{}; }
            }
        }
        UNROLL for (int half = 0; half < kSteps / kHalfSteps; ++half, q += 4 * kHalfSteps) {
            // A line of each panel in turns, each stream in the order of memory.
            __m512i lines[kPanels][Bits::kHalfBytes / 64];
            UNROLL for (int r = 0; r < kRows; ++r) {
                __m512i half_q[kHalfSteps];
                UNROLL for (int step = 0; step < kHalfSteps; ++step) {
                    half_q[step] = broadcast_4(q + r * rows.stride + 4 * step);
                }
                UNROLL for (int line = 0; line < Bits::kHalfBytes / 64; ++line) {
                    UNROLL for (int p = 0; p < kPanels; ++p) {
                        if (r == 0) lines[p][line] = load_next(values[p] + 64 * line, ahead);
                        Bits::add(line, lines[p], half_q, sums[p][r]);
                    }
                }
            }
            UNROLL for (int p = 0; p < kPanels; ++p) { values[p] += Bits::kHalfBytes; }
        }
        UNROLL for (int r = 0; r < kRows; ++r) {
            const __m512 row_scale = _mm512_set1_ps(row_scales[r * rows.num_blocks + segment * kSteps / 16]);
            UNROLL for (int p = 0; p < kPanels; ++p) {
                Sums dots = sums[p][r][0];
                UNROLL for (int k = 1; k < Bits::kSums; ++k) { dots += sums[p][r][k] >> Bits::kShifts[k]; }
                totals[p][r] = _mm512_fmadd_ps(to_floats(dots), _mm512_mul_ps(row_scale, scales[p]), totals[p][r]);
            }
        }
    }
    UNROLL for (int p = 0; p < kPanels; ++p) {
        float* y = part.y + row * part.y_stride + (panel + p * distance) * kPanelOutputs;
        const __m512 factor = output_factor(w, panel + p * distance, true);
        UNROLL for (int r = 0; r < kRows; ++r) {
            Lanes(w, panel + p * distance, y + r * part.y_stride).store(_mm512_mul_ps(totals[p][r], factor));
        }
    }
}

template <class Bits, int kRows, int kSteps, bool kSymmetric>
void walk_bits_panels(const PanelWeights& w, const Rows& rows, const Part& part) {
    walk_panels(w, rows, part, walk_bits<Bits, kRows, 2, kSteps, kSymmetric>,
                walk_bits<Bits, kRows, 1, kSteps, kSymmetric>);
}

// Two and three rows go as one does: storing codes and loading them takes longer. Those of more have no registers.
template <class Bits, int kSteps, bool kSymmetric>
void multiply_bits_as(const PanelWeights& w, const Rows& rows, const Part& part) {
    switch (part.row_end - part.row_begin) {
        case 1: return walk_bits_panels<Bits, 1, kSteps, kSymmetric>(w, rows, part);
        case 2: return walk_bits_panels<Bits, 2, kSteps, kSymmetric>(w, rows, part);
        case 3: return walk_bits_panels<Bits, 3, kSteps, kSymmetric>(w, rows, part);
        default: return many_rows_or_lists<BitStream<Bits>, BitStream<Bits>, true>(w, rows, part);
    }
}

template <class Bits, int kSteps>
void multiply_bits_steps(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.zero_points == nullptr)
        multiply_bits_as<Bits, kSteps, true>(w, rows, part);
    else
        multiply_bits_as<Bits, kSteps, false>(w, rows, part);
}

template <class Bits>
void multiply_bits(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.steps_per_segment == 16)
        multiply_bits_steps<Bits, 16>(w, rows, part);
    else
        multiply_bits_steps<Bits, 8>(w, rows, part);
}

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
// Expands half a block at a time.
template <class Bits>
struct BitStream : PanelStream {
    static constexpr bool kSmallCodes = true;
    alignas(16) uint8_t steps[kHalfSteps * 64];
    int next_step = 0;
    void set_zero_points(const Bytes (&)[kQuarters]) {}
    void next(Bytes (&even)[kQuarters], Bytes (&odd)[kQuarters]) {
        if (next_step == 0) {
            UNROLL for (int i = 0; i < 64; i += 16) { Bits::expand(values + i, steps + i); }
            values += Bits::kHalfBytes;
        }
        UNROLL for (int i = 0; i < kQuarters; ++i) {
            even[i] = load(steps + next_step * 64 + 16 * i);
            odd[i] = load(steps + next_step * 64 + 64 + 16 * i);
        }
        next_step = (next_step + 2) % kHalfSteps;
    }
};

}  // namespace rarefy::matmul::neon

#endif
