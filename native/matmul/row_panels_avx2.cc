// Makes the lanes of rows with AVX2.
#include "matmul/row_panels.h"
#include "matmul/vectors_avx2.h"

namespace rarefy::matmul {
namespace {

// Rows and columns of 16 x 16 bytes, in both halves of the vectors.
inline void transpose_bytes(__m256i (&rows)[16]) {
    UNROLL for (int round = 0; round < 4; ++round) {
        __m256i mixed[16];
        UNROLL for (int i = 0; i < 8; ++i) {
            mixed[2 * i] = _mm256_unpacklo_epi8(rows[i], rows[i + 8]);
            mixed[2 * i + 1] = _mm256_unpackhi_epi8(rows[i], rows[i + 8]);
        }
        UNROLL for (int i = 0; i < 16; ++i) { rows[i] = mixed[i]; }
    }
}

// Rows that do not exist are copies of the last one: nobody reads what becomes of them.
inline void find_rows(const Rows& rows, int64_t row, int64_t (&from)[kLaneRows]) {
    for (int r = 0; r < kLaneRows; ++r) from[r] = row + r < rows.num_rows ? row + r : rows.num_rows - 1;
}

}  // namespace

void make_code_lanes_avx2(const Rows& rows, int64_t row, uint8_t* lanes) {
    using namespace avx2;
    const int64_t stride = lane_stride(rows.num_rows);
    int64_t from[kLaneRows];
    find_rows(rows, row, from);
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
        uint8_t* const out = lanes + block * code_lanes_bytes(stride);
        for (int first = 0; first < kBlockInputs; first += 16) {
            const int8_t* const q = rows.q + block * kBlockInputs + first;
            __m256i vectors[16];
            UNROLL for (int i = 0; i < 16; ++i) {
                const int r = i / 4 * 8 + i % 4;
                vectors[i] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(q + from[r + 4] * rows.stride),
                                                 reinterpret_cast<const __m128i*>(q + from[r] * rows.stride));
            }
            transpose_bytes(vectors);
            UNROLL for (int i = 0; i < 16; ++i) {
                store(out + (first + i) * stride + row, _mm256_xor_si256(vectors[i], _mm256_set1_epi8(-128)));
            }
        }
        auto* const scales = reinterpret_cast<float*>(out + kBlockInputs * stride);
        for (int r = 0; r < kLaneRows; ++r) scales[row + r] = rows.scales[from[r] * rows.num_blocks + block];
    }
}

void make_float_lanes_avx2(const Rows& rows, int64_t row, uint8_t* lanes) {
    using namespace avx2;
    const int64_t stride = lane_stride(rows.num_rows);
    int64_t from[kLaneRows];
    find_rows(rows, row, from);
    auto* out = reinterpret_cast<float*>(lanes) + row;
    for (int64_t column = 0; column < rows.num_blocks * kBlockInputs; column += 8) {
        for (int first = 0; first < kLaneRows; first += 8) {
            __m256 some[8];
            UNROLL for (int i = 0; i < 8; ++i) {
                some[i] = _mm256_loadu_ps(rows.x + from[first + i] * rows.stride + column);
            }
            transpose_floats(some);
            UNROLL for (int i = 0; i < 8; ++i) { _mm256_storeu_ps(out + (column + i) * stride + first, some[i]); }
        }
    }
}

}  // namespace rarefy::matmul
