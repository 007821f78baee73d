// What the packer of an encoding gets: the arrays of a layout as they came from a stranger's file, and the weight that
// it fills. A packer, `packers::<encoding>`, checks every array and every number that it reads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/memory.h"
#include "matmul/contract.h"

namespace rarefy::matmul {

// From slowest to fastest; those of other processors than this build's have no kernels.
enum class Isa { reference, neon, avx2, avx_vnni, avx512, avx512_bf16, amx };
constexpr Isa kIsas[] = {Isa::reference, Isa::neon, Isa::avx2, Isa::avx_vnni, Isa::avx512, Isa::avx512_bf16, Isa::amx};
enum class Encoding {
#define RAREFY_ENCODING(name, ...) name,
#include "matmul/kernels.inc"
};
enum class Element { u8, u16, u32, i8, i16, i32, f32, other };

struct NamedArray {
    std::string name;
    Element element;
    const uint8_t* bytes;  // not null; in no particular alignment
    int64_t num_bytes;
};

struct NamedInteger {
    std::string name;
    int64_t value;
};

// A layout of rarefy.layouts: its arrays, and the integers (and truth values) of its metadata except the shape.
// Nothing about them is trusted.
struct PackedArrays {
    std::string format;
    int64_t num_outputs, num_inputs;
    std::vector<NamedArray> arrays;
    std::vector<NamedInteger> integers;
};

// Throws std::invalid_argument.
void require(bool condition, const std::string& message);
// Makes no string in passing, which packers would notice.
inline void require(bool condition, const char* message) {
    if (!condition) require(false, std::string(message));
}

// How codes of 4 bits or fewer under a mask lie in memory for AVX-512 (encodings/mask_int4.cc). `fastest` is whichever
// fastest_masked_codes() says; the others are for tests and for timing.
enum class MaskedCodes { fastest, singles, pairs, all };
// Of masks and codes, without scales.
struct MaskedBytes {
    int64_t singles, pairs, all;
};
// For one row by so many weights. half_width: common/cpu.h.
MaskedCodes fastest_masked_codes(int64_t num_weights, const MaskedBytes& bytes, bool half_width);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Code `index` of a run of 4-bit codes, the first in the low nibble.
inline uint8_t nibble(const uint8_t* bytes, int64_t index) { return bytes[index >> 1] >> (4 * (index & 1)) & 15; }

// Code `index` of a run of codes of 1 to 8 bits, the least significant bit first.
inline uint8_t code_of_run(const uint8_t* run, int64_t index, int num_bits) {
    const int64_t bit = index * num_bits;
    const int shift = static_cast<int>(bit % 8);
    int code = run[bit / 8] >> shift;
    if (shift + num_bits > 8) code |= run[bit / 8 + 1] << (8 - shift);
    return static_cast<uint8_t>(code & ((1 << num_bits) - 1));
}

class Packing {
public:
    // `view` has the sizes, and scales and zero points where the values are integers. No product of its two axes
    // overflows, not even times the bits of a float.
    Packing(const PackedArrays& packed, Isa isa, MaskedCodes masked_codes, PanelWeights& weights);

    // Whose kernel will read the weight.
    Isa isa() const { return isa_; }
    MaskedCodes masked_codes() const { return masked_codes_; }
    const std::string& format() const { return packed_.format; }
    // Throw std::invalid_argument where there is no such array, or one of other elements. take_optional: or gives null.
    const NamedArray& take(const std::string& name, Element element);
    const NamedArray* take_optional(const std::string& name, Element element);
    // As take(), and the array must have so many bytes.
    const uint8_t* take(const std::string& name, Element element, int64_t num_bytes);
    // An integer of the metadata. Throws where there is none or it is not in [low, high].
    int64_t integer(const std::string& name, int64_t low, int64_t high) const;
    int64_t integer_or(const std::string& name, int64_t otherwise) const;
    // Throws where an array was not taken.
    void check_all_taken() const;

    // Zeroed memory of the weight, aligned to 64, with kReadBeyond more bytes behind it.
    uint8_t* allocate(int64_t num_bytes);
    int64_t* allocate_offsets();
    // Lays the panels out one after the other, each at a multiple of 64, and allocates value_offsets and values.
    uint8_t* place_values(const std::function<int64_t(int64_t panel)>& panel_bytes);
    // The same for integer values whose segments all have so many bytes: in front of the first segment of each group
    // stand its scales and zero points, so that a product reads one stream for each panel.
    uint8_t* place_segments(int64_t segment_bytes);
    // Reads `scales`, `zero_points` and group_size, and fills the fields of the view that belong to them. Done before
    // the packer runs where the values are integers; a float encoding whose layout has scales calls it.
    void pack_scales(int num_bits);
    // Moves the scales of outputs that have one each to output_scales. All integer kernels know both; one row reads one
    // place more for each panel, which panels of few bytes notice.
    void put_scales_last();

    // Runs the packer of an encoding, whose kernel will read the weight. A packer may hand the weight over to another
    // one, whose codes it makes: from then on these are what is taken as "codes".
    void pack(Encoding encoding);
    void hand_over(Encoding encoding, std::vector<uint8_t> codes);
    Encoding encoding() const { return encoding_; }

    // Calls function(panel, first output, number of outputs) for every panel, on several threads.
    void for_each_panel(const std::function<void(int64_t panel, int64_t first, int num_rows)>& function) const;

    int64_t num_bytes() const { return num_bytes_; }
    // Says that one row reads nothing of so many of them.
    void leave_unread(int64_t num_bytes) { num_unread_bytes_ += num_bytes; }
    int64_t num_read_bytes() const { return num_bytes_ - num_unread_bytes_; }
    std::vector<common::AlignedBytes> release_memory() { return std::move(memory_); }

    PanelWeights& view;

private:
    const PackedArrays& packed_;
    const Isa isa_;
    const MaskedCodes masked_codes_;
    Encoding encoding_{};
    std::vector<uint8_t> own_codes_;
    NamedArray handed_over_{"codes", Element::u8, nullptr, 0};
    std::vector<bool> taken_;
    std::vector<common::AlignedBytes> memory_;
    size_t pieces_ = 0;  // of memory_: the scales and zero points
    int64_t num_bytes_ = 0, num_unread_bytes_ = 0;
};

namespace packers {
#define RAREFY_ENCODING(name, ...) void name(Packing& packing);
#include "matmul/kernels.inc"
}  // namespace packers

}  // namespace rarefy::matmul
