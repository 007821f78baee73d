// What the dense encodings share: every panel has the same bytes, in order.
#pragma once

#include "matmul/encodings/encodings.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

// Steps whose lanes hold as many neighbouring columns as fit in four bytes.
inline void pack_dense_lanes(Packing& packing, const char* name, Element element, int value_bytes) {
    const int64_t num_inputs = packing.view.num_inputs, row_bytes = num_inputs * value_bytes;
    const uint8_t* rows = packing.take(name, element, packing.view.num_outputs * row_bytes);
    const int64_t panel_bytes = packing.view.num_blocks * kBlockInputs * kPanelOutputs * value_bytes;
    uint8_t* values = packing.place_values([&](int64_t) { return panel_bytes; });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        uint8_t* out = values + panel * panel_bytes;
        for (int64_t byte = 0; byte < row_bytes; byte += 4, out += 64) {
            const int64_t count = row_bytes - byte < 4 ? row_bytes - byte : 4;
            for (int row = 0; row < num_rows; ++row)
                std::memcpy(out + row * 4, rows + (first + row) * row_bytes + byte, static_cast<size_t>(count));
        }
    });
}

namespace reference {

struct PanelStream {
    const uint8_t* values;
    PanelStream(const PanelWeights& w, int64_t panel) : values(w.values + w.value_offsets[panel]) {}
};

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

namespace rarefy::matmul::avx2 {

struct PanelStream {
    static constexpr int kFewRows = 16;
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
};

}  // namespace rarefy::matmul::avx2

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul::avx512 {

struct PanelStream {
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
};

}  // namespace rarefy::matmul::avx512

#elif RAREFY_PASS_NEON

namespace rarefy::matmul::neon {
struct PanelStream {
    const uint8_t* values;
    void start(const PanelWeights& w, int64_t panel) { values = w.values + w.value_offsets[panel]; }
};

}  // namespace rarefy::matmul::neon

#endif
