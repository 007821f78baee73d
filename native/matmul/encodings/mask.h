// What the encodings under a mask share. A panel is one stream of its segments, of bfloat16 its blocks: each has first
// its mask, one bit per element, step by step in the order of the steps' vectors, and then its kept elements in the
// order of the bits.
// Codes of 4 bits have arrangements of their own (mask_int4.cc).
// `extra`, of codes whose segments are blocks: an int32 for each panel, how many steps lists of its blocks take
// (mask_lists_avx512.h).
#pragma once

#include "matmul/encodings/encodings.h"

namespace rarefy::matmul {

constexpr int kMaskBytes = kPanelOutputs / 8;  // of a column of a panel

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE || RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

// Bits of the codes on disk, of formats whose kernels read 4.
inline int stored_bits(const std::string& format) {
    for (const int num_bits : {2, 3})
        if (format.find("-int" + std::to_string(num_bits) + "-") != std::string::npos) return num_bits;
    return 4;
}

}  // namespace rarefy::matmul

#endif

#if RAREFY_PASS_AVX2 || RAREFY_PASS_NEON

namespace rarefy::matmul {

// Shuffles that spread the first elements of a vector over the set bits of an 8-bit mask; 0x80 where a bit is not set.
struct Shuffles {
    uint64_t bytes[256];
    uint64_t words[256][2];
};

constexpr Shuffles make_shuffles() {
    Shuffles shuffles{};
    for (int mask = 0; mask < 256; ++mask) {
        uint64_t next = 0;
        for (int bit = 0; bit < 8; ++bit) {
            const bool kept = mask >> bit & 1;
            shuffles.bytes[mask] |= (kept ? next : 0x80) << (8 * bit);
            shuffles.words[mask][bit / 4] |= (kept ? 2 * next | (2 * next + 1) << 8 : 0x8080) << (16 * (bit % 4));
            next += kept;
        }
    }
    return shuffles;
}

alignas(64) inline constexpr Shuffles kShuffles = make_shuffles();

}  // namespace rarefy::matmul

#endif

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

// A bit mask as it is on disk: rows of whole bytes, column i is bit i % 8 of byte i / 8.
struct DiskMask {
    const uint8_t* bytes;
    int64_t row_bytes;
    std::vector<int64_t> row_starts;  // index of each row's first value, and of the end

    // Checks the padding bits, and counts.
    explicit DiskMask(Packing& packing);
    // Bits [64 * block, 64 * block + 64) of a row.
    uint64_t block(int64_t row, int64_t block) const;
};

// Codes or bfloat16 as they are on disk, row by row behind their mask: as many as it says. Throws otherwise.
struct DiskValues {
    const DiskMask mask;
    const uint8_t* bytes;
    int stored_bits;  // of each
    DiskValues(Packing& packing, const char* name, Element element, int num_bits)
        : mask(packing), stored_bits(num_bits) {
        const NamedArray& stored = packing.take(name, element);
        require(stored.num_bytes == ceil_div(mask.row_starts.back() * stored_bits, 8),
                "the mask does not fit the values");
        bytes = stored.bytes;
    }
    uint8_t code(int64_t index) const {
        return stored_bits == 4 ? nibble(bytes, index) : code_of_run(bytes, index, stored_bits);
    }
};

// Allocates what `extra` is, or gives null.
inline int32_t* allocate_list_steps(Packing& packing) {
    if (packing.view.steps_per_segment != 16) return nullptr;
    uint8_t* const extra = packing.allocate(packing.view.num_panels * static_cast<int64_t>(sizeof(int32_t)));
    packing.view.extra = extra;
    return reinterpret_cast<int32_t*>(extra);
}

// Of a block, from how many codes of each output are not the zero point.
inline int steps_of_lists(const int (&counts)[kPanelOutputs]) {
    int most = 0;
    for (const int count : counts) most = count > most ? count : most;
    return (most + 3) / 4;
}

// kBits: of a value, 8 or 16.
template <int kBits>
void pack_masked(Packing& packing, const DiskValues& stored);

// The bits of the stored codes, after which the zero points are those of so many bits.
inline int take_stored_bits(Packing& packing) {
    PanelWeights& view = packing.view;
    const int num_bits = stored_bits(packing.format());
    view.zero_point = 1 << (num_bits - 1);
    const int64_t end = view.zero_points == nullptr ? 0 : view.group_place(view.num_panels, 0);
    for (int64_t place = 0; place < end; place += view.group_bytes)
        for (int output = 0; output < kPanelOutputs; ++output)
            require(view.zero_points[place + output] >> num_bits == 0, "zero point out of range");
    return num_bits;
}

// Of processors that may have no instruction for it.
inline int popcount(uint64_t bits) {
    bits -= bits >> 1 & 0x5555555555555555;
    bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
    return static_cast<int>(((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
}

inline uint64_t load_bits(const uint8_t* bytes, int64_t num_bytes) {
    uint64_t bits = 0;
    if (num_bytes == 8) {
        std::memcpy(&bits, bytes, 8);
        return bits;
    }
    for (int64_t i = 0; i < num_bytes; ++i) bits |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    return bits;
}

inline DiskMask::DiskMask(Packing& packing) : row_bytes(ceil_div(packing.view.num_inputs, 8)) {
    const int64_t num_outputs = packing.view.num_outputs;
    const int last_bits = static_cast<int>(packing.view.num_inputs % 8);
    bytes = packing.take("mask", Element::u8, num_outputs * row_bytes);
    row_starts.resize(static_cast<size_t>(num_outputs) + 1);
    int64_t total = 0;
    for (int64_t row = 0; row < num_outputs; ++row) {
        row_starts[static_cast<size_t>(row)] = total;
        for (int64_t i = 0; i < packing.view.num_blocks; ++i) total += popcount(block(row, i));
        require(last_bits == 0 || bytes[(row + 1) * row_bytes - 1] >> last_bits == 0,
                "mask has bits beyond the last column");
    }
    row_starts.back() = total;
}

inline uint64_t DiskMask::block(int64_t row, int64_t block) const {
    const int64_t left = row_bytes - block * 8;
    return load_bits(bytes + row * row_bytes + block * 8, left < 8 ? left : 8);
}

inline int zero_point_of(const PanelWeights& w, int64_t panel, int64_t segment, int row) {
    if (w.zero_points == nullptr) return w.zero_point;
    return w.zero_points[w.group_place(panel, segment / w.segments_per_group) + row];
}

template <int kBits>
void pack_masked(Packing& packing, const DiskValues& stored) {
    constexpr int kColumns = 32 / kBits;  // per step
    constexpr int kSteps = kBlockInputs / kColumns;
    constexpr int kStepBytes = kColumns * kMaskBytes;
    constexpr int kValueBytes = kBits / 8;
    constexpr uint64_t kStepBits = (uint64_t{1} << kColumns) - 1;
    const DiskMask& mask = stored.mask;
    const int64_t num_blocks = packing.view.num_blocks, num_outputs = packing.view.num_outputs;
    const int segment_steps = kBits == 16 ? kSteps : packing.view.steps_per_segment;
    int32_t* const list_steps = allocate_list_steps(packing);
    uint8_t* const values = packing.place_values([&](int64_t panel) {
        const int64_t first = panel * kPanelOutputs;
        const int64_t last = first + kPanelOutputs < num_outputs ? first + kPanelOutputs : num_outputs;
        return num_blocks * kBlockInputs * kMaskBytes +
               (mask.row_starts[static_cast<size_t>(last)] - mask.row_starts[static_cast<size_t>(first)]) * kValueBytes;
    });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        int64_t cursors[kPanelOutputs];
        for (int row = 0; row < num_rows; ++row) cursors[row] = mask.row_starts[static_cast<size_t>(first + row)];
        uint8_t* step_masks = nullptr;
        uint8_t* out = values + packing.view.value_offsets[panel];
        for (int64_t block = 0; block < num_blocks; ++block) {
            uint64_t row_masks[kPanelOutputs];
            for (int row = 0; row < num_rows; ++row) row_masks[row] = mask.block(first + row, block);
            int counts[kPanelOutputs] = {};  // of codes that are not the zero point
            int zero_points[kPanelOutputs];
            for (int row = 0; list_steps != nullptr && row < num_rows; ++row)
                zero_points[row] = zero_point_of(packing.view, panel, block, row);
            for (int step = 0; step < kSteps; ++step, step_masks += kStepBytes) {
                if (step % segment_steps == 0) {
                    step_masks = out;
                    out += segment_steps * kStepBytes;
                }
                uint64_t step_mask = 0;
                for (int row = 0; row < num_rows; ++row) {
                    const uint64_t kept = row_masks[row] >> (step * kColumns) & kStepBits;
                    step_mask |= kept << (row * kColumns);
                    for (int i = popcount(kept); i > 0; --i) {
                        const uint8_t* const value = stored.bytes + cursors[row]++ * kValueBytes;
                        if (list_steps != nullptr) counts[row] += *value != zero_points[row];
                        std::memcpy(out, value, kValueBytes);
                        out += kValueBytes;
                    }
                }
                std::memcpy(step_masks, &step_mask, kStepBytes);
            }
            if (list_steps != nullptr) list_steps[panel] += steps_of_lists(counts);
        }
    });
}

namespace reference {

struct MaskedStream {
    const uint8_t *values, *mask = nullptr;  // values: at first the end of those before
    MaskedStream(const PanelWeights& w, int64_t panel) : values(w.values + w.value_offsets[panel]) {}
    void begin_segment(int num_columns) {
        mask = values;
        values += num_columns * kMaskBytes;
    }
};

inline uint64_t step_mask(const uint8_t* mask, int step, int bytes) {
    uint64_t bits = 0;
    for (int i = 0; i < bytes; ++i) bits |= static_cast<uint64_t>(mask[step * bytes + i]) << (8 * i);
    return bits;
}

template <bool kInt4>
struct CodeStream : MaskedStream {
    const int steps_per_segment;
    const uint8_t* high;  // 4-bit codes: where the high nibbles are
    CodeStream(const PanelWeights& w, int64_t panel)
        : MaskedStream(w, panel), steps_per_segment(w.steps_per_segment), high(values) {}
    void block(const uint8_t* pruned, uint8_t* out) {
        for (int step = 0; step < 16; ++step) {
            if (step % steps_per_segment == 0) {
                if (kInt4) values = std::max(values, high);
                begin_segment(steps_per_segment * 4);
                high = values;
            }
            const uint64_t bits = step_mask(mask, step % steps_per_segment, 8);
            for (int i = 0; i < 64; ++i) {
                uint8_t code = pruned[step / 8 * kPanelOutputs + i / 4];
                if (bits >> i & 1) {
                    if (!kInt4) {
                        code = *values++;
                    } else {
                        code = step % 2 == 0 ? *values++ & 15 : *high++ >> 4;
                    }
                }
                out[(step * 4 + i % 4) * kPanelOutputs + i / 4] = code;
            }
        }
    }
};

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {

struct MaskedStream {
    const uint8_t *values, *mask = nullptr;  // values: at first the end of those before
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void begin_segment(int num_columns) {
        mask = values;
        values += num_columns * kMaskBytes;
    }
};

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
struct MaskedStream {
    const uint8_t *values, *mask = nullptr;  // values: at first the end of those before
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
    void begin_segment(int num_columns) {
        mask = values;
        values += num_columns * kMaskBytes;
    }
};

// The next values of a stream at the set bits of a 16-bit mask, `pruned` at the others: a look-up beyond the vector
// leaves what was there. kShift 4: from the high nibbles.
template <bool kInt4, int kShift>
inline Bytes expand_16(const uint8_t*& values, uint32_t mask, Bytes pruned) {
    const uint32_t first = mask & 0xff, second = mask >> 8;
    const auto num_first = static_cast<uint64_t>(__builtin_popcount(first));
    Bytes codes = load(values);
    values += __builtin_popcount(mask);
    const Bytes order = vcombine_u8(vcreate_u8(kShuffles.bytes[first]),
                                    vcreate_u8(kShuffles.bytes[second] + num_first * 0x0101010101010101));
    if constexpr (kShift == 4) {
        codes = vshrq_n_u8(codes, 4);
    } else if constexpr (kInt4) {
        codes = vandq_u8(codes, vdupq_n_u8(15));
    }
    return vqtbx1q_u8(pruned, codes, order);
}

template <bool kInt4, int kShift>
inline void expand_step(const uint8_t*& values, const uint8_t* mask, const Bytes (&pruned)[kQuarters],
                        Bytes (&codes)[kQuarters]) {
    UNROLL for (int i = 0; i < kQuarters; ++i) {
        uint16_t bits;
        __builtin_memcpy(&bits, mask + 2 * i, 2);
        codes[i] = expand_16<kInt4, kShift>(values, bits, pruned[i]);
    }
}

template <bool kInt4>
struct CodeStream : MaskedStream {
    static constexpr bool kSmallCodes = kInt4;
    const uint8_t* high;
    Bytes pruned[kQuarters];
    void start(const PanelWeights& w, int64_t panel) {
        MaskedStream::start(w, panel);
        high = values;
    }
    void begin_segment(int num_columns) {
        if (kInt4 && high > values) values = high;
        MaskedStream::begin_segment(num_columns);
        high = values;
    }
    void set_zero_points(const Bytes (&codes)[kQuarters]) {
        UNROLL for (int i = 0; i < kQuarters; ++i) { pruned[i] = codes[i]; }
    }
    void next(Bytes (&even)[kQuarters], Bytes (&odd)[kQuarters]) {
        expand_step<kInt4, 0>(values, mask, pruned, even);
        expand_step<kInt4, kInt4 ? 4 : 0>(kInt4 ? high : values, mask + 8, pruned, odd);
        mask += 16;
    }
};

}  // namespace rarefy::matmul::neon

#endif
