// What one row and many rows of the AVX-512 kernels of N:M share: where lists lie (nm.h), and how columns and codes are
// unpacked from them.
#pragma once

#include "matmul/encodings/lists_avx512.h"

namespace rarefy::matmul::avx512 {

// How a panel's lists lie in memory, and what unpacks them.
struct ListShape {
    int64_t index_bytes, code_bytes;  // of one step
    int64_t column_bytes;             // of a segment, in front of its codes
    int64_t segment_bytes;
    int steps;
    __m512i spread, shifts, low_bits;
    const uint8_t* firsts = nullptr;
    ListShape(const PanelWeights& w, int code_bits) {
        const int64_t index_bits = w.parameter / 256;
        steps = static_cast<int>(w.parameter % 256);
        index_bytes = 8 * index_bits;
        code_bytes = 8 * code_bits;
        column_bytes = index_bits == 0 ? 128 : steps * index_bytes;
        segment_bytes = column_bytes + steps * code_bytes;
        spread = shifts = low_bits = _mm512_setzero_si512();
        if (index_bits == 0) return;
        spread = load(w.table);
        shifts = load(w.table + 64);
        low_bits = _mm512_set1_epi8(static_cast<char>((1 << index_bits) - 1));
        firsts = w.table + 128;
    }
    // Where in the values a segment begins.
    int64_t place_of(const PanelWeights& w, int64_t panel, int64_t segment) const {
        return w.group_place(panel, segment / w.segments_per_group) + w.group_bytes +
               segment % w.segments_per_group * segment_bytes;
    }
    // Numbers of a stream, with bits of others above theirs.
    __m512i unpacked(const uint8_t* stream) const {
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, in_order(load(stream))));
    }
    // Columns of the segment from indices that have other bits above theirs.
    __m512i columns(__m512i indices, int step) const {
        return _mm512_ternarylogic_epi32(indices, low_bits, load(firsts + 64 * step), 0xea);  // (a & b) | c
    }
};

// 32 bytes; their low nibbles, and from element 32 on the high ones, with bits of others above.
inline __m512i spread_halves(const uint8_t* from) {
    const __m512i twice = in_order(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
    return _mm512_multishift_epi64_epi8(
        _mm512_set_epi64(0x3c342c241c140c04, 0x3c342c241c140c04, 0x3c342c241c140c04, 0x3c342c241c140c04,
                         0x3830282018100800, 0x3830282018100800, 0x3830282018100800, 0x3830282018100800),
        twice);
}

// The codes of kSteps steps; of 4 bits, those of odd steps come shifted left by 4 bits.
template <int kBits, int kSteps>
inline void load_codes(const uint8_t* from, __m512i (&codes)[kSteps]) {
    const __m512i low = _mm512_set1_epi8(15);
    if constexpr (kBits == 8) {
        UNROLL for (int i = 0; i < kSteps; ++i) { codes[i] = in_order(load(from + 64 * i)); }
    } else if constexpr (kSteps == 1) {
        codes[0] = _mm512_and_si512(spread_halves(from), low);
    } else {
        UNROLL for (int i = 0; i < kSteps; i += 2) {
            const __m512i both = in_order(load(from + 32 * i));
            codes[i] = _mm512_and_si512(both, low);
            codes[i + 1] = _mm512_andnot_si512(low, both);
        }
    }
}

// How the columns of lists are told (nm.h): kUnit steps are read at once, and kTail may be left over. The columns of
// steps from `step` on; `from` is what belongs to them. vpermb passes over the upper two bits of a column.
struct StreamsOfIndices {
    static constexpr int kQuarters = 0;
    static constexpr int kUnit = 2, kTail = 1;
    template <int kSteps>
    static void unpack(const ListShape& shape, const uint8_t* from, int step, __m512i (&columns)[kSteps]) {
        UNROLL for (int i = 0; i < kSteps; ++i) {
            columns[i] = shape.columns(shape.unpacked(from + i * shape.index_bytes), step + i);
        }
    }
};

struct Fours {
    static constexpr int kQuarters = 0;
    static constexpr int kUnit = 4, kTail = 0;
    template <int kSteps>
    static void unpack(const ListShape& shape, const uint8_t* from, int step, __m512i (&columns)[kSteps]) {
        const __m512i four = in_order(load(from));
        UNROLL for (int i = 0; i < kSteps; ++i) {
            columns[i] = shape.columns(i == 0 ? four : _mm512_srli_epi16(four, 2 * i), step + i);
        }
    }
};

template <int kIndexBits>
struct Sixes {
    static constexpr int kQuarters = 0;
    static constexpr int kTail = 6 / kIndexBits, kUnit = 2 * kTail;
    template <int kSteps>
    static void unpack(const ListShape& shape, const uint8_t* from, int step, __m512i (&columns)[kSteps]) {
        __m512i sixes[kSteps / kTail];
        if constexpr (kSteps == kTail) {
            sixes[0] = shape.unpacked(from);
        } else {
            sixes[0] = in_order(load(from));
            const __m512i low = spread_halves(from + 64), high = _mm512_srli_epi16(sixes[0], 2);
            sixes[1] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x30), high, low, 0xca);  // a ? b : c
        }
        UNROLL for (int i = 0; i < kSteps; ++i) {
            const __m512i six = sixes[i / kTail];
            if constexpr (kIndexBits == 6)
                columns[i] = six;
            else
                columns[i] = shape.columns(i % 2 == 0 ? six : _mm512_srli_epi16(six, kIndexBits), step + i);
        }
    }
};

// Masks instead: of 16 * kQuarters entries.
template <int kSixteens>
struct Masks {
    static constexpr int kQuarters = kSixteens;
    static constexpr int kUnit = 2, kTail = 1;
};

// Calls run(StepCount of some steps, first step) for all steps of a segment.
template <int kSteps>
struct StepCount {
    static constexpr int value = kSteps;
};
template <class Lists, class Run>
__attribute__((always_inline)) inline void for_units(int steps, Run run) {
    int step = 0;
    for (; step + Lists::kUnit <= steps; step += Lists::kUnit) run(StepCount<Lists::kUnit>(), step);
    if constexpr (Lists::kTail > 0) {
        if (step < steps) run(StepCount<Lists::kTail>(), step);
    }
}

// What each output's mask keeps of `source`, as lists: steps[s] has entries 4s to 4s + 3 of every output. Places that
// no entry takes keep what `source` has there: their codes are zero points. (Where a mask zeroes them, vpcompressb
// waits for the old value of its register on Zen 5.)
template <int kQuarters>
inline void compress_lists(__m512i source, const uint8_t* masks, __m512i* steps) {
    const auto compress = [&](int output) {
        return _mm512_mask_compress_epi8(source, load_u64(masks + 8 * output), source);
    };
    steps_of_lists<kQuarters>(compress, steps);
}

}  // namespace rarefy::matmul::avx512
