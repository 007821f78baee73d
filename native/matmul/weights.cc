#include "matmul/weights.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "common/pool.h"

namespace rarefy::matmul {
namespace {

// Of each axis, and of the whole matrix: no product of sizes overflows.
constexpr int64_t kMaxSize = int64_t{1} << 31;
constexpr int64_t kMaxElements = int64_t{1} << 48;

struct Description {
    Encoding encoding;
    Values values;
    bool masked;
};

Description describe(const std::string& format) {
    constexpr struct {
        const char* format;
        Encoding encoding;
    } kFormats[] = {
#define RAREFY_FORMAT(format, encoding) {format, Encoding::encoding},
#include "matmul/kernels.inc"
    };
    for (const auto& row : kFormats) {
        if (format != row.format) continue;
        switch (row.encoding) {
#define RAREFY_ENCODING(name, values, masked) \
    case Encoding::name: return {Encoding::name, values, masked};
#include "matmul/kernels.inc"
        }
    }
    throw std::invalid_argument("unknown weight format " + format);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int popcount(uint64_t bits) { return __builtin_popcountll(bits); }

int value_bits(Values values) {
    switch (values) {
        case Values::f32: return 32;
        case Values::bf16: return 16;
        case Values::int8: return 8;
        case Values::int4: return 4;
    }
    return 0;
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

uint64_t load_bits(const uint8_t* bytes, int64_t num_bytes) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < num_bytes; ++i) bits |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    return bits;
}

uint8_t nibble(const uint8_t* bytes, int64_t index) { return bytes[index >> 1] >> (4 * (index & 1)) & 15; }

}  // namespace

void FreeAligned::operator()(uint8_t* pointer) const { std::free(pointer); }

AlignedBytes allocate_aligned(int64_t num_bytes) {
    const size_t size = static_cast<size_t>(round_up(num_bytes > 0 ? num_bytes : 1, 64));
    auto* bytes = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    if (bytes == nullptr) throw std::bad_alloc();
    std::memset(bytes, 0, size);
    return AlignedBytes(bytes);
}

Weights::Weights(const PackedArrays& arrays, Isa isa) : isa_(isa) {
    const Description description = describe(arrays.format);
    encoding_ = description.encoding;
    values_kind_ = description.values;
    masked_ = description.masked;
    check(arrays);
    view_.num_outputs = arrays.num_outputs;
    view_.num_inputs = arrays.num_inputs;
    view_.num_panels = ceil_div(arrays.num_outputs, kPanelOutputs);
    view_.num_blocks = ceil_div(arrays.num_inputs, kBlockInputs);
    if (is_integer()) pack_scales(arrays);
    if (masked_) measure_rows(arrays);
    place_panels(arrays);
    constexpr int64_t kChunkPanels = 16;
    const int64_t num_chunks = ceil_div(view_.num_panels, kChunkPanels);
    common::parallel_for(static_cast<int>(num_chunks), [&](int chunk) {
        const int64_t end = (chunk + 1) * kChunkPanels;
        for (int64_t panel = chunk * kChunkPanels; panel < end && panel < view_.num_panels; ++panel)
            pack_panel(arrays, panel);
    });
    row_starts_ = {};
}

void Weights::check(const PackedArrays& arrays) {
    const int64_t num_outputs = arrays.num_outputs, num_inputs = arrays.num_inputs;
    require(num_outputs >= 0 && num_outputs < kMaxSize && num_inputs >= 0 && num_inputs < kMaxSize &&
                num_outputs * num_inputs < kMaxElements,
            "shape out of range");
    const bool has_mask = arrays.mask != nullptr;
    require(has_mask == masked_, masked_ ? "mask missing" : "unexpected mask");
    require(!masked_ || arrays.mask_bytes == num_outputs * ceil_div(num_inputs, 8), "mask has a wrong size");
    if (!masked_) {
        const int64_t row_bytes = ceil_div(num_inputs * value_bits(values_kind_), 8);
        require(arrays.values_bytes == num_outputs * row_bytes, "values have a wrong size");
    }
    require(arrays.values != nullptr, "values missing");
    require((arrays.scales != nullptr) == is_integer(), is_integer() ? "scales missing" : "unexpected scales");
    require(arrays.group_size == 0 || is_integer(), "unexpected group size");
    require(arrays.zero_points == nullptr || is_integer(), "unexpected zero points");
    if (!is_integer()) return;
    require(arrays.group_size >= 0 && arrays.group_size < kMaxSize && arrays.group_size % 32 == 0,
            "group size is not a multiple of 32");
    const int64_t num_groups = arrays.group_size == 0 ? 1 : ceil_div(num_inputs, arrays.group_size);
    require(arrays.scales_bytes == num_outputs * num_groups * 2, "scales have a wrong size");
    if (arrays.zero_points == nullptr) return;
    require(arrays.zero_points_bytes == num_outputs * num_groups, "zero points have a wrong size");
    for (int64_t i = 0; values_kind_ == Values::int4 && i < arrays.zero_points_bytes; ++i)
        require(arrays.zero_points[i] < 16, "zero point out of range");
}

// Finds where each row's values begin and checks the mask against the number of values.
void Weights::measure_rows(const PackedArrays& arrays) {
    const int64_t mask_row = ceil_div(arrays.num_inputs, 8);
    const int last_bits = static_cast<int>(arrays.num_inputs % 8);
    row_starts_.resize(static_cast<size_t>(arrays.num_outputs) + 1);
    int64_t total = 0;
    for (int64_t row = 0; row < arrays.num_outputs; ++row) {
        row_starts_[static_cast<size_t>(row)] = total;
        const uint8_t* bytes = arrays.mask + row * mask_row;
        for (int64_t i = 0; i < mask_row; i += 8)
            total += popcount(load_bits(bytes + i, mask_row - i < 8 ? mask_row - i : 8));
        require(last_bits == 0 || bytes[mask_row - 1] >> last_bits == 0, "mask has bits beyond the last column");
    }
    row_starts_.back() = total;
    require(arrays.values_bytes == ceil_div(total * value_bits(values_kind_), 8), "the mask does not fit the values");
}

void Weights::pack_scales(const PackedArrays& arrays) {
    const int64_t num_blocks = view_.num_blocks;
    const int64_t group_size = arrays.group_size;
    const bool halves = group_size % 64 != 0;
    const int64_t num_segments = halves ? 2 * num_blocks : num_blocks;
    const int64_t num_groups = group_size == 0 ? 1 : ceil_div(arrays.num_inputs, group_size);
    view_.steps_per_segment = halves ? 8 : 16;
    view_.segments_per_group = group_size == 0 ? (num_blocks > 0 ? num_blocks : 1) : group_size / (halves ? 32 : 64);
    // The last half block may be padding alone; its group has no scale on disk and gets 0.
    view_.num_groups = ceil_div(num_segments, view_.segments_per_group);
    if (view_.num_groups < num_groups) view_.num_groups = num_groups;
    view_.zero_point = values_kind_ == Values::int4 ? 8 : 128;
    const int64_t count = view_.num_panels * view_.num_groups * kPanelOutputs;
    scales_ = allocate_aligned(count * 2);
    num_bytes_ += count * 2;
    if (arrays.zero_points != nullptr) {
        zero_points_ = allocate_aligned(count);
        num_bytes_ += count;
    }
    for (int64_t output = 0; output < arrays.num_outputs; ++output) {
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t from = output * num_groups + group;
            const int64_t to =
                (output / kPanelOutputs * view_.num_groups + group) * kPanelOutputs + output % kPanelOutputs;
            std::memcpy(scales_.get() + to * 2, arrays.scales + from * 2, 2);
            if (zero_points_) zero_points_[static_cast<size_t>(to)] = arrays.zero_points[from];
        }
    }
    view_.scales = reinterpret_cast<const uint16_t*>(scales_.get());
    view_.zero_points = zero_points_.get();
}

void Weights::place_panels(const PackedArrays& arrays) {
    const int64_t num_panels = view_.num_panels, num_blocks = view_.num_blocks;
    const int64_t mask_row = ceil_div(arrays.num_inputs, 8);
    const int bits = value_bits(values_kind_);
    value_offsets_.resize(static_cast<size_t>(num_panels) + 1);
    int64_t offset = 0;
    for (int64_t panel = 0; panel < num_panels; ++panel) {
        value_offsets_[static_cast<size_t>(panel)] = offset;
        const int64_t first = panel * kPanelOutputs;
        const int64_t last = first + kPanelOutputs < arrays.num_outputs ? first + kPanelOutputs : arrays.num_outputs;
        if (!masked_) {
            offset += num_blocks * kBlockInputs * kPanelOutputs * bits / 8;
        } else if (values_kind_ == Values::int4) {
            // Columns 0-3 of each 8 are in an even step, 4-7 in an odd one.
            int64_t even = 0, odd = 0;
            for (const uint8_t* byte = arrays.mask + first * mask_row; byte < arrays.mask + last * mask_row; ++byte) {
                even += popcount(*byte & 15);
                odd += popcount(*byte >> 4);
            }
            offset += round_up(even > odd ? even : odd, 64);
        } else {
            const int64_t count = row_starts_[static_cast<size_t>(last)] - row_starts_[static_cast<size_t>(first)];
            offset += round_up(count * bits / 8, 64);
        }
    }
    value_offsets_.back() = offset;
    values_ = allocate_aligned(offset + kReadBeyond);
    num_bytes_ += offset + kReadBeyond + static_cast<int64_t>(value_offsets_.size() * sizeof(int64_t));
    if (masked_) {
        mask_ = allocate_aligned(num_panels * num_blocks * kMaskBytes);
        num_bytes_ += num_panels * num_blocks * kMaskBytes;
    }
    view_.values = values_.get();
    view_.value_offsets = value_offsets_.data();
    view_.mask = mask_.get();
}

void Weights::pack_panel(const PackedArrays& arrays, int64_t panel) {
    const int64_t first = panel * kPanelOutputs;
    const int num_rows =
        static_cast<int>(arrays.num_outputs - first < kPanelOutputs ? arrays.num_outputs - first : kPanelOutputs);
    const int64_t num_inputs = arrays.num_inputs;
    const int bits = value_bits(values_kind_);
    const int columns_per_step = 32 / (bits < 8 ? 8 : bits);
    const int steps = kBlockInputs / columns_per_step;
    const int64_t row_bytes = ceil_div(num_inputs * bits, 8);
    uint8_t* values = values_.get() + value_offsets_[static_cast<size_t>(panel)];
    if (!masked_) {
        for (int64_t column = 0; column < num_inputs; column += columns_per_step) {
            const int64_t step = column / columns_per_step;
            const int64_t count = num_inputs - column < columns_per_step ? num_inputs - column : columns_per_step;
            for (int row = 0; row < num_rows; ++row) {
                const uint8_t* from = arrays.values + (first + row) * row_bytes;
                if (values_kind_ != Values::int4) {
                    std::memcpy(values + step * 64 + row * 4, from + column * bits / 8,
                                static_cast<size_t>(count * bits / 8));
                    continue;
                }
                uint8_t* to = values + step / 2 * 64 + row * 4;
                for (int64_t i = 0; i < count; ++i) to[i] |= nibble(from, column + i) << (step % 2 * 4);
            }
        }
        return;
    }
    int64_t cursors[kPanelOutputs];
    for (int row = 0; row < num_rows; ++row) cursors[row] = row_starts_[static_cast<size_t>(first + row)];
    const int64_t mask_row = ceil_div(num_inputs, 8);
    const uint64_t step_bits = (uint64_t{1} << columns_per_step) - 1;
    uint8_t* streams[2] = {values, values};  // 4-bit codes: next byte of the low and of the high nibbles
    for (int64_t block = 0; block < view_.num_blocks; ++block) {
        uint64_t row_masks[kPanelOutputs];
        for (int row = 0; row < num_rows; ++row) {
            const int64_t left = mask_row - block * 8;
            row_masks[row] = load_bits(arrays.mask + (first + row) * mask_row + block * 8, left < 8 ? left : 8);
        }
        uint8_t* mask = mask_.get() + (panel * view_.num_blocks + block) * kMaskBytes;
        for (int step = 0; step < steps; ++step) {
            uint64_t step_mask = 0;
            for (int row = 0; row < num_rows; ++row) {
                const uint64_t kept = row_masks[row] >> (step * columns_per_step) & step_bits;
                step_mask |= kept << (row * columns_per_step);
                for (int i = popcount(kept); i > 0; --i) {
                    const int64_t cursor = cursors[row]++;
                    if (values_kind_ == Values::int4) {
                        *streams[step % 2]++ |= nibble(arrays.values, cursor) << (step % 2 * 4);
                    } else if (values_kind_ == Values::int8) {
                        *streams[0]++ = arrays.values[cursor];
                    } else {
                        std::memcpy(streams[0], arrays.values + cursor * 2, 2);
                        streams[0] += 2;
                    }
                }
            }
            const int step_bytes = kMaskBytes / steps;
            std::memcpy(mask + step * step_bytes, &step_mask, static_cast<size_t>(step_bytes));
        }
    }
}

}  // namespace rarefy::matmul
