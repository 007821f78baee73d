#include "matmul/dispatch.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "common/cpu.h"
#include "common/pool.h"
#include "matmul/activations.h"
#include "matmul/kernels.h"
#include "matmul/row_panels.h"

namespace rarefy::matmul {
namespace {

struct Row {
    Encoding encoding;
    Isa isa;
    KernelFunction function;
};

constexpr Row kKernels[] = {
#define RAREFY_KERNEL(name, isa, space) {Encoding::name, Isa::isa, space::name},
#define RAREFY_ENCODING(name, values, isas, ...) RAREFY_##isas(RAREFY_KERNEL, name)
#include "matmul/kernels.inc"
#undef RAREFY_KERNEL
};

constexpr int64_t kTaskProducts = int64_t{1} << 20;  // some 10 us of one thread on packed weights
constexpr int64_t kTaskBytes = int64_t{1} << 19;     // of weights, for one row: some 10 us of memory
constexpr int64_t kTaskPanels = 4;
constexpr int64_t kRowMultiple = 32;  // whole register tiles of every instruction set, and lanes of rows
static_assert(kRowMultiple % kPanelRows == 0 && kRowMultiple % kLaneRows == 0);

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
    const int64_t read = product.weights->num_bytes() * rows.num_rows;
    const int64_t long_enough = std::min(products / kTaskProducts, read / kTaskBytes) / num_threads;
    const int64_t tasks_per_thread = num_threads == 1 ? 1 : std::clamp<int64_t>(long_enough, 1, 8);
    const int64_t wanted = std::max<int64_t>(1, num_threads * tasks_per_thread / std::max<int64_t>(1, row_tasks));
    int64_t panels_per_task = ceil_div(weights.num_panels, wanted);
    if (rows.num_rows > 1 || panels_per_task > kTaskPanels / 2)
        panels_per_task = ceil_div(std::max<int64_t>(panels_per_task, 1), kTaskPanels) * kTaskPanels;
    else
        panels_per_task = kTaskPanels / 2;
    const int64_t panel_tasks = ceil_div(weights.num_panels, panels_per_task);
    return {&weights,  &rows,      product.weights->kernel(), product.y, panels_per_task, rows_per_task,
            row_tasks, first_task, panel_tasks * row_tasks};
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
void multiply_prepared(Activations activations, const std::vector<Product>& products) {
    thread_local PanelScratch panel_scratch;
    add_row_panels(activations, products, panel_scratch);
    std::vector<Grid> grids;
    grids.reserve(products.size());
    int64_t num_tasks = 0;
    for (const Product& product : products) {
        grids.push_back(make_grid(product, rows_for(*product.weights, activations), num_tasks));
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
    panel_scratch.trim();
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::reference: return "reference";
        case Isa::neon: return "neon";
        case Isa::avx2: return "avx2";
        case Isa::avx_vnni: return "avx_vnni";
        case Isa::avx512: return "avx512";
        case Isa::avx512_bf16: return "avx512_bf16";
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
        case Isa::avx512_bf16: return can_run_avx512_bf16(cpu);
        case Isa::amx: return can_run_amx(cpu);
    }
    return false;
}

KernelFunction find_kernel(Encoding encoding, Isa isa) {
    for (const Row& row : kKernels)
        if (row.encoding == encoding && row.isa == isa) return row.function;
    throw std::invalid_argument(std::string("no kernel for this format on ") + name(isa));
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
