#include "matmul/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

#include "common/cpu.h"
#include "common/pool.h"
#include "matmul/kernels.h"

namespace rarefy::matmul {
namespace {

struct Row {
    Encoding encoding;
    Isa isa;
    KernelFunction function;
};

constexpr Row kKernels[] = {
#define RAREFY_KERNEL(name, isa) {Encoding::name, Isa::isa, isa::name},
#define RAREFY_ENCODING(name, values, isas, ...) RAREFY_##isas(RAREFY_KERNEL, name)
#include "matmul/kernels.inc"
#undef RAREFY_KERNEL
};

// Rows of activations that one task multiplies with a panel: enough to pay for reading and expanding it.
constexpr int64_t kTaskRows = 128;
constexpr int64_t kTaskProducts = int64_t{1} << 20;  // some 10 us of one thread on packed weights
constexpr int64_t kTaskPanels = 4;
constexpr int64_t kSpreadRows = 4;
constexpr int64_t kRowMultiple = 16;  // whole register tiles of every instruction set

KernelFunction find_kernel(Encoding encoding, Isa isa) {
    for (const Row& row : kKernels)
        if (row.encoding == encoding && row.isa == isa) return row.function;
    throw std::invalid_argument(std::string("no kernel for this format on ") + name(isa));
}

QuantizeFunction find_quantizer(Isa isa) {
    switch (isa) {
#if RAREFY_X86
        case Isa::avx2:
        case Isa::avx_vnni: return quantize_row_avx2;
        case Isa::avx512:
        case Isa::amx: return quantize_row_avx512;
#elif RAREFY_ARM
        case Isa::neon: return quantize_row_neon;
#endif
        default: return quantize_row_reference;
    }
}

// Memory that a thread keeps from call to call, so that small products allocate nothing.
class Scratch {
public:
    uint8_t* reserve(int64_t num_bytes) {
        if (num_bytes > size_) {
            bytes_ = nullptr;  // first, so that both never exist together
            bytes_.reset(
                static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(num_bytes, 64) * 64))));
            if (bytes_ == nullptr) throw std::bad_alloc();
            size_ = num_bytes;
        }
        return bytes_.get();
    }
    // Gives large memory back, so that one long prompt does not hold it for ever.
    void trim() {
        constexpr int64_t kKeep = int64_t{32} << 20;
        if (size_ <= kKeep) return;
        bytes_ = nullptr;
        size_ = 0;
    }

private:
    struct Free {
        void operator()(uint8_t* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<uint8_t[], Free> bytes_;
    int64_t size_ = 0;
};

// What the kernels read, made once per call from x.
struct Activations {
    Rows floats{};
    Rows integers{};
};

// 0, or NaN if one of the numbers is not finite: of a row, or of the scales that its blocks got.
float find_start(const float* x, int64_t count) {
    constexpr uint32_t kExponent = 0x7f800000;
    uint32_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        found |= (bits & kExponent) == kExponent;
    }
    return found != 0 ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
}

Activations prepare_rows(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products,
                         Scratch& scratch) {
    bool floats = false, integers = false, wide = false, skips = false;
    Isa isa = Isa::reference;
    for (const Product& product : products) {
        const Weights& weights = *product.weights;
        (weights.is_integer() ? integers : floats) = true;
        wide |= weights.code_bits() > 4 && weights.isa() == Isa::avx2;
        skips |= weights.view().skips_blocks;
        isa = std::max(isa, weights.isa());
    }
    const int64_t num_blocks = ceil_div(num_inputs, kBlockInputs);
    // Rows that lie a multiple of 4 KiB apart displace each other from the L1 cache, up to five times slower on Zen 5.
    // An odd number of blocks from row to row keeps them apart; rows that are not copied for their padding are for
    // this, where there are enough of them to pay for it.
    const bool spread = num_rows >= kSpreadRows && num_blocks > 0 && num_blocks % 2 == 0;
    const int64_t padded_inputs = num_blocks * kBlockInputs;
    const bool copy = floats && (padded_inputs != num_inputs || (spread && (skips || padded_inputs % 1024 == 0)));
    const int64_t stride = copy || !floats ? padded_inputs + (spread ? kBlockInputs : 0) : num_inputs;
    const int64_t row_count = num_rows * stride;
    const int64_t float_bytes = copy ? row_count * 4 : 0;
    const int64_t q_bytes = integers ? row_count : 0;
    const int64_t wide_bytes = wide ? row_count * 2 : 0;
    const int64_t block_bytes = integers ? ceil_div(num_rows * num_blocks * 4, 64) * 64 : 0;
    const int64_t start_bytes = skips ? num_rows * 4 : 0;
    uint8_t* memory = scratch.reserve(float_bytes + q_bytes + wide_bytes + 3 * block_bytes + start_bytes);
    float* padded = reinterpret_cast<float*>(memory);
    auto* q = reinterpret_cast<int8_t*>(memory + float_bytes);
    auto* wide_q = wide ? reinterpret_cast<int16_t*>(memory + float_bytes + q_bytes) : nullptr;
    auto* scales = reinterpret_cast<float*>(memory + float_bytes + q_bytes + wide_bytes);
    auto* sums = reinterpret_cast<int32_t*>(memory + float_bytes + q_bytes + wide_bytes + block_bytes);
    auto* starts = reinterpret_cast<float*>(memory + float_bytes + q_bytes + wide_bytes + 3 * block_bytes);
    const QuantizeFunction quantize = find_quantizer(wide ? Isa::avx2 : isa);  // all give the same bits
    const auto prepare_row = [&](int64_t row) {
        const float* from = x + row * num_inputs;
        if (copy) {
            std::memcpy(padded + row * stride, from, static_cast<size_t>(num_inputs) * 4);
            std::memset(padded + row * stride + num_inputs, 0, static_cast<size_t>(padded_inputs - num_inputs) * 4);
        }
        if (integers)
            quantize(from, num_inputs, q + row * stride, wide ? wide_q + row * stride : nullptr,
                     scales + row * num_blocks, sums + row * num_blocks * 2);
        if (skips)
            starts[row] = integers ? find_start(scales + row * num_blocks, num_blocks) : find_start(from, num_inputs);
    };
    constexpr int64_t kChunkElements = 16384;
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, stride));
    if (copy || integers || skips) {
        if (num_rows <= rows_per_chunk) {
            for (int64_t row = 0; row < num_rows; ++row) prepare_row(row);
        } else {
            const int64_t size = std::max(rows_per_chunk, ceil_div(num_rows, 4096));
            common::parallel_for(static_cast<int>(ceil_div(num_rows, size)), [&](int chunk) {
                for (int64_t row = chunk * size; row < std::min(num_rows, (chunk + 1) * size); ++row) prepare_row(row);
            });
        }
    }
    Activations activations;
    activations.floats = {num_rows, stride, copy ? padded : x, nullptr, nullptr, nullptr, nullptr, num_blocks, starts};
    activations.integers = {num_rows, stride, nullptr, q, wide_q, scales, sums, num_blocks, starts};
    return activations;
}

// A product cut into tasks: a grid of stretches of panels and of rows.
struct Grid {
    const PanelWeights* weights;
    const Rows* rows;
    KernelFunction function;
    float* y;
    int64_t panels_per_task, rows_per_task, row_tasks;
    int64_t first_task, num_tasks;
};

Grid make_grid(const Product& product, const Rows& rows, int64_t first_task) {
    const PanelWeights& weights = product.weights->view();
    const int64_t num_threads = common::num_threads();
    const int64_t row_tasks = ceil_div(rows.num_rows, kTaskRows);
    const int64_t rows_per_task =
        row_tasks == 0 ? 0 : ceil_div(ceil_div(rows.num_rows, row_tasks), kRowMultiple) * kRowMultiple;
    // Enough tasks that a late thread costs little, but each long enough to pay for its start: claiming it moves a
    // cache line between cores, and its streams begin without prefetched data.
    const int64_t products = weights.num_panels * kPanelOutputs * weights.num_blocks * kBlockInputs * rows.num_rows;
    const int64_t tasks_per_thread =
        num_threads == 1 ? 1 : std::clamp<int64_t>(products / (num_threads * kTaskProducts), 1, 8);
    const int64_t wanted = std::max<int64_t>(1, num_threads * tasks_per_thread / std::max<int64_t>(1, row_tasks));
    int64_t panels_per_task = ceil_div(weights.num_panels, wanted);
    if (rows.num_rows > 1 || panels_per_task > kTaskPanels / 2)
        panels_per_task = ceil_div(std::max<int64_t>(panels_per_task, 1), kTaskPanels) * kTaskPanels;
    else
        panels_per_task = kTaskPanels / 2;
    const int64_t panel_tasks = ceil_div(weights.num_panels, panels_per_task);
    return {&weights,  &rows,           find_kernel(product.weights->encoding(), product.weights->isa()),
            product.y, panels_per_task, rows_per_task,
            row_tasks, first_task,      panel_tasks * row_tasks};
}

void run_task(const Grid& grid, int64_t task) {
    const int64_t panel_begin = task / grid.row_tasks * grid.panels_per_task;
    const int64_t row_begin = task % grid.row_tasks * grid.rows_per_task;
    const Part part{panel_begin, std::min(panel_begin + grid.panels_per_task, grid.weights->num_panels),
                    row_begin,   std::min(row_begin + grid.rows_per_task, grid.rows->num_rows),
                    grid.y,      grid.weights->num_outputs};
    if (part.row_begin >= part.row_end) return;
    if (grid.weights->num_blocks > 0) {
        grid.function(*grid.weights, *grid.rows, part);
        return;
    }
    // No inputs: every output is an empty sum.
    const int64_t first = part.panel_begin * kPanelOutputs;
    const int64_t last = std::min(part.panel_end * kPanelOutputs, grid.weights->num_outputs);
    for (int64_t row = part.row_begin; row < part.row_end; ++row)
        std::fill(part.y + row * part.y_stride + first, part.y + row * part.y_stride + last, 0.0f);
}

// Multiplies rows that are prepared; the outputs of their first row are at the products' `y`.
void multiply_prepared(const Activations& activations, const std::vector<Product>& products) {
    std::vector<Grid> grids;
    grids.reserve(products.size());
    int64_t num_tasks = 0;
    for (const Product& product : products) {
        const bool integer = product.weights->is_integer();
        grids.push_back(make_grid(product, integer ? activations.integers : activations.floats, num_tasks));
        num_tasks += grids.back().num_tasks;
    }
    constexpr int64_t kMaxChunks = 32768;
    const int64_t tasks_per_chunk = std::max<int64_t>(1, ceil_div(num_tasks, kMaxChunks));
    common::parallel_for(static_cast<int>(ceil_div(num_tasks, tasks_per_chunk)), [&](int chunk) {
        const int64_t end = std::min(num_tasks, (chunk + 1) * tasks_per_chunk);
        for (int64_t task = chunk * tasks_per_chunk; task < end; ++task) {
            const auto grid = std::find_if(grids.begin(), grids.end(), [&](const Grid& candidate) {
                return task < candidate.first_task + candidate.num_tasks;
            });
            run_task(*grid, task - grid->first_task);
        }
    });
}

// Rows [begin, end) of quantized taps, copied side by side out of quantized pixels.
Rows gather_taps(const Rows& pixels, const TapRows& taps, int64_t begin, int64_t end, bool skips, Scratch& scratch) {
    const int64_t num_rows = end - begin, num_blocks = taps.num_taps * pixels.num_blocks;
    const int64_t width = pixels.num_blocks * kBlockInputs;
    const int64_t stride = num_blocks * kBlockInputs + (num_blocks % 2 == 0 ? kBlockInputs : 0);  // see prepare_rows
    const int64_t q_bytes = num_rows * stride;
    const int64_t wide_bytes = pixels.wide_q == nullptr ? 0 : 2 * q_bytes;
    const int64_t block_bytes = ceil_div(num_rows * num_blocks * 4, 64) * 64;
    uint8_t* memory = scratch.reserve(q_bytes + wide_bytes + 3 * block_bytes + num_rows * 4);
    auto* q = reinterpret_cast<int8_t*>(memory);
    auto* wide_q = wide_bytes == 0 ? nullptr : reinterpret_cast<int16_t*>(memory + q_bytes);
    auto* scales = reinterpret_cast<float*>(memory + q_bytes + wide_bytes);
    auto* sums = reinterpret_cast<int32_t*>(memory + q_bytes + wide_bytes + block_bytes);
    auto* starts = reinterpret_cast<float*>(memory + q_bytes + wide_bytes + 3 * block_bytes);
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
    };
    constexpr int64_t kChunkRows = 64;
    common::parallel_for(static_cast<int>(ceil_div(num_rows, kChunkRows)), [&](int chunk) {
        for (int64_t row = chunk * kChunkRows; row < std::min(num_rows, (chunk + 1) * kChunkRows); ++row)
            gather_row(row);
    });
    return {num_rows, stride, nullptr, q, wide_q, scales, sums, num_blocks, starts};
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::reference: return "reference";
        case Isa::neon: return "neon";
        case Isa::avx2: return "avx2";
        case Isa::avx_vnni: return "avx_vnni";
        case Isa::avx512: return "avx512";
        case Isa::amx: return "amx";
    }
    return "";
}

bool can_run(Isa isa, const common::CpuFlags& cpu) {
    if (std::none_of(std::begin(kKernels), std::end(kKernels), [&](const Row& row) { return row.isa == isa; }))
        return false;
    switch (isa) {
        case Isa::reference: return true;
        case Isa::neon: return can_run_neon(cpu);
        case Isa::avx2: return can_run_avx2(cpu);
        case Isa::avx_vnni: return can_run_avx_vnni(cpu);
        case Isa::avx512: return can_run_avx512(cpu);
        case Isa::amx: return can_run_amx(cpu);
    }
    return false;
}

Isa runnable_isa(const std::string& wanted) {
    for (const Isa isa : kIsas) {
        if (wanted != name(isa)) continue;
        if (can_run(isa, common::detect_cpu())) return isa;
        throw std::invalid_argument("this machine cannot run " + wanted);
    }
    throw std::invalid_argument("unknown instruction set " + wanted);
}

std::vector<ListedKernel> list_kernels() {
    std::vector<ListedKernel> list;
    const auto add = [&](Encoding encoding, std::initializer_list<const char*> formats) {
        for (const Row& row : kKernels)
            for (const char* format : formats)
                if (row.encoding == encoding) list.push_back({format, row.isa});
    };
#define RAREFY_ENCODING(name, values, isas, ...) add(Encoding::name, {__VA_ARGS__});
#include "matmul/kernels.inc"
    return list;
}

void multiply(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Product>& products) {
    thread_local Scratch scratch;
    const Activations activations = prepare_rows(x, num_rows, num_inputs, products, scratch);
    multiply_prepared(activations, products);
    scratch.trim();
}

void multiply_taps(const float* pixels, int64_t num_pixels, int64_t num_channels, const TapRows& taps,
                   const std::vector<Product>& products) {
    thread_local Scratch pixel_scratch, row_scratch;
    const Activations image = prepare_rows(pixels, num_pixels, num_channels, products, pixel_scratch);
    const bool skips = std::any_of(products.begin(), products.end(),
                                   [](const Product& product) { return product.weights->view().skips_blocks; });
    // A piece of rows is still in a cache when it is multiplied.
    constexpr int64_t kPieceBytes = int64_t{1} << 19;
    const int64_t width = taps.num_taps * num_channels;
    const int64_t piece = std::max(kTaskRows, kPieceBytes / std::max<int64_t>(1, width) / kTaskRows * kTaskRows);
    for (int64_t begin = 0; begin < taps.num_rows; begin += piece) {
        const int64_t end = std::min(begin + piece, taps.num_rows);
        Activations rows;
        rows.integers = gather_taps(image.integers, taps, begin, end, skips, row_scratch);
        std::vector<Product> parts = products;
        for (Product& part : parts) part.y += begin * part.weights->view().num_outputs;
        multiply_prepared(rows, parts);
    }
    pixel_scratch.trim();
    row_scratch.trim();
}

}  // namespace rarefy::matmul
