// What the encodings of N:M share: lists of as many entries as the pattern keeps, for AVX-512 and AMX. Nothing is
// counted, and nothing expanded to 64 columns.
//
// A segment of 64 (or 32) columns keeps the same number of entries in every output. They are listed in order, four to a
// step; a step is one vector of 16 outputs by 4 entries, its elements. Places of a list that no entry takes have the
// zero point as their code. The values of a panel are its segments, one after the other, with the scales and zero
// points of a group in front of its first. A segment is its columns, 8 bytes a step for each bit of an index, or 64
// bits of a mask for each output; then the codes of all steps. An index counts from the first column of its group;
// arrangement_of() says how they lie:
//   fours    2 bits: four steps in 64 bytes, a byte for each element, step 0 in its lowest bits
//   sixes    3 or 6 bits: two steps or one are 6 bits of each element, the first one lowest. Two such sixes take 96
//            bytes: a byte for each element with the first six and, above it, bits 4 and 5 of the second one; then bits
//            0 to 3 of that, of elements 0 to 31 in the low nibbles and of 32 to 63 in the high ones. A six that is
//            left over is a stream of 64 numbers, the lowest bits first.
//   streams  of the same kind, one for each step
// `table` has two vectors that unpack streams, and one for each step with the groups' first columns. The codes of two
// steps are 64 bytes with the even step in the low nibbles, or 64 bytes each; those of a step that is left over 32
// bytes with elements 0 to 31 in the low nibbles and 32 to 63 in the high ones.
// parameter = 256 * bits of an index (0: a mask) + steps of a segment. Where it is not positive, as always on other
// instruction sets: no lists, but the arrangement of mask.h.
#pragma once

#include "matmul/encodings/mask.h"

namespace rarefy::matmul {

enum class Indices { none, fours, sixes, streams };

inline Indices arrangement_of(int64_t index_bits, int64_t steps) {
    if (index_bits == 0) return Indices::none;
    if (index_bits == 2 && steps % 4 == 0) return Indices::fours;
    if (index_bits == 6 || (index_bits == 3 && steps % 2 == 0)) return Indices::sixes;
    return Indices::streams;
}

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

struct NmPlan {
    int keep, group;
    int columns;     // of a segment
    int index_bits;  // 0: a mask
    int steps;       // 0: no lists
    int segment_bytes;
};

// How to arrange a pattern. The limits are measured.
inline NmPlan plan_nm(int keep, int group, int columns, int code_bits) {
    const NmPlan no_lists{keep, group, columns, 0, 0, 0};
    const int count = columns % group == 0 ? columns / group * keep : columns;
    if (count > columns / 2) return no_lists;  // dense products are as fast
    int index_bits = 1;
    while (1 << index_bits < group) ++index_bits;
    const int steps = static_cast<int>(ceil_div(count, 4));
    const int code_bytes = steps * 8 * code_bits;
    const int index_bytes = steps * 8 * index_bits;
    const int mask_bytes = kPanelOutputs * columns / 8;
    // Indices take half the time of a mask; up to an eighth more bytes are worth that. Of 4 bits a mask takes so much
    // longer than memory that a quarter of the columns are worth more: at most a quarter more of all bytes.
    if (8 * index_bytes <= 9 * mask_bytes || (code_bits == 4 && count <= columns / 4))
        return {keep, group, columns, index_bits, steps, index_bytes + code_bytes};
    if (columns < kBlockInputs) return no_lists;
    if (code_bits == 4) return no_lists;  // many rows would be faster, but one row slower
    return {keep, group, columns, 0, steps, mask_bytes + code_bytes};
}

// The kept entries of one output in one segment, in their places of its list.
struct NmList {
    uint8_t columns[kBlockInputs];  // within the group
    uint8_t codes[kBlockInputs];
};

inline uint64_t first_bits(int count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// No group keeps more than plan.keep, so that the list has room. Of a mask the entries follow each other.
inline void fill_list(const NmPlan& plan, uint64_t mask, const uint8_t* codes, int stored_bits, int64_t& cursor,
                      NmList& list) {
    const int group = plan.index_bits > 0 ? plan.group : plan.columns;
    const uint64_t group_bits = first_bits(group);
    for (int first = 0, begin = 0; first < plan.columns; first += group, begin += plan.keep) {
        int place = begin;
        for (uint64_t bits = mask >> first & group_bits; bits != 0; bits &= bits - 1, ++place, ++cursor) {
            list.columns[place] = static_cast<uint8_t>(__builtin_ctzll(bits));
            list.codes[place] = code_of_run(codes, cursor, stored_bits);
        }
    }
}

// Throws where a group keeps more entries than the plan has room for. Groups lie within blocks.
inline void check_groups(const NmPlan& plan, const DiskMask& mask, int64_t num_outputs, int64_t num_blocks) {
    const uint64_t group_bits = first_bits(plan.group);
    for (int64_t row = 0; row < num_outputs; ++row) {
        for (int64_t block = 0; block < num_blocks; ++block) {
            const uint64_t bits = mask.block(row, block);
            for (int first = 0; first < kBlockInputs; first += plan.group)
                require(popcount(bits >> first & group_bits) <= plan.keep, "a group keeps too many entries");
        }
    }
}

// The bytes that the following write to were 0 before.
inline void put_in_stream(uint8_t* stream, int element, int num_bits, int number) {
    const int bit = element * num_bits;
    const int shifted = number << bit % 8;
    stream[bit / 8] |= static_cast<uint8_t>(shifted);
    if (shifted > 255) stream[bit / 8 + 1] |= static_cast<uint8_t>(shifted >> 8);
}

inline void put_in_halves(uint8_t* bytes, int element, int nibble) {
    bytes[element % 32] |= static_cast<uint8_t>(nibble << (element / 32 * 4));
}

template <Indices kIndices>
void put_index(const NmPlan& plan, uint8_t* indices, int step, int element, int index) {
    if (kIndices == Indices::fours) {
        indices[step / 4 * 64 + element] |= static_cast<uint8_t>(index << (step % 4 * 2));
    } else if (kIndices == Indices::sixes) {
        const int bit = step * plan.index_bits, six = bit / 6, number = index << bit % 6;
        uint8_t* const two = indices + six / 2 * 96;
        if (six % 2 == 0 && 6 * (six + 1) == plan.steps * plan.index_bits) {
            put_in_stream(two, element, 6, number);
        } else if (six % 2 == 0) {
            two[element] |= static_cast<uint8_t>(number);
        } else {
            two[element] |= static_cast<uint8_t>(number >> 4 << 6);
            put_in_halves(two + 64, element, number & 15);
        }
    } else if (kIndices == Indices::streams) {
        put_in_stream(indices + step * 8 * plan.index_bits, element, plan.index_bits, index);
    }
}

template <int kBits>
void put_code(const NmPlan& plan, uint8_t* codes, int step, int element, int code) {
    if (kBits == 8)
        codes[step * 64 + element] = static_cast<uint8_t>(code);
    else if (step % 2 == 0 && step + 1 == plan.steps)
        put_in_halves(codes + step * 32, element, code);
    else
        codes[step / 2 * 64 + element] |= static_cast<uint8_t>(code << (step % 2 * 4));
}

// Puts the lists of a segment of one output where they belong.
template <int kBits, Indices kIndices>
void put_list(const NmPlan& plan, uint8_t* segment, int row, uint64_t mask, const NmList& list) {
    if (kIndices == Indices::none) std::memcpy(segment + row * 8, &mask, 8);
    uint8_t* const codes = segment + plan.segment_bytes - plan.steps * 8 * kBits;
    for (int step = 0; step < plan.steps; ++step) {
        for (int i = 0; i < 4; ++i) {
            put_index<kIndices>(plan, segment, step, row * 4 + i, list.columns[4 * step + i]);
            put_code<kBits>(plan, codes, step, row * 4 + i, list.codes[4 * step + i]);
        }
    }
}

inline uint8_t* make_nm_table(Packing& packing, const NmPlan& plan) {
    uint8_t* table = packing.allocate((2 + plan.steps) * 64);
    const int stream_bits = arrangement_of(plan.index_bits, plan.steps) == Indices::sixes ? 6 : plan.index_bits;
    for (int element = 0; element < 64; ++element) {
        table[element] = static_cast<uint8_t>(element / 8 * stream_bits + element % 8);
        table[64 + element] = static_cast<uint8_t>(element % 8 * stream_bits);
        for (int step = 0; step < plan.steps; ++step) {
            const int first = (4 * step + element % 4) / plan.keep * plan.group;
            table[(2 + step) * 64 + element] = static_cast<uint8_t>(first < plan.columns ? first : 0);
        }
    }
    return table;
}

template <int kBits, Indices kIndices>
void put_lists(Packing& packing, const NmPlan& plan, const DiskMask& mask, const uint8_t* codes, int stored_bits) {
    const PanelWeights& view = packing.view;
    const int segments = kBlockInputs / plan.columns;
    uint8_t* const values = packing.place_segments(plan.segment_bytes);
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        for (int row = 0; row < num_rows; ++row) {
            int64_t cursor = mask.row_starts[static_cast<size_t>(first + row)];
            uint8_t* out = values + view.value_offsets[panel];
            for (int64_t segment = 0; segment < view.num_blocks * segments; ++segment, out += plan.segment_bytes) {
                if (segment % view.segments_per_group == 0) out += view.group_bytes;
                uint64_t bits = mask.block(first + row, segment / segments);
                if (segments == 2) bits = bits >> (segment % 2 * 32) & 0xffffffff;
                const int zero_point = zero_point_of(view, panel, segment, row);
                NmList list{};
                std::memset(list.codes, zero_point, sizeof(list.codes));
                fill_list(plan, bits, codes, kBits == 8 ? 8 : stored_bits, cursor, list);
                put_list<kBits, kIndices>(plan, out, row, bits, list);
            }
        }
    });
}

// Codes of kBits, stored as so many bits or fewer.
template <int kBits>
void pack_nm(Packing& packing, void (*pack_as_mask)(Packing&), int stored_bits = kBits) {
    const int keep = static_cast<int>(packing.integer("keep", 1, 64));
    const int group = static_cast<int>(packing.integer("group", keep, 64));
    const NmPlan plan = plan_nm(keep, group, packing.view.steps_per_segment * 4, kBits);
    // All codes in their bits, which a mask may become, take less time where they save a fifth.
    const int all_bytes = plan.columns * kPanelOutputs * stored_bits / 8;
    if (packing.isa() < Isa::avx512 || plan.steps == 0 || 5 * all_bytes < 4 * plan.segment_bytes) {
        pack_as_mask(packing);
        return;
    }
    if (kBits == 4) take_stored_bits(packing);
    const DiskMask mask(packing);
    const NamedArray& codes = packing.take("codes", Element::u8);
    require(codes.num_bytes == ceil_div(mask.row_starts.back() * stored_bits, 8), "the mask does not fit the codes");
    PanelWeights& view = packing.view;
    check_groups(plan, mask, view.num_outputs, view.num_blocks);
    view.parameter = 256 * plan.index_bits + plan.steps;
    if (plan.index_bits > 0) view.table = make_nm_table(packing, plan);
    switch (arrangement_of(plan.index_bits, plan.steps)) {
        case Indices::none: return put_lists<kBits, Indices::none>(packing, plan, mask, codes.bytes, stored_bits);
        case Indices::fours: return put_lists<kBits, Indices::fours>(packing, plan, mask, codes.bytes, stored_bits);
        case Indices::sixes: return put_lists<kBits, Indices::sixes>(packing, plan, mask, codes.bytes, stored_bits);
        case Indices::streams: return put_lists<kBits, Indices::streams>(packing, plan, mask, codes.bytes, stored_bits);
    }
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX512

#include "matmul/encodings/nm_avx512.h"

#endif
