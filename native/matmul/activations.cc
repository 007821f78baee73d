#include "matmul/activations.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>

#include "common/pool.h"
#include "matmul/kernels.h"
#include "matmul/quantize_rows.h"
#include "matmul/row_panels.h"

namespace rarefy::matmul {
namespace {

constexpr int64_t kSpreadRows = 4;

QuantizeFunction find_quantizer(Isa isa) {
    switch (isa) {
#if RAREFY_X86
        case Isa::avx2:
        case Isa::avx_vnni: return quantize_row_avx2;
        case Isa::avx512:
        case Isa::avx512_bf16:
        case Isa::amx: return quantize_row_avx512;
#elif RAREFY_ARM
        case Isa::neon: return quantize_row_neon;
#endif
        default: return quantize_row_reference;
    }
}

RoundFunction find_rounder(Isa isa) {
#if RAREFY_X86
    if (isa >= Isa::avx512) return round_row_avx512;
    if (isa >= Isa::avx2) return round_row_avx2;
#elif RAREFY_ARM
    if (isa == Isa::neon) return round_row_neon;
#endif
    return round_row_reference;
}

// What sums of bytes begin with, of each block (Rows::byte_starts).
void make_byte_starts(const int32_t* half_sums, int64_t num_blocks, int32_t* starts) {
    for (int64_t block = 0; block < num_blocks; ++block)
        starts[block] = -kByteZeroPoint * (half_sums[2 * block] + half_sums[2 * block + 1]);
}

float start_unless(bool finite) { return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(); }

// 0, or NaN if one of the numbers is not finite: of a row, or of the scales that its blocks got.
float find_start(const float* x, int64_t count) {
    constexpr uint32_t kExponent = 0x7f800000;
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        found |= (bits & kExponent) == kExponent;
    }
    return start_unless(found == 0);
}

// The same of bfloat16.
float find_start(const uint16_t* bits, int64_t count) {
    constexpr uint16_t kExponent = 0x7f80;
    uint16_t found = 0;
    for (int64_t i = 0; i < count; ++i) found |= (bits[i] & kExponent) == kExponent;
    return start_unless(found == 0);
}

// Which activations some product needs.
struct Needs {
    bool floats = false, integers = false, wide_q = false, integer_starts = false;
    bool bf16_bits = false, bf16_numbers = false, bf16_starts = false;
    Isa isa = Isa::reference;
    explicit Needs(const std::vector<Product>& products) {
        for (const Product& product : products) {
            const Weights& weights = *product.weights;
            const bool skips = weights.view().skips_blocks;
            isa = std::max(isa, weights.isa());
            floats |= !weights.is_integer() && !weights.is_bf16();
            integers |= weights.is_integer();
            wide_q |= weights.code_bits() > 4 && weights.isa() == Isa::avx2;
            integer_starts |= skips && weights.is_integer();
            bf16_bits |= weights.is_bf16() && weights.isa() >= Isa::avx512;
            bf16_numbers |= weights.is_bf16() && weights.isa() <= Isa::avx512;
            bf16_starts |= skips && weights.is_bf16();
        }
    }
};

// The parts of a piece of memory, each aligned to 64.
struct Places {
    int64_t num_bytes = 0;
    // Where `count` bytes go; -1 where they are not needed.
    int64_t add(bool needed, int64_t count) {
        if (!needed) return -1;
        const int64_t at = num_bytes;
        num_bytes += round_up(count, 64);
        return at;
    }
};

template <class T>
T* place_of(uint8_t* memory, int64_t at) {
    return at < 0 ? nullptr : reinterpret_cast<T*>(memory + at);
}

}  // namespace

uint8_t* Scratch::reserve(int64_t num_bytes) {
    if (num_bytes <= size_) return bytes_.get();
    bytes_ = nullptr;  // first, so that both never exist together
    // Large pages, where the system has them: pages that lie anywhere displace each other from the L2 cache.
    constexpr int64_t kPage = int64_t{2} << 20;
    const int64_t multiple = num_bytes >= kPage / 4 ? kPage : 64;
    const auto size = static_cast<size_t>(round_up(num_bytes, multiple));
    bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(static_cast<size_t>(multiple), size)));
    size_ = bytes_ == nullptr ? 0 : num_bytes;
    if (bytes_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (multiple == kPage) madvise(bytes_.get(), size, MADV_HUGEPAGE);  // refused: small pages do as well
#endif
    return bytes_.get();
}

RowPlan plan_rows(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products,
                  Scratch& scratch) {
    const Needs needs(products);
    const int64_t num_blocks = ceil_div(num_inputs, kBlockInputs);
    // Rows that lie a multiple of 4 KiB apart displace each other from the L1 cache, up to five times slower on Zen 5.
    // An odd number of blocks from row to row keeps them apart; rows that are not copied for their padding are for
    // this, where there are enough of them to pay for it.
    const bool spread = num_rows >= kSpreadRows && num_blocks > 0 && num_blocks % 2 == 0;
    const int64_t padded_inputs = num_blocks * kBlockInputs;
    const bool copy = needs.floats && (padded_inputs != num_inputs || (spread && padded_inputs % 1024 == 0));
    const int64_t stride = copy || !needs.floats ? padded_inputs + (spread ? kBlockInputs : 0) : num_inputs;
    const int64_t row_count = num_rows * stride, block_bytes = num_rows * num_blocks * 4;
    Places places;
    const int64_t floats_at = places.add(copy, row_count * 4);
    const int64_t numbers_at = places.add(needs.bf16_numbers, row_count * 4);
    const int64_t bits_at = places.add(needs.bf16_bits, row_count * 2);
    const int64_t bf16_starts_at = places.add(needs.bf16_starts, num_rows * 4);
    const int64_t q_at = places.add(needs.integers, row_count);
    const int64_t wide_q_at = places.add(needs.wide_q, row_count * 2);
    const int64_t scales_at = places.add(needs.integers, block_bytes);
    const int64_t sums_at = places.add(needs.integers, 2 * block_bytes);
    const int64_t byte_starts_at = places.add(needs.integers && needs.isa >= Isa::avx512, block_bytes);
    const int64_t integer_starts_at = places.add(needs.integer_starts, num_rows * 4);
    uint8_t* const memory = scratch.reserve(places.num_bytes);
    auto* const floats = place_of<float>(memory, floats_at);
    auto* const numbers = place_of<float>(memory, numbers_at);
    auto* const bits = place_of<uint16_t>(memory, bits_at);
    auto* const bf16_starts = place_of<float>(memory, bf16_starts_at);
    auto* const q = place_of<int8_t>(memory, q_at);
    auto* const wide_q = place_of<int16_t>(memory, wide_q_at);
    auto* const scales = place_of<float>(memory, scales_at);
    auto* const sums = place_of<int32_t>(memory, sums_at);
    auto* const byte_starts = place_of<int32_t>(memory, byte_starts_at);
    auto* const integer_starts = place_of<float>(memory, integer_starts_at);
    const QuantizeFunction quantize = find_quantizer(needs.wide_q ? Isa::avx2 : needs.isa);  // all give the same bits
    const RoundFunction round = find_rounder(needs.isa);                                     // and these too
    const auto at_row = [stride](auto* rows, int64_t row) { return rows == nullptr ? nullptr : rows + row * stride; };
    const auto prepare_floats = [=](int64_t row) {
        const float* from = x + row * num_inputs;
        if (copy) {
            std::memcpy(floats + row * stride, from, static_cast<size_t>(num_inputs) * 4);
            std::memset(floats + row * stride + num_inputs, 0, static_cast<size_t>(padded_inputs - num_inputs) * 4);
        }
        if (needs.bf16_bits || needs.bf16_numbers) {
            round(from, num_inputs, at_row(bits, row), at_row(numbers, row));
            if (needs.bf16_starts)
                bf16_starts[row] = needs.bf16_bits ? find_start(bits + row * stride, padded_inputs)
                                                   : find_start(numbers + row * stride, padded_inputs);
        }
    };
    const auto quantize_rows = [=](int64_t begin, int64_t end) {
#if RAREFY_X86
        if (quantize == quantize_row_avx512 && padded_inputs == num_inputs) {
            quantize_rows_avx512(x + begin * num_inputs, end - begin, num_blocks, q + begin * stride, stride,
                                 scales + begin * num_blocks, sums + begin * num_blocks * 2,
                                 byte_starts + begin * num_blocks);
            return;
        }
#endif
        for (int64_t row = begin; row < end; ++row) {
            int32_t* const row_sums = sums + row * num_blocks * 2;
            quantize(x + row * num_inputs, num_inputs, q + row * stride, at_row(wide_q, row), scales + row * num_blocks,
                     row_sums);
            if (byte_starts != nullptr) make_byte_starts(row_sums, num_blocks, byte_starts + row * num_blocks);
        }
    };
    const auto prepare = [=](int64_t begin, int64_t end) {
        if (needs.floats || needs.bf16_bits || needs.bf16_numbers)
            for (int64_t row = begin; row < end; ++row) prepare_floats(row);
        if (needs.integers) quantize_rows(begin, end);
        if (needs.integer_starts)
            for (int64_t row = begin; row < end; ++row)
                integer_starts[row] = find_start(scales + row * num_blocks, num_blocks);
    };
    Rows none{};
    none.num_rows = num_rows;
    none.stride = stride;
    none.num_blocks = num_blocks;
    Activations all{none, none, none};
    all.floats.x = copy ? floats : x;
    all.bf16.x = numbers;
    all.bf16.bf16_x = bits;
    all.bf16.starts = bf16_starts;
    all.integers.q = q;
    all.integers.wide_q = wide_q;
    all.integers.scales = scales;
    all.integers.sums = sums;
    all.integers.starts = integer_starts;
    all.integers.byte_starts = byte_starts;
    if (places.num_bytes == 0) return {all, nullptr};
    return {all, prepare};
}

Activations prepare_rows(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products,
                         Scratch& scratch) {
    const RowPlan plan = plan_rows(x, num_rows, num_inputs, products, scratch);
    if (plan.prepare == nullptr) return plan.activations;
    constexpr int64_t kChunkElements = 16384;
    const int64_t stride = plan.activations.integers.stride;  // as of all
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, stride));
    if (num_rows <= rows_per_chunk) {
        plan.prepare(0, num_rows);
    } else {
        const int64_t size = std::max(rows_per_chunk, ceil_div(num_rows, 4096));
        common::parallel_for(static_cast<int>(ceil_div(num_rows, size)),
                             [&](int chunk) { plan.prepare(chunk * size, std::min(num_rows, (chunk + 1) * size)); });
    }
    return plan.activations;
}

#if RAREFY_X86
namespace {

template <class Block>
void add_blocks(Rows& rows, void (*make)(const Rows&, int64_t, Block*), Scratch& scratch) {
    const int64_t num_row_panels = rows.num_rows / kPanelRows;
    const int64_t num_bytes = num_row_panels * rows.num_blocks * static_cast<int64_t>(sizeof(Block));
    auto* blocks = reinterpret_cast<Block*>(scratch.reserve(num_bytes));
    common::parallel_for(static_cast<int>(num_row_panels), [&](int row_panel) { make(rows, row_panel, blocks); });
    rows.row_panels = blocks;
}

void add_lanes(Rows& rows, bool integers, const std::vector<Product>& products, Scratch& scratch) {
    const bool read = std::any_of(products.begin(), products.end(), [&](const Product& product) {
        const int64_t fewest = product.weights->view().lane_rows;
        return product.weights->is_integer() == integers && fewest > 0 && rows.num_rows >= fewest;
    });
    if (!read) return;
    const int64_t stride = lane_stride(rows.num_rows);
    const int64_t block_bytes = integers ? code_lanes_bytes(stride) : float_lanes_bytes(stride);
    uint8_t* const lanes = scratch.reserve(rows.num_blocks * block_bytes);
    const auto make = integers ? make_code_lanes_avx2 : make_float_lanes_avx2;
    common::parallel_for(static_cast<int>(ceil_div(rows.num_rows, kLaneRows)),
                         [&](int chunk) { make(rows, chunk * kLaneRows, lanes); });
    rows.lanes = lanes;
}

}  // namespace

void add_row_panels(Activations& activations, const std::vector<Product>& products, PanelScratch& scratch) {
    add_lanes(activations.integers, true, products, scratch.code_lanes);
    add_lanes(activations.bf16, false, products, scratch.float_lanes);
    const auto reads = [&](const Rows& rows, Encoding encoding, std::initializer_list<Isa> isas) {
        // Fewer rows fill no tile, and panels of fewer blocks are done before turning their sums around has paid.
        constexpr int64_t kFewestRows = 4 * kPanelRows, kFewestBlocks = 33;
        if (rows.num_rows < kFewestRows || rows.num_blocks < kFewestBlocks) return false;
        return std::any_of(products.begin(), products.end(), [&](const Product& product) {
            const Weights& weights = *product.weights;
            return weights.encoding() == encoding && std::find(isas.begin(), isas.end(), weights.isa()) != isas.end();
        });
    };
    if (reads(activations.integers, Encoding::block_int8, {Isa::avx512, Isa::avx512_bf16}))
        add_blocks(activations.integers, make_code_blocks_avx512, scratch.integers);
    if (reads(activations.bf16, Encoding::block_bf16, {Isa::avx512_bf16}))
        add_blocks(activations.bf16, make_pair_blocks_avx512, scratch.bf16);
}
#else
void add_row_panels(Activations&, const std::vector<Product>&, PanelScratch&) {}
#endif

Rows gather_taps(const Rows& pixels, const TapRows& taps, int64_t begin, int64_t end, bool skips, Scratch& scratch) {
    const int64_t num_rows = end - begin, num_blocks = taps.num_taps * pixels.num_blocks;
    const int64_t width = pixels.num_blocks * kBlockInputs;
    const int64_t stride = num_blocks * kBlockInputs + (num_blocks % 2 == 0 ? kBlockInputs : 0);  // see prepare_rows
    const int64_t q_bytes = num_rows * stride;
    const int64_t wide_bytes = pixels.wide_q == nullptr ? 0 : 2 * q_bytes;
    const int64_t block_bytes = ceil_div(num_rows * num_blocks * 4, 64) * 64;
    uint8_t* memory = scratch.reserve(q_bytes + wide_bytes + 4 * block_bytes + num_rows * 4);
    auto* q = reinterpret_cast<int8_t*>(memory);
    auto* wide_q = wide_bytes == 0 ? nullptr : reinterpret_cast<int16_t*>(memory + q_bytes);
    auto* scales = reinterpret_cast<float*>(memory + q_bytes + wide_bytes);
    auto* sums = reinterpret_cast<int32_t*>(memory + q_bytes + wide_bytes + block_bytes);
    auto* byte_starts = pixels.byte_starts == nullptr
                            ? nullptr
                            : reinterpret_cast<int32_t*>(memory + q_bytes + wide_bytes + 3 * block_bytes);
    auto* starts = reinterpret_cast<float*>(memory + q_bytes + wide_bytes + 4 * block_bytes);
    const auto gather_row = [&](int64_t row) {
        starts[row] = 0.0f;
        for (int64_t tap = 0; tap < taps.num_taps; ++tap) {
            const int64_t pixel = taps.row_starts[begin + row] + taps.tap_offsets[tap];
            const int64_t to = row * stride + tap * width, from = pixel * pixels.stride;
            std::memcpy(q + to, pixels.q + from, static_cast<size_t>(width));
            if (wide_q != nullptr) std::memcpy(wide_q + to, pixels.wide_q + from, static_cast<size_t>(width) * 2);
            const int64_t block_to = row * num_blocks + tap * pixels.num_blocks, block_from = pixel * pixels.num_blocks;
            for (int64_t block = 0; block < pixels.num_blocks; ++block) {
                scales[block_to + block] = pixels.scales[block_from + block];
                std::memcpy(sums + 2 * (block_to + block), pixels.sums + 2 * (block_from + block), 8);
            }
            if (skips) starts[row] += pixels.starts[pixel];  // NaN stays NaN
        }
        if (byte_starts != nullptr)
            make_byte_starts(sums + 2 * row * num_blocks, num_blocks, byte_starts + row * num_blocks);
    };
    constexpr int64_t kChunkRows = 64;
    common::parallel_for(static_cast<int>(ceil_div(num_rows, kChunkRows)), [&](int chunk) {
        for (int64_t row = chunk * kChunkRows; row < std::min(num_rows, (chunk + 1) * kChunkRows); ++row)
            gather_row(row);
    });
    return {num_rows, stride,     nullptr, nullptr, q,           wide_q, scales,
            sums,     num_blocks, starts,  nullptr, byte_starts, nullptr};
}

}  // namespace rarefy::matmul
