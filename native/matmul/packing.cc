// What the packers of all encodings share: finding arrays and numbers by name, memory, scales, and threads.
#include "matmul/packing.h"

#include <cstring>
#include <stdexcept>

#include "common/pool.h"

namespace rarefy::matmul {
namespace {

// Of each axis, and of the whole matrix: no product of sizes overflows.
constexpr int64_t kMaxSize = int64_t{1} << 31;
constexpr int64_t kMaxElements = int64_t{1} << 48;
constexpr int64_t kMaxEmptyOutputs = int64_t{1} << 20;

}  // namespace

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

Packing::Packing(const PackedArrays& packed, Isa isa, MaskedCodes masked_codes, PanelWeights& weights)
    : view(weights), packed_(packed), isa_(isa), masked_codes_(masked_codes), taken_(packed.arrays.size(), false) {
    const int64_t num_outputs = packed.num_outputs, num_inputs = packed.num_inputs;
    require(num_outputs >= 0 && num_outputs < kMaxSize && num_inputs >= 0 && num_inputs < kMaxSize &&
                num_outputs * num_inputs < kMaxElements,
            "shape out of range");
    // Other outputs have bytes in some array, whose size bounds them.
    require(num_inputs > 0 || num_outputs < kMaxEmptyOutputs, "too many outputs without inputs");
    view.num_outputs = num_outputs;
    view.num_inputs = num_inputs;
    view.num_panels = ceil_div(num_outputs, kPanelOutputs);
    view.num_blocks = ceil_div(num_inputs, kBlockInputs);
}

void Packing::pack(Encoding encoding) {
    constexpr void (*kPackers[])(Packing&) = {
#define RAREFY_ENCODING(name, ...) packers::name,
#include "matmul/kernels.inc"
    };
    encoding_ = encoding;
    kPackers[static_cast<size_t>(encoding)](*this);
}

void Packing::hand_over(Encoding encoding, std::vector<uint8_t> codes) {
    own_codes_ = std::move(codes);
    own_codes_.push_back(0);  // or of none there would be no memory
    handed_over_ = {"codes", Element::u8, own_codes_.data(), static_cast<int64_t>(own_codes_.size()) - 1};
    pack(encoding);
}

const NamedArray* Packing::take_optional(const std::string& name, Element element) {
    if (name == handed_over_.name && handed_over_.bytes != nullptr) return &handed_over_;
    for (size_t i = 0; i < packed_.arrays.size(); ++i) {
        const NamedArray& array = packed_.arrays[i];
        if (array.name != name) continue;
        require(array.element == element, name + " has a wrong dtype");
        require(array.bytes != nullptr && array.num_bytes >= 0, name + " has no memory");
        taken_[i] = true;
        return &array;
    }
    return nullptr;
}

const NamedArray& Packing::take(const std::string& name, Element element) {
    const NamedArray* array = take_optional(name, element);
    require(array != nullptr, name + " missing");
    return *array;
}

const uint8_t* Packing::take(const std::string& name, Element element, int64_t num_bytes) {
    const NamedArray& array = take(name, element);
    require(array.num_bytes == num_bytes, name + " has a wrong size");
    return array.bytes;
}

int64_t Packing::integer(const std::string& name, int64_t low, int64_t high) const {
    for (const NamedInteger& integer : packed_.integers) {
        if (integer.name != name) continue;
        require(low <= integer.value && integer.value <= high, name + " out of range");
        return integer.value;
    }
    throw std::invalid_argument(name + " missing");
}

int64_t Packing::integer_or(const std::string& name, int64_t otherwise) const {
    for (const NamedInteger& integer : packed_.integers)
        if (integer.name == name) return integer.value;
    return otherwise;
}

void Packing::check_all_taken() const {
    for (size_t i = 0; i < taken_.size(); ++i) require(taken_[i], "unexpected " + packed_.arrays[i].name);
    require(view.scales != nullptr || integer_or("group_size", 0) == 0, "unexpected group_size");
}

uint8_t* Packing::allocate(int64_t num_bytes) {
    memory_.push_back(common::allocate_aligned(num_bytes + kReadBeyond));
    num_bytes_ += num_bytes + kReadBeyond;
    return memory_.back().get();
}

int64_t* Packing::allocate_offsets() {
    return reinterpret_cast<int64_t*>(allocate((view.num_panels + 1) * static_cast<int64_t>(sizeof(int64_t))));
}

uint8_t* Packing::place_values(const std::function<int64_t(int64_t panel)>& panel_bytes) {
    int64_t* offsets = allocate_offsets();
    for (int64_t panel = 0; panel < view.num_panels; ++panel)
        offsets[panel + 1] = offsets[panel] + round_up(panel_bytes(panel), 64);
    uint8_t* values = allocate(offsets[view.num_panels]);
    view.value_offsets = offsets;
    view.values = values;
    return values;
}

void Packing::pack_scales(int num_bits) {
    const int64_t num_outputs = view.num_outputs, num_inputs = view.num_inputs, num_blocks = view.num_blocks;
    const int64_t group_size = integer_or("group_size", 0);  // 0: one group per row
    require(group_size >= 0 && group_size < kMaxSize && group_size % 32 == 0, "group_size is not a multiple of 32");
    const int64_t num_groups = group_size == 0 ? 1 : ceil_div(num_inputs, group_size);
    const uint8_t* scales = take("scales", Element::u16, num_outputs * num_groups * 2);
    const NamedArray* zero_points = take_optional("zero_points", Element::u8);
    if (zero_points != nullptr) {
        require(zero_points->num_bytes == num_outputs * num_groups, "zero_points has a wrong size");
        for (int64_t i = 0; num_bits < 8 && i < zero_points->num_bytes; ++i)
            require(zero_points->bytes[i] >> num_bits == 0, "zero point out of range");
    }
    const bool halves = group_size % 64 != 0;
    const int64_t num_segments = halves ? 2 * num_blocks : num_blocks;
    view.steps_per_segment = halves ? 8 : 16;
    view.segments_per_group = group_size == 0 ? (num_blocks > 0 ? num_blocks : 1) : group_size / (halves ? 32 : 64);
    // The last half block may be padding alone; its group has no scale on disk and gets 0.
    view.num_groups = ceil_div(num_segments, view.segments_per_group);
    if (view.num_groups < num_groups) view.num_groups = num_groups;
    view.zero_point = 1 << (num_bits - 1);
    constexpr int64_t kScaleBytes = 2 * kPanelOutputs;
    view.group_bytes = kScaleBytes + (zero_points == nullptr ? 0 : kPanelOutputs);
    view.group_stride = view.group_bytes;
    view.panel_stride = view.num_groups * view.group_bytes;
    pieces_ = memory_.size();
    uint8_t* pieces = allocate(view.num_panels * view.panel_stride);
    for (int64_t output = 0; output < num_outputs; ++output) {
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t from = output * num_groups + group;
            uint8_t* piece = pieces + view.group_place(output / kPanelOutputs, group);
            const int64_t lane = output % kPanelOutputs;
            std::memcpy(piece + lane * 2, scales + from * 2, 2);
            if (zero_points != nullptr) piece[kScaleBytes + lane] = zero_points->bytes[from];
        }
    }
    view.scales = reinterpret_cast<const uint16_t*>(pieces);
    view.zero_points = zero_points == nullptr ? nullptr : pieces + kScaleBytes;
}

uint8_t* Packing::place_segments(int64_t segment_bytes) {
    const int64_t num_segments = view.num_blocks * (16 / view.steps_per_segment);
    const int64_t group_bytes = view.group_bytes, from_stride = view.panel_stride;
    const common::AlignedBytes pieces = std::move(memory_[pieces_]);
    memory_.erase(memory_.begin() + static_cast<int64_t>(pieces_));
    num_bytes_ -= view.num_panels * from_stride + kReadBeyond;
    uint8_t* const values =
        place_values([&](int64_t) { return num_segments * segment_bytes + view.num_groups * group_bytes; });
    view.group_stride = view.segments_per_group * segment_bytes + group_bytes;
    view.panel_stride = view.num_panels == 0 ? 0 : view.value_offsets[1];
    // Groups of padding alone have no segments behind them.
    view.num_groups = ceil_div(num_segments, view.segments_per_group);
    for (int64_t panel = 0; panel < view.num_panels; ++panel)
        for (int64_t group = 0; group < view.num_groups; ++group)
            std::memcpy(values + view.group_place(panel, group),
                        pieces.get() + panel * from_stride + group * group_bytes, static_cast<size_t>(group_bytes));
    view.scales = reinterpret_cast<const uint16_t*>(values);
    if (view.zero_points != nullptr) view.zero_points = values + 2 * kPanelOutputs;
    return values;
}

void Packing::put_scales_last() {
    if (view.num_groups != 1) return;
    constexpr uint16_t kOne = 0x3f80;
    auto* const last = reinterpret_cast<uint16_t*>(allocate(view.num_panels * kPanelOutputs * 2));
    for (int64_t panel = 0; panel < view.num_panels; ++panel) {
        // Of the memory that pack_scales took.
        auto* const own = const_cast<uint16_t*>(view.scales_at(view.group_place(panel, 0)));
        std::copy(own, own + kPanelOutputs, last + panel * kPanelOutputs);
        std::fill(own, own + kPanelOutputs, kOne);
    }
    view.output_scales = last;
}

void Packing::for_each_panel(const std::function<void(int64_t panel, int64_t first, int num_rows)>& function) const {
    constexpr int64_t kChunkPanels = 16;
    const int64_t num_chunks = ceil_div(view.num_panels, kChunkPanels);
    common::parallel_for(static_cast<int>(num_chunks), [&](int chunk) {
        const int64_t end = (chunk + 1) * kChunkPanels;
        for (int64_t panel = chunk * kChunkPanels; panel < end && panel < view.num_panels; ++panel) {
            const int64_t first = panel * kPanelOutputs, left = view.num_outputs - first;
            function(panel, first, static_cast<int>(left < kPanelOutputs ? left : kPanelOutputs));
        }
    });
}

}  // namespace rarefy::matmul
