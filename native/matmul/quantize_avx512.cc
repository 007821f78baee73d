// Quantizes and rounds activations with AVX-512.
#include <immintrin.h>

#include "matmul/kernels.h"
#include "matmul/quantize_rows.h"

namespace rarefy::matmul {

#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int64_t kAhead = 512;  // floats; rows seldom come from a nearer cache than the last level
constexpr int kInfinityBits = 0x7f800000;

// As integers magnitudes keep their order, and infinity and NaN come last.
inline __m512i larger_magnitude(__m512i magnitude, __m512 values) {
    return _mm512_max_epi32(magnitude, _mm512_castps_si512(_mm512_andnot_ps(_mm512_set1_ps(-0.0f), values)));
}

// The integers of a block, and in the lanes sums of 4 columns of them. No product exceeds 127: 127 / amax is rounded by
// less than what the rounding to an integer takes off again.
__attribute__((always_inline)) inline __m512i quantize_block(const __m512 (&values)[4], __m512 factor, int8_t* q) {
    const __m512i bytes_in_order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    __m512i quarters[4];
    UNROLL for (int i = 0; i < 4; ++i) { quarters[i] = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor)); }
    const __m512i words_0 = _mm512_packs_epi32(quarters[0], quarters[1]);
    const __m512i words_1 = _mm512_packs_epi32(quarters[2], quarters[3]);
    const __m512i bytes = _mm512_permutexvar_epi32(bytes_in_order, _mm512_packs_epi16(words_0, words_1));
    _mm512_storeu_si512(q, bytes);
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
}

// One block, of which `left` columns or all 64 are there.
__attribute__((noinline)) void quantize_one(const float* x, int64_t left, int8_t* q, float* scale, int32_t* sums) {
    __m512 values[4];
    __m512i magnitude = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < 4; ++i) {
        const int64_t some = left - 16 * i;
        const auto lanes = static_cast<__mmask16>(some >= 16 ? 0xffff : some <= 0 ? 0 : (1 << some) - 1);
        values[i] = _mm512_maskz_loadu_ps(lanes, x + 16 * i);
        magnitude = larger_magnitude(magnitude, values[i]);
    }
    const int32_t bits = _mm512_reduce_max_epi32(magnitude);
    const bool finite = bits < kInfinityBits;
    float amax;
    __builtin_memcpy(&amax, &bits, 4);
    const float infinity = __builtin_inff();
    const float inverse = bits > 0 ? 127.0f / amax : infinity;
    const bool usable = finite && inverse < infinity;
    UNROLL for (int i = 0; i < 4; ++i) {
        if (!usable) values[i] = _mm512_setzero_ps();
    }
    *scale = !finite ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
    __m512i lanes = quantize_block(values, _mm512_set1_ps(usable ? inverse : 0.0f), q);
    lanes = _mm512_add_epi32(lanes, _mm512_shuffle_epi32(lanes, _MM_PERM_BADC));
    lanes = _mm512_add_epi32(lanes, _mm512_shuffle_epi32(lanes, _MM_PERM_CDAB));
    lanes = _mm512_add_epi32(lanes, _mm512_shuffle_i64x2(lanes, lanes, _MM_PERM_CDAB));
    const __m128i halves = _mm_unpacklo_epi32(_mm512_castsi512_si128(lanes), _mm512_extracti32x4_epi32(lanes, 2));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(sums), halves);
}

// In lane i of each quarter what `join` makes of that quarter of vector i.
template <class Join>
inline __m512i join_quarters(const __m512i (&of)[4], Join join) {
    const __m512i first = join(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
    const __m512i second = join(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
    return join(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}

// The scales of up to four whole blocks, and what to multiply them by, whose steps from a vector to a number are taken
// together. Blocks that are too small become zeros with a factor of zero. False where a number is not finite.
template <int kBlocks>
__attribute__((always_inline)) inline bool find_factors(const float* x, float* scales, float* factors) {
    constexpr auto kStored = static_cast<__mmask8>((1 << kBlocks) - 1);
    __m512i lanes[4] = {};
    UNROLL for (int block = 0; block < kBlocks; ++block) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const float* from = x + block * kBlockInputs + 16 * i;
            _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
            lanes[block] = larger_magnitude(lanes[block], _mm512_loadu_ps(from));
        }
    }
    __m512i most = join_quarters(lanes, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); });
    most = _mm512_max_epi32(most, _mm512_shuffle_i64x2(most, most, _MM_PERM_BADC));
    most = _mm512_max_epi32(most, _mm512_shuffle_i64x2(most, most, _MM_PERM_CDAB));
    const __m128i bits = _mm512_castsi512_si128(most);
    const __m128 amax = _mm_castsi128_ps(bits), inverse = _mm_div_ps(_mm_set1_ps(127.0f), amax);
    const __mmask16 usable = _mm_cmp_ps_mask(inverse, _mm_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    _mm_mask_storeu_ps(scales, kStored, _mm_maskz_div_ps(usable, amax, _mm_set1_ps(127.0f)));
    _mm_store_ps(factors, _mm_maskz_mov_ps(usable, inverse));
    return _mm_cmpge_epi32_mask(bits, _mm_set1_epi32(kInfinityBits)) == 0;
}

// The same blocks, multiplied and rounded, each to its place; `byte_starts` may be null.
template <int kBlocks>
__attribute__((always_inline)) inline void quantize_blocks(const float* x, const float* factors, int8_t* const (&q)[4],
                                                           int32_t* sums, int32_t* byte_starts) {
    constexpr auto kStored = static_cast<__mmask8>((1 << kBlocks) - 1);
    constexpr auto kHalves = static_cast<__mmask8>((1 << 2 * kBlocks) - 1);
    static_assert(kByteZeroPoint == 1 << 7);
    __m512i lanes[4] = {};
    UNROLL for (int block = 0; block < kBlocks; ++block) {
        __m512 values[4];
        UNROLL for (int i = 0; i < 4; ++i) { values[i] = _mm512_loadu_ps(x + block * kBlockInputs + 16 * i); }
        lanes[block] = quantize_block(values, _mm512_set1_ps(factors[block]), q[block]);
    }
    // As words, of which two beside each other are added.
    const __m512i ones = _mm512_set1_epi16(1);
    const __m512i first_two = _mm512_madd_epi16(_mm512_packs_epi32(lanes[0], lanes[1]), ones);
    const __m512i last_two = _mm512_madd_epi16(_mm512_packs_epi32(lanes[2], lanes[3]), ones);
    __m512i quarters = _mm512_madd_epi16(_mm512_packs_epi32(first_two, last_two), ones);
    quarters = _mm512_add_epi32(quarters, _mm512_shuffle_i64x2(quarters, quarters, _MM_PERM_CDAB));
    const __m128i first = _mm512_castsi512_si128(quarters), second = _mm512_extracti32x4_epi32(quarters, 2);
    const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi32(first, second));
    _mm256_mask_storeu_epi32(sums, kHalves, _mm256_inserti128_si256(low, _mm_unpackhi_epi32(first, second), 1));
    if (byte_starts == nullptr) return;
    const __m128i minus = _mm_sub_epi32(_mm_setzero_si128(), _mm_add_epi32(first, second));
    _mm_mask_storeu_epi32(byte_starts, kStored, _mm_slli_epi32(minus, 7));
}

// The blocks of some rows, four at a time.
struct Blocks {
    const float* x;
    int8_t* q;  // of the next block
    float* scales;
    int32_t *sums, *byte_starts;
    int64_t num_blocks, gap, left;  // of a row; from its end to the next; that are left of it
    alignas(16) float factors[2][4];

    // Those from `block` on. False where a number is not finite.
    template <int kBlocks>
    __attribute__((always_inline)) bool find(int64_t block) {
        return find_factors<kBlocks>(x + block * kBlockInputs, scales + block, factors[block / 4 % 2]);
    }
    // The same ones, when the factors are found.
    template <int kBlocks>
    __attribute__((always_inline)) void quantize(int64_t block, bool is_finite) {
        int8_t* to[4];
        for (int i = 0; i < kBlocks; ++i, q += kBlockInputs) {
            to[i] = q;
            if (--left > 0) continue;
            left = num_blocks;
            q += gap;
        }
        int32_t* const starts = byte_starts == nullptr ? nullptr : byte_starts + block;
        if (is_finite) {
            quantize_blocks<kBlocks>(x + block * kBlockInputs, factors[block / 4 % 2], to, sums + 2 * block, starts);
            return;
        }
        for (int i = 0; i < kBlocks; ++i) {
            int32_t* const halves = sums + 2 * (block + i);
            quantize_one(x + (block + i) * kBlockInputs, kBlockInputs, to[i], scales + block + i, halves);
            if (starts != nullptr) starts[i] = -kByteZeroPoint * (halves[0] + halves[1]);
        }
    }
};

template <int kBlocks>
bool find_some(Blocks& blocks, int64_t block) {
    return blocks.find<kBlocks>(block);
}
template <int kBlocks>
void quantize_some(Blocks& blocks, int64_t block, bool is_finite) {
    blocks.quantize<kBlocks>(block, is_finite);
}

}  // namespace

// What waits for a factor would fill the queues, and the next blocks would wait behind it. So the factors of four
// blocks, be they of two rows, are on their way while the four before are multiplied. As long as there are four after
// four nothing is called: what functions of vectors end with (vzeroupper) takes a twentieth of the time.
void quantize_rows_avx512(const float* x, int64_t num_rows, int64_t num_blocks, int8_t* q, int64_t stride,
                          float* scales, int32_t* sums, int32_t* byte_starts) {
    constexpr decltype(&find_some<1>) kFinders[] = {find_some<1>, find_some<2>, find_some<3>, find_some<4>};
    constexpr decltype(&quantize_some<1>) kQuantizers[] = {quantize_some<1>, quantize_some<2>, quantize_some<3>,
                                                           quantize_some<4>};
    const int64_t total = num_rows * num_blocks;
    Blocks blocks{x, q, scales, sums, byte_starts, num_blocks, stride - num_blocks * kBlockInputs, num_blocks, {}};
    const auto count_at = [&](int64_t block) { return total - block < 4 ? total - block : 4; };
    const auto find = [&](int64_t block) { return block >= total || kFinders[count_at(block) - 1](blocks, block); };
    bool is_finite = find(0);
    int64_t block = 0;
    for (; block + 8 <= total; block += 4) {
        const bool next_is_finite = blocks.find<4>(block + 4);
        blocks.quantize<4>(block, is_finite);
        is_finite = next_is_finite;
    }
    for (; block < total; block += 4) {
        const bool next_is_finite = find(block + 4);
        kQuantizers[count_at(block) - 1](blocks, block, is_finite);
        is_finite = next_is_finite;
    }
}

void quantize_row_avx512(const float* x, int64_t num_inputs, int8_t* q, int16_t*, float* scales, int32_t* sums) {
    const int64_t num_whole = num_inputs / kBlockInputs, left = num_inputs % kBlockInputs;
    const int64_t at = num_whole * kBlockInputs;
    quantize_rows_avx512(x, 1, num_whole, q, at, scales, sums, nullptr);
    if (left > 0) quantize_one(x + at, left, q + at, scales + num_whole, sums + 2 * num_whole);
}

void round_row_avx512(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers)
#include "matmul/round_row.inc"

}  // namespace rarefy::matmul
