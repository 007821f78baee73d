// Many rows by what a bfloat16 weight keeps, for AVX2 and AVX-VNNI. Vectors hold rows (row_panels.h): what an output
// keeps is found in the call (kept_codes_avx2.h), and every value is broadcast and meets a column of 64 rows.
#pragma once

#include "matmul/encodings/kept_codes_avx2.h"

namespace rarefy::matmul::avx2 {

// What a panel keeps of a block, of each output in the order in which sums take columns: the odd one of two first.
struct KeptFloats {
    alignas(32) float values[kPanelOutputs][kBlockInputs + 8];
    alignas(32) uint32_t places[kPanelOutputs][kBlockInputs + 8];  // bytes from the block's first column
    int count[kPanelOutputs];
};

// `values`: 32 steps of two columns, as in dense_bf16.
inline void find_kept(const uint8_t* values, int64_t stride, KeptFloats& kept) {
    alignas(32) uint8_t rows[kPanelOutputs][128];
    UNROLL for (int half = 0; half < 2; ++half) { transpose_lanes(values + 1024 * half, 64, rows[0] + 64 * half, 128); }
    const __m256i column_bytes = _mm256_set1_epi32(static_cast<int>(stride * 4));
    for (int output = 0; output < kPanelOutputs; ++output) {
        int count = 0;
        for (int first = 0; first < kBlockInputs; first += 8) {
            const __m128i pairs = _mm_load_si128(reinterpret_cast<const __m128i*>(rows[output] + 2 * first));
            const __m128i some = _mm_or_si128(_mm_slli_epi32(pairs, 16), _mm_srli_epi32(pairs, 16));
            const __m128i zeros = _mm_cmpeq_epi16(_mm_slli_epi16(some, 1), _mm_setzero_si128());
            const auto bits = static_cast<uint32_t>(~_mm_movemask_epi8(_mm_packs_epi16(zeros, zeros)) & 0xff);
            const __m128i places = _mm_cvtsi64_si128(static_cast<int64_t>(kSetBits.places[bits]));
            const __m128i twice = _mm_slli_epi16(_mm_unpacklo_epi8(places, places), 1);
            const __m128i compressed = _mm_shuffle_epi8(some, _mm_add_epi8(twice, _mm_set1_epi16(0x0100)));
            _mm256_storeu_ps(kept.values[output] + count,
                             _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(compressed), 16)));
            const __m256i columns = _mm256_add_epi32(_mm256_cvtepu8_epi32(_mm_xor_si128(places, _mm_set1_epi8(1))),
                                                     _mm256_set1_epi32(first));
            store(kept.places[output] + count, _mm256_mullo_epi32(columns, column_bytes));
            count += _mm_popcnt_u32(bits);
        }
        kept.count[output] = count;
    }
}

// A block of a panel by kVectors times 8 rows.
template <int kVectors>
void float_lanes_by_block(const KeptFloats& kept, const uint8_t* lanes, LaneTotals& totals, int64_t row) {
    for (int output = 0; output < kPanelOutputs; ++output) {
        __m256 sums[kVectors];
        UNROLL for (int v = 0; v < kVectors; ++v) { sums[v] = _mm256_setzero_ps(); }
        ONE_BY_ONE for (int i = 0; i < kept.count[output]; ++i) {
            const __m256 value = _mm256_broadcast_ss(kept.values[output] + i);
            const auto* x = reinterpret_cast<const float*>(lanes + kept.places[output][i]);
            UNROLL for (int v = 0; v < kVectors; ++v) {
                sums[v] = _mm256_fmadd_ps(_mm256_load_ps(x + 8 * v), value, sums[v]);
            }
        }
        float* const total = totals.sums[output] + row;
        UNROLL for (int v = 0; v < kVectors; ++v) {
            _mm256_store_ps(total + 8 * v, _mm256_add_ps(_mm256_load_ps(total + 8 * v), sums[v]));
        }
    }
}

// Whether what is left out would have added nothing.
inline bool all_finite(const Rows& rows, const Part& part) {
    float sum = 0;
    for (int64_t row = part.row_begin; row < part.row_end; ++row) sum += rows.starts[row];
    return sum == 0;
}

inline void multiply_float_lanes(const PanelWeights& w, const Rows& rows, const Part& part) {
    const int64_t stride = lane_stride(rows.num_rows);
    const int64_t block_bytes = float_lanes_bytes(stride);
    const int64_t num_rows = (part.row_end - part.row_begin + kLaneRows - 1) / kLaneRows * kLaneRows;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        LaneTotals totals;
        totals.clear(num_rows);
        const uint8_t* values = w.values + w.value_offsets[panel];
        const uint8_t* lanes = rows.lanes + part.row_begin * 4;
        for (int64_t block = 0; block < w.num_blocks; ++block, values += 2048, lanes += block_bytes) {
            KeptFloats kept;
            find_kept(values, stride, kept);
            int64_t row = 0;
            for (; row + 64 <= num_rows; row += 64) float_lanes_by_block<8>(kept, lanes + row * 4, totals, row);
            if (row < num_rows) float_lanes_by_block<4>(kept, lanes + row * 4, totals, row);
        }
        write_lanes(w, part, panel, totals);
    }
}

}  // namespace rarefy::matmul::avx2
