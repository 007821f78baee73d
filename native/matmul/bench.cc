// Times the products and the packing of every listed kernel: matmul_bench [--threads N] [--rows T] [--shape OxI] [--isa
// NAME] [--format PART] [--group COLUMNS, which share a scale, 0: all] [--nm KEEP:GROUP] [--block HxW] [--zeros
// FRACTION] [--zero-points] [--masked singles, pairs or all, which is the fastest of them by default] [--fetch 0 or 1,
// which is the processor's choice by default] [--warm]. Cold (the default) rotates over more copies of the weight than
// any cache holds, and shows how long a pass over as many bytes takes that only reads them, in two streams per thread
// as one row does. Warm has one copy: of a shape that fits into a cache, what the arithmetic takes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/bandwidth.h"
#include "common/pool.h"
#include "matmul/dispatch.h"
#include "matmul/samples.h"
#include "matmul/weights.h"

namespace {

using namespace rarefy;

struct Options {
    int threads = 1;
    long rows = 1, outputs = 4096, inputs = 4096, group_size = 64;
    std::string isa, format;
    int keep = 32, group = 64, block_rows = 16, block_columns = 64;
    double zeros = 0.5;
    bool zero_points = false, warm = false;
    matmul::MaskedCodes masked = matmul::MaskedCodes::fastest;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Cycles per second of this core while it is busy: a shift and an exclusive or that wait for each other take two.
double measure_clock() {
    constexpr int kSteps = 200000;
    double best = 1e9;
    for (int repeat = 0; repeat < 20; ++repeat) {
        uint64_t x = 1;
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kSteps; ++i) {
            x ^= x << 1;
            __asm__ volatile("" : "+r"(x));
        }
        best = std::min(best, seconds_since(start));
    }
    return 2 * kSteps / best;
}

// Seconds of the median of 15 passes over other bytes, as many as a weight has.
double time_reading(common::BandwidthProbe& probe, long num_bytes) {
    constexpr int kRepeats = 15;
    std::vector<double> times;
    for (int repeat = 0; repeat < kRepeats; ++repeat)
        times.push_back(static_cast<double>(num_bytes) /
                        probe.read(num_bytes, 2, matmul::fetches_ahead ? 2048 : 0).bytes_per_s);
    std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
    return times[kRepeats / 2];
}

void bench(const matmul::ListedKernel& kernel, const Options& options, common::BandwidthProbe& probe,
           double bandwidth) {
    const matmul::Sample sample = matmul::make_sample(
        {kernel.format, options.outputs, options.inputs, options.group_size, !options.zero_points, 1 - options.zeros, 1,
         options.keep, options.group, options.block_rows, options.block_columns});
    const matmul::PackedArrays packed = sample.packed();
    std::vector<std::unique_ptr<matmul::Weights>> copies;
    double packing = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
        copies.clear();
        const auto start = std::chrono::steady_clock::now();
        copies.push_back(std::make_unique<matmul::Weights>(packed, kernel.isa, options.masked));
        packing = std::min(packing, seconds_since(start));
    }
    const long num_bytes = copies[0]->num_read_bytes();
    const long num_copies = options.warm ? 1 : std::max(2L, (128L << 20) / num_bytes);
    while (static_cast<long>(copies.size()) < num_copies)
        copies.push_back(std::make_unique<matmul::Weights>(packed, kernel.isa, options.masked));
    std::vector<float> x(static_cast<size_t>(options.rows * options.inputs)),
        y(static_cast<size_t>(options.rows * options.outputs));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<int>(i * 7919 % 201) - 100) / 50.0f;
    std::vector<double> times;
    size_t next = 0;
    const double work = static_cast<double>(options.rows) * options.outputs * options.inputs;
    const int calls = std::max(1, static_cast<int>(2e7 / work));
    for (int repeat = 0; repeat < 60; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (int call = 0; call < calls; ++call)
            matmul::multiply(x.data(), options.rows, options.inputs,
                             {{copies[next++ % copies.size()].get(), y.data()}});
        times.push_back(seconds_since(start) / calls);
    }
    std::sort(times.begin(), times.end());
    const double best = times[2], median = times[times.size() / 2];
    const double cycles = measure_clock() * options.threads * 64 / work;
    std::printf(
        "%-18s %-9s %9.1f us, median %9.1f; %6.1f GB/s (%3.0f %%), %6.3f cycles of a core per 64 weights and row, "
        "%6.0f GOPS; packed at %5.0f M weights/s",
        kernel.format.c_str(), matmul::name(kernel.isa), best * 1e6, median * 1e6, num_bytes / best / 1e9,
        100 * num_bytes / best / bandwidth, best * cycles, 2 * work / best / 1e9,
        static_cast<double>(options.outputs) * options.inputs / packing / 1e6);
    if (!options.warm && options.rows == 1) {
        const double reading = time_reading(probe, num_bytes);
        std::printf("; reading alone, median %9.1f us (%.3f cycles)", reading * 1e6, reading * cycles);
    }
    std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        const char* value = i + 1 < argc ? argv[i + 1] : "";
        if (name == "--warm") {
            options.warm = true;
            continue;
        }
        if (name == "--zero-points") {
            options.zero_points = true;
            continue;
        }
        ++i;
        if (name == "--threads") {
            options.threads = std::atoi(value);
        } else if (name == "--rows") {
            options.rows = std::atol(value);
        } else if (name == "--fetch") {
            matmul::fetches_ahead = std::atoi(value) != 0;
        } else if (name == "--masked" && std::strcmp(value, "singles") == 0) {
            options.masked = matmul::MaskedCodes::singles;
        } else if (name == "--masked" && std::strcmp(value, "pairs") == 0) {
            options.masked = matmul::MaskedCodes::pairs;
        } else if (name == "--masked" && std::strcmp(value, "all") == 0) {
            options.masked = matmul::MaskedCodes::all;
        } else if (name == "--group") {
            options.group_size = std::atol(value);
        } else if (name == "--isa") {
            options.isa = value;
        } else if (name == "--format") {
            options.format = value;
        } else if (name == "--zeros") {
            options.zeros = std::atof(value);
        } else if (name == "--block" && std::sscanf(value, "%dx%d", &options.block_rows, &options.block_columns) == 2) {
            continue;
        } else if (name == "--nm" && std::sscanf(value, "%d:%d", &options.keep, &options.group) == 2) {
            continue;
        } else if (name != "--shape" || std::sscanf(value, "%ldx%ld", &options.outputs, &options.inputs) != 2) {
            std::fprintf(stderr, "unknown argument %s\n", name.c_str());
            return 2;
        }
    }
    common::set_num_threads(options.threads);
    common::BandwidthProbe probe(int64_t{256} << 20);
    double bandwidth = 0;
    for (int repeat = 0; repeat < 8; ++repeat)
        bandwidth = std::max(bandwidth, probe.read_best(int64_t{64} << 20).bytes_per_s);
    std::printf("%ldx%ld, rows %ld, threads %d, read bandwidth %.1f GB/s\n", options.outputs, options.inputs,
                options.rows, options.threads, bandwidth / 1e9);
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (kernel.format.find(options.format) == std::string::npos) continue;
        if (!options.isa.empty() && options.isa != matmul::name(kernel.isa)) continue;
        bench(kernel, options, probe, bandwidth);
    }
    return 0;
}
