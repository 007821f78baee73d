#include "matmul/dispatch.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <stdexcept>

#include "common/cpu.h"
#include "common/pool.h"
#include "matmul/activations.h"
#include "matmul/kernels.h"
#include "matmul/row_panels.h"

namespace rarefy::matmul {

bool fetches_ahead = !common::fetches_best_alone();

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

constexpr int64_t kTaskProducts = int64_t{1} << 20;   // some 10 us of one thread on packed weights
constexpr int64_t kTaskBytes = int64_t{1} << 19;      // of weights: some 10 us of memory
constexpr int64_t kRowPieceBytes = int64_t{1} << 18;  // of the shortest piece of one row: some 6 us
constexpr int64_t kTaskPanels = 4;
constexpr int64_t kRowMultiple = 32;  // whole register tiles of every instruction set, and lanes of rows
static_assert(kRowMultiple % kPanelRows == 0 && kRowMultiple % kLaneRows == 0);

// `function`, or zeros where there are no inputs: every output is an empty sum then.
void run_part(const PanelWeights& weights, const Rows& rows, KernelFunction function, const Part& part) {
    if (part.panel_begin >= part.panel_end || part.row_begin >= part.row_end) return;
    if (weights.num_blocks > 0) {
        function(weights, rows, part);
        return;
    }
    const int64_t first = part.panel_begin * kPanelOutputs;
    const int64_t last = std::min(part.panel_end * kPanelOutputs, weights.num_outputs);
    for (int64_t row = part.row_begin; row < part.row_end; ++row)
        std::fill(part.y + row * part.y_stride + first, part.y + row * part.y_stride + last, 0.0f);
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
    const int64_t read = product.weights->num_read_bytes() * rows.num_rows;
    const int64_t long_enough = std::min(products / kTaskProducts, read / kTaskBytes) / num_threads;
    const int64_t tasks_per_thread = num_threads == 1 ? 1 : std::clamp<int64_t>(long_enough, 1, 8);
    const int64_t wanted = std::max<int64_t>(1, num_threads * tasks_per_thread / std::max<int64_t>(1, row_tasks));
    const int64_t panels_per_task = round_up(std::max<int64_t>(ceil_div(weights.num_panels, wanted), 1), kTaskPanels);
    const int64_t panel_tasks = ceil_div(weights.num_panels, panels_per_task);
    return {&weights,  &rows,      product.weights->kernel(), product.y, panels_per_task, rows_per_task,
            row_tasks, first_task, panel_tasks * row_tasks};
}

void run_task(const Grid& grid, int64_t task) {
    const int64_t panel_begin = task / grid.row_tasks * grid.panels_per_task;
    const int64_t row_begin = task % grid.row_tasks * grid.rows_per_task;
    run_part(*grid.weights, *grid.rows, grid.function,
             {panel_begin, std::min(panel_begin + grid.panels_per_task, grid.weights->num_panels), row_begin,
              std::min(row_begin + grid.rows_per_task, grid.rows->num_rows), grid.y, grid.weights->num_outputs, 0});
}

void run_grids(const std::vector<Grid>& grids) {
    constexpr int64_t kMaxChunks = 32768;
    const int64_t num_tasks = grids.empty() ? 0 : grids.back().first_task + grids.back().num_tasks;
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

// One row waits for memory alone, and a thread that begins to read elsewhere waits longest. So every thread has a
// stretch of panels of its own, in pieces: half of it, half of what is left, ... It reads on from piece to piece what
// it has fetched ahead, and a thread that is done takes the last piece of another.
class RowProduct {
public:
    RowProduct(const Product& product, const Rows& rows)
        : weights_(product.weights->view()), rows_(rows), function_(product.weights->kernel()), y_(product.y) {
        const int64_t num_threads = common::num_threads();
        const int64_t share = std::max<int64_t>(1, ceil_div(weights_.num_panels, num_threads));
        panels_per_stretch_ = round_up(share, share > kTaskPanels / 2 ? kTaskPanels : kTaskPanels / 2);
        if (num_threads > 1)
            for (int64_t left = product.weights->num_read_bytes() / num_threads / 2; left >= kRowPieceBytes; left /= 2)
                ++num_pieces_;
        in_halves_ = num_pieces_ > 1 && product.weights->isa() >= Isa::avx512;
    }

    int64_t num_stretches() const { return ceil_div(weights_.num_panels, panels_per_stretch_); }
    int64_t num_pieces() const { return num_pieces_; }

    void run(int64_t stretch, int64_t piece) const {
        const int64_t begin = std::min(stretch * panels_per_stretch_, weights_.num_panels);
        const int64_t length = std::min(panels_per_stretch_, weights_.num_panels - begin);
        const int64_t walked = in_halves_ ? length / 2 : length;
        run_panels(begin + piece_begin(walked, piece), begin + piece_begin(walked, piece + 1), in_halves_ ? walked : 0);
        if (in_halves_ && piece + 1 == num_pieces_) run_panels(begin + 2 * walked, begin + length, 0);
    }

private:
    int64_t piece_begin(int64_t num_panels, int64_t piece) const {
        return piece == num_pieces_ ? num_panels : num_panels - (num_panels >> piece);
    }
    void run_panels(int64_t begin, int64_t end, int64_t distance) const {
        run_part(weights_, rows_, function_, {begin, end, 0, 1, y_, weights_.num_outputs, distance});
    }

    const PanelWeights& weights_;
    const Rows& rows_;
    KernelFunction function_;
    float* y_;
    int64_t panels_per_stretch_, num_pieces_ = 1;
    bool in_halves_;  // a walk goes through both halves of a stretch at once
};

// The pieces of a thread that nobody has taken: it takes the first, others the last. The very first is what its chunk
// of the pool begins with, without asking: the answer would be on its way from another core while nothing is read.
class Pieces {
public:
    void set(int64_t count) { ends_.store(static_cast<uint64_t>(count) << 32 | 1, std::memory_order_relaxed); }
    // -1 where none is left.
    int64_t take(bool first) {
        uint64_t ends = ends_.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t begin = ends & 0xffffffff, end = ends >> 32;
            if (begin == end) return -1;
            const uint64_t taken = first ? ends + 1 : ends - (uint64_t{1} << 32);
            if (ends_.compare_exchange_weak(ends, taken, std::memory_order_relaxed))
                return static_cast<int64_t>(first ? begin : end - 1);
        }
    }

private:
    alignas(64) std::atomic<uint64_t> ends_{0};
};

void run_row(const std::vector<RowProduct>& products) {
    int64_t num_pieces = 0, num_stretches = 0, most_stretches = 0;
    for (const RowProduct& product : products) {
        num_pieces += product.num_pieces();
        num_stretches += product.num_stretches();
        most_stretches = std::max(most_stretches, product.num_stretches());
    }
    const auto run = [&](int64_t stretch, int64_t piece) {
        auto product = products.begin();
        for (; piece >= product->num_pieces(); ++product) piece -= product->num_pieces();
        product->run(stretch, piece);
    };
    // No fewer than there were when the stretches were made: another thread may set the number meanwhile.
    const int64_t num_threads = std::max(most_stretches, std::min<int64_t>(common::num_threads(), num_stretches));
    if (num_threads <= 1) {
        for (int64_t piece = 0; piece < num_pieces; ++piece) run(0, piece);
        return;
    }
    std::vector<Pieces> pieces(num_pieces > 1 ? static_cast<size_t>(num_threads) : 0);
    for (Pieces& each : pieces) each.set(num_pieces);
    common::parallel_for(static_cast<int>(num_threads), [&](int thread) {
        run(thread, 0);
        if (num_pieces == 1) return;
        for (int64_t i = 0; i < num_threads; ++i) {
            const int64_t stretch = (thread + i) % num_threads;
            for (int64_t piece; (piece = pieces[static_cast<size_t>(stretch)].take(i == 0)) >= 0;) run(stretch, piece);
        }
    });
}

// Multiplies rows that are prepared; the outputs of their first row are at the products' `y`.
void multiply_prepared(Activations activations, const std::vector<Product>& products) {
    thread_local PanelScratch panel_scratch;
    add_row_panels(activations, products, panel_scratch);
    std::vector<RowProduct> row_products;
    std::vector<Grid> grids;
    grids.reserve(products.size());
    int64_t num_tasks = 0;
    for (const Product& product : products) {
        const Rows& rows = rows_for(*product.weights, activations);
        if (rows.num_rows == 1) {
            row_products.emplace_back(product, rows);
        } else {
            grids.push_back(make_grid(product, rows, num_tasks));
            num_tasks += grids.back().num_tasks;
        }
    }
    run_row(row_products);
    run_grids(grids);
    panel_scratch.trim();
}

// Rows of a chunk where each thread prepares some rows and multiplies them by all weights; 0 where it had better not.
// That takes one fork-join instead of two, and rows stay where they were prepared, but every thread reads all weights,
// so that these have to be small. Other encodings would be decoded by each thread: int4 showed no gain.
int64_t rows_for_each_thread(int64_t num_rows, const std::vector<Product>& products) {
    constexpr int64_t kMostBytes = int64_t{768} << 10;  // beside rows in the L2 cache of a core
    constexpr int64_t kRowsPerBlock = 4;  // the first rows of a chunk wait for panels, the longer the longer these are
    const int64_t num_threads = common::num_threads();
    int64_t num_bytes = 0, num_products = 0, fewest_rows = 1;
    for (const Product& product : products) {
        const Weights& weights = *product.weights;
        num_bytes += weights.num_read_bytes();
        num_products += weights.view().num_outputs * weights.view().num_inputs * num_rows;
        fewest_rows = kRowsPerBlock * weights.view().num_blocks;
        if (weights.encoding() != Encoding::dense_int8 || weights.isa() == Isa::amx || num_bytes > kMostBytes) return 0;
    }
    if (num_threads == 1 || num_products == 0 || fewest_rows > kTaskRows) return 0;
    const int64_t num_pieces = num_threads * std::clamp<int64_t>(num_products / kTaskProducts / num_threads, 1, 8);
    const int64_t rows_per_piece = std::clamp(ceil_div(num_rows, num_pieces), fewest_rows, kTaskRows);
    const int64_t rows_per_chunk = round_up(rows_per_piece, kRowMultiple);
    // The thread that has most to do should not have much more than its share.
    const int64_t most_rows = ceil_div(ceil_div(num_rows, rows_per_chunk), num_threads) * rows_per_chunk;
    return most_rows * num_threads * 16 > num_rows * 17 ? 0 : rows_per_chunk;
}

void prepare_and_multiply(const RowPlan& plan, const std::vector<Product>& products, int64_t num_rows,
                          int64_t rows_per_chunk) {
    common::parallel_for(static_cast<int>(ceil_div(num_rows, rows_per_chunk)), [&](int chunk) {
        const int64_t begin = chunk * rows_per_chunk, end = std::min(num_rows, begin + rows_per_chunk);
        if (plan.prepare != nullptr) plan.prepare(begin, end);
        for (const Product& product : products) {
            const PanelWeights& weights = product.weights->view();
            run_part(weights, rows_for(*product.weights, plan.activations), product.weights->kernel(),
                     {0, weights.num_panels, begin, end, product.y, weights.num_outputs, 0});
        }
    });
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
    if (const int64_t rows_per_chunk = rows_for_each_thread(num_rows, products); rows_per_chunk > 0) {
        const RowPlan plan = plan_rows(x, num_rows, num_inputs, products, scratch);
        prepare_and_multiply(plan, products, num_rows, rows_per_chunk);
    } else {
        multiply_prepared(prepare_rows(x, num_rows, num_inputs, products, scratch), products);
    }
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
