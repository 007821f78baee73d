// A weight repacked for the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "matmul/contract.h"

namespace rarefy::matmul {

enum class Isa { reference, avx2, avx512 };
enum class Values { f32, bf16, int8, int4 };
enum class Encoding {
#define RAREFY_ENCODING(name, values, masked) name,
#include "matmul/kernels.inc"
};

// The arrays of a layout of rarefy.layouts, as they come from Python; null where the layout has none.
// Nothing about them is trusted: sizes are in bytes and checked.
struct PackedArrays {
    std::string format;
    int64_t num_outputs, num_inputs;
    int64_t group_size;     // 0: one group per row
    const uint8_t* values;  // `values` or `codes`
    int64_t values_bytes;
    const uint8_t* mask;
    int64_t mask_bytes;
    const uint8_t* scales;
    int64_t scales_bytes;
    const uint8_t* zero_points;
    int64_t zero_points_bytes;
};

struct FreeAligned {
    void operator()(uint8_t* pointer) const;
};
using AlignedBytes = std::unique_ptr<uint8_t[], FreeAligned>;
// Zeroed bytes, aligned to 64.
AlignedBytes allocate_aligned(int64_t num_bytes);

class Weights {
public:
    // Throws std::invalid_argument where the arrays contradict each other or the format is unknown.
    Weights(const PackedArrays& arrays, Isa isa);

    const PanelWeights& view() const { return view_; }
    Isa isa() const { return isa_; }
    Encoding encoding() const { return encoding_; }
    bool is_integer() const { return values_kind_ == Values::int8 || values_kind_ == Values::int4; }
    int64_t num_bytes() const { return num_bytes_; }

private:
    void check(const PackedArrays& arrays);
    void measure_rows(const PackedArrays& arrays);
    void pack_scales(const PackedArrays& arrays);
    void place_panels(const PackedArrays& arrays);
    void pack_panel(const PackedArrays& arrays, int64_t panel);

    Isa isa_;
    Encoding encoding_{};
    Values values_kind_{};
    bool masked_ = false;
    PanelWeights view_{};
    int64_t num_bytes_ = 0;
    AlignedBytes values_, mask_, scales_, zero_points_;
    std::vector<int64_t> value_offsets_;
    std::vector<int64_t> row_starts_;  // masked, while packing: index of each row's first value
};

}  // namespace rarefy::matmul
