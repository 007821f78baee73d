// What the block sparse encodings share. A cell is a block of a panel, 16 outputs by 64 inputs, of which one half (32
// inputs) or both are stored; a panel keeps the list of its cells, and the kernels see no others. Stored blocks of the
// layout are whole cells, or halves: their rows are a multiple of 16 and their columns of 32.
//
// extra, of each panel: int32_t number of cells, then one int32_t for each in order, 4 * block + halves; halves: 1 the
// first, 2 the second, 3 both; padded to 64 bytes. values: the stored halves in order, each as in the dense encoding.
// Both follow the ones of the panel before without a gap.
//
// Zeros that no kernel sees must not hide a NaN or an infinity: every sum starts from Rows::starts, which is NaN for a
// row that holds one. For finite rows a skipped cell changes no bit: it would add 0 to a sum that is never -0.
#pragma once

#include "matmul/encodings/encodings.h"

namespace rarefy::matmul {

inline int64_t cell_block(int32_t cell) { return cell >> 2; }
inline int first_column(int32_t cell) { return (cell & 3) == 2 ? kBlockInputs / 2 : 0; }
inline int num_columns(int32_t cell) { return (cell & 3) == 3 ? kBlockInputs : kBlockInputs / 2; }

// Of a list of so many cells, with its padding.
inline int64_t list_words(int64_t count) { return (count + 16) / 16 * 16; }

inline const int32_t* panel_cells(const PanelWeights& w, int64_t panel, int64_t& count) {
    const auto* cells = reinterpret_cast<const int32_t*>(w.extra + w.extra_offsets[panel]);
    count = cells[0];
    return cells + 1;
}

}  // namespace rarefy::matmul

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

// The blocks of a layout as they are on disk.
struct DiskBlocks {
    int64_t rows, columns;         // of a block
    int64_t num_down, num_across;  // blocks
    std::vector<int64_t> starts;   // of each block in the stream of entries; -1 where it is not stored
    int64_t num_entries = 0;

    // Checks block_shape and the mask.
    explicit DiskBlocks(Packing& packing);
    // Entry (row, 32 * half) in the stream, or -1; `count`: how many entries of the row follow it in this half.
    int64_t find(const PanelWeights& view, int64_t row, int64_t half, int64_t& count) const;
};

inline DiskBlocks::DiskBlocks(Packing& packing)
    : rows(packing.integer("block_shape_0", 1, 4096)), columns(packing.integer("block_shape_1", 1, 4096)) {
    require(rows % kPanelOutputs == 0 && columns % (kBlockInputs / 2) == 0, "blocks are not made of half cells");
    const int64_t num_outputs = packing.view.num_outputs, num_inputs = packing.view.num_inputs;
    num_down = ceil_div(num_outputs, rows);
    num_across = ceil_div(num_inputs, columns);
    const int64_t row_bytes = ceil_div(num_across, 8);
    const uint8_t* mask = packing.take("mask", Element::u8, num_down * row_bytes);
    starts.resize(static_cast<size_t>(num_down * num_across));
    for (int64_t down = 0; down < num_down; ++down) {
        const uint8_t* bits = mask + down * row_bytes;
        require(num_across % 8 == 0 || bits[row_bytes - 1] >> (num_across % 8) == 0,
                "mask has bits beyond the last column");
        const int64_t high = num_outputs - down * rows < rows ? num_outputs - down * rows : rows;
        for (int64_t across = 0; across < num_across; ++across) {
            const int64_t left = num_inputs - across * columns;
            const bool stored = bits[across / 8] >> (across % 8) & 1;
            starts[static_cast<size_t>(down * num_across + across)] = stored ? num_entries : -1;
            if (stored) num_entries += high * (left < columns ? left : columns);
        }
    }
}

inline int64_t DiskBlocks::find(const PanelWeights& view, int64_t row, int64_t half, int64_t& count) const {
    const int64_t column = half * (kBlockInputs / 2), across = column / columns;
    count = 0;
    if (column >= view.num_inputs) return -1;
    const int64_t start = starts[static_cast<size_t>(row / rows * num_across + across)];
    if (start < 0) return -1;
    const int64_t begin = across * columns;
    const int64_t width = view.num_inputs - begin < columns ? view.num_inputs - begin : columns;
    const int64_t left = view.num_inputs - column;
    count = left < kBlockInputs / 2 ? left : kBlockInputs / 2;
    return start + row % rows * width + (column - begin);
}

// Half cells as in pack_dense_lanes: steps whose lanes hold as many neighbouring columns as fit in four bytes.
inline void pack_blocks(Packing& packing, const char* name, Element element, int64_t value_bytes) {
    const DiskBlocks blocks(packing);
    PanelWeights& view = packing.view;
    view.skips_blocks = true;
    const uint8_t* entries = packing.take(name, element, blocks.num_entries * value_bytes);
    const int64_t half_bytes = kBlockInputs / 2 * kPanelOutputs * value_bytes;
    int64_t ignored;
    const auto halves = [&](int64_t panel, int64_t block) {
        const int64_t row = panel * kPanelOutputs;
        return (blocks.find(view, row, 2 * block, ignored) >= 0 ? 1 : 0) |
               (blocks.find(view, row, 2 * block + 1, ignored) >= 0 ? 2 : 0);
    };
    int64_t* const offsets = packing.allocate_offsets();
    for (int64_t panel = 0; panel < view.num_panels; ++panel) {
        int64_t count = 0;
        for (int64_t block = 0; block < view.num_blocks; ++block) count += halves(panel, block) != 0;
        offsets[panel + 1] = offsets[panel] + list_words(count) * 4;
    }
    uint8_t* const lists = packing.allocate(offsets[view.num_panels]);
    for (int64_t panel = 0; panel < view.num_panels; ++panel) {
        auto* list = reinterpret_cast<int32_t*>(lists + offsets[panel]);
        for (int64_t block = 0; block < view.num_blocks; ++block)
            if (const int stored = halves(panel, block)) list[++list[0]] = static_cast<int32_t>(4 * block + stored);
    }
    view.extra = lists;
    view.extra_offsets = offsets;
    uint8_t* const values = packing.place_values([&](int64_t panel) {
        int64_t count, num_bytes = 0;
        const int32_t* cells = panel_cells(view, panel, count);
        for (int64_t k = 0; k < count; ++k) num_bytes += num_columns(cells[k]) / 32 * half_bytes;
        return num_bytes;
    });
    packing.for_each_panel([&](int64_t panel, int64_t first, int num_rows) {
        int64_t count;
        const int32_t* cells = panel_cells(view, panel, count);
        uint8_t* out = values + view.value_offsets[panel];
        for (int64_t k = 0; k < count; ++k) {
            const int64_t half = 2 * cell_block(cells[k]) + first_column(cells[k]) / 32;
            for (int64_t h = half; h < half + num_columns(cells[k]) / 32; ++h, out += half_bytes) {
                for (int row = 0; row < num_rows; ++row) {
                    int64_t columns;
                    const uint8_t* from = entries + blocks.find(view, first + row, h, columns) * value_bytes;
                    for (int64_t byte = 0; byte < columns * value_bytes; byte += 4) {
                        const int64_t left = columns * value_bytes - byte;
                        std::memcpy(out + byte * kPanelOutputs + row * 4, from + byte,
                                    static_cast<size_t>(left < 4 ? left : 4));
                    }
                }
            }
        }
    });
}

namespace reference {

// Block by block, the ones without a cell too. `Half` decodes a stored half: Half(values, out) gives
// [column][output].
struct CellStream {
    const uint8_t* values;
    const int32_t *cell, *end;
    int64_t next_block = 0;

    CellStream(const PanelWeights& w, int64_t panel) : values(w.values + w.value_offsets[panel]) {
        int64_t count;
        cell = panel_cells(w, panel, count);
        end = cell + count;
    }
    // Which halves of the next block are stored.
    int halves() {
        const int64_t block = next_block++;
        return cell != end && cell_block(*cell) == block ? *cell++ & 3 : 0;
    }
};

}  // namespace reference
}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2
#include "matmul/encodings/block_avx2.h"
#elif RAREFY_PASS_AVX512
#if RAREFY_PASS_AMX
#include "matmul/encodings/block_amx.h"
#endif
#include "matmul/encodings/block_avx512.h"
#elif RAREFY_PASS_NEON
#include "matmul/encodings/block_neon.h"
#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

// 1 where an entry is kept, in the order in which the entries are stored: adds `mask` and block_shape. `order`: where
// each of those stands in the matrix.
inline std::vector<uint8_t> add_block_mask(Sample& sample, const SampleSpec& spec, SampleMaker& maker,
                                           std::vector<size_t>& order) {
    const bool any = spec.block_rows == 0;
    const int64_t high = any ? 16 * (1 + maker.below(2)) : spec.block_rows;
    const int64_t wide = any ? 32 * (1 + maker.below(3)) : spec.block_columns;
    const int64_t down = (sample.num_outputs + high - 1) / high, across = (sample.num_inputs + wide - 1) / wide;
    std::vector<uint8_t> kept, bytes(static_cast<size_t>(down * ((across + 7) / 8)), 0);
    for (int64_t i = 0; i < down; ++i) {
        for (int64_t j = 0; j < across; ++j) {
            const bool stored = maker.chance(spec.density);
            bytes[static_cast<size_t>(i * ((across + 7) / 8) + j / 8)] |= static_cast<uint8_t>(stored << j % 8);
            for (int64_t row = i * high; row < (i + 1) * high && row < sample.num_outputs; ++row) {
                for (int64_t column = j * wide; column < (j + 1) * wide && column < sample.num_inputs; ++column) {
                    kept.push_back(stored);
                    order.push_back(static_cast<size_t>(row * sample.num_inputs + column));
                }
            }
        }
    }
    sample.arrays.push_back({"mask", Element::u8, bytes});
    sample.integers.push_back({"block_shape_0", high});
    sample.integers.push_back({"block_shape_1", wide});
    return kept;
}

}  // namespace rarefy::matmul

#endif
