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
constexpr int64_t kTaskBytes = int64_t{1} << 19;     // of weights: some 10 us of memory
constexpr int64_t kPieceBytes = int64_t{1} << 17;    // the same, of the shortest piece of one row: some 3 us
constexpr int64_t kTaskPanels = 4;
constexpr int64_t kRowMultiple = kPanelRows;  // whole register tiles of every instruction set

// A product cut into tasks: a grid of stretches of panels and of rows. The stretches of one row are cut into pieces;
// first come the first pieces of all stretches.
struct Grid {
    const PanelWeights* weights;
    const Rows* rows;
    KernelFunction function;
    float* y;
    int64_t panels_per_stretch, rows_per_task, row_tasks, num_pieces;
    int64_t first_task, num_tasks;
};

Grid make_grid(const Product& product, const Rows& rows, int64_t first_task, int64_t panels_per_stretch,
               int64_t num_pieces) {
    const PanelWeights& weights = product.weights->view();
    const int64_t row_tasks = ceil_div(rows.num_rows, kTaskRows);
    const int64_t rows_per_task =
        row_tasks == 0 ? 0 : ceil_div(ceil_div(rows.num_rows, row_tasks), kRowMultiple) * kRowMultiple;
    const int64_t num_tasks = ceil_div(weights.num_panels, panels_per_stretch) * row_tasks * num_pieces;
    return {&weights,
            &rows,
            product.weights->kernel(),
            product.y,
            panels_per_stretch,
            rows_per_task,
            row_tasks,
            num_pieces,
            first_task,
            num_tasks};
}

// One row waits for memory alone. So every thread has a stretch of its own, where it goes on reading what it has
// fetched ahead, and nobody else's core has. A long first piece, and then short ones that any thread takes, for one
// that is late.
Grid make_row_grid(const Product& product, const Rows& rows, int64_t first_task) {
    const int64_t num_threads = common::num_threads(), num_panels = product.weights->view().num_panels;
    int64_t num_pieces = 1;
    if (num_threads > 1) {
        int64_t left = product.weights->num_bytes() / num_threads / 4;
        for (; left >= kPieceBytes; left /= 2) ++num_pieces;
    }
    const int64_t share = std::max<int64_t>(1, ceil_div(num_panels, num_threads));
    const int64_t multiple = share > kTaskPanels / 2 ? kTaskPanels : kTaskPanels / 2;
    return make_grid(product, rows, first_task, round_up(share, multiple), num_pieces);
}

// Enough tasks that a late thread costs little, but each long enough to pay for its start: claiming it moves a cache
// line between cores, and its streams begin without prefetched data.
Grid make_rows_grid(const Product& product, const Rows& rows, int64_t first_task) {
    const PanelWeights& weights = product.weights->view();
    const int64_t num_threads = common::num_threads();
    const int64_t row_tasks = ceil_div(rows.num_rows, kTaskRows);
    const int64_t products = weights.num_panels * kPanelOutputs * weights.num_blocks * kBlockInputs * rows.num_rows;
    const int64_t read = product.weights->num_bytes() * rows.num_rows;
    const int64_t long_enough = std::min(products / kTaskProducts, read / kTaskBytes) / num_threads;
    const int64_t tasks_per_thread = num_threads == 1 ? 1 : std::clamp<int64_t>(long_enough, 1, 8);
    const int64_t wanted = std::max<int64_t>(1, num_threads * tasks_per_thread / std::max<int64_t>(1, row_tasks));
    const int64_t panels_per_task = std::max<int64_t>(1, ceil_div(weights.num_panels, wanted));
    return make_grid(product, rows, first_task, round_up(panels_per_task, kTaskPanels), 1);
}

// Three quarters of a stretch are its first piece, and half of what is left each other one.
int64_t piece_begin(int64_t num_panels, int64_t piece, int64_t num_pieces) {
    if (piece == 0) return 0;
    if (piece == num_pieces) return num_panels;
    return (num_panels - (num_panels >> (piece + 1))) / kTaskPanels * kTaskPanels;
}

void run_task(const Grid& grid, int64_t task) {
    const int64_t tasks_per_piece = grid.num_tasks / grid.num_pieces;
    const int64_t piece = task / tasks_per_piece, place = task % tasks_per_piece;
    const int64_t begin = place / grid.row_tasks * grid.panels_per_stretch;
    const int64_t length = std::min(grid.panels_per_stretch, grid.weights->num_panels - begin);
    const int64_t row_begin = place % grid.row_tasks * grid.rows_per_task;
    const Part part{begin + piece_begin(length, piece, grid.num_pieces),
                    begin + piece_begin(length, piece + 1, grid.num_pieces),
                    row_begin,
                    std::min(row_begin + grid.rows_per_task, grid.rows->num_rows),
                    grid.y,
                    grid.weights->num_outputs};
    if (part.panel_begin >= part.panel_end) return;
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
        const Rows& rows = rows_for(*product.weights, activations);
        grids.push_back((rows.num_rows == 1 ? make_row_grid : make_rows_grid)(product, rows, num_tasks));
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
