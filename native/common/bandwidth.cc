#include "common/bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>

#include "common/cpu.h"
#include "common/pool.h"
#include "common/read_streams.h"

namespace rarefy::common {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kHugePage = 2 << 20;
// Streams a power of two apart would share cache sets and memory banks.
constexpr int64_t kSkew = 4096 + kLine;
constexpr int64_t kMaxPrefetch = 1 << 20;
// Pieces of a pass per thread: one that wakes late leaves its pieces to the others.
constexpr int kPiecesPerThread = 8;

// Which is fastest differs between CPUs, between one thread and several, and with what else the machine does.
constexpr struct {
    int num_streams;
    int64_t prefetch_bytes;
} kVariants[] = {{1, 1024}, {2, 1024}, {3, 2048}, {4, 0}, {4, 1024}, {6, 0}, {6, 1024}, {8, 1024}, {12, 0}};

ReadFunction fastest_read() {
#if RAREFY_X86
    const CpuFlags cpu = detect_cpu();
    if (can_run_avx512(cpu)) return read_streams_avx512;
    if (can_run_avx2(cpu)) return read_streams_avx2;
#endif
    return read_streams_reference;
}

}  // namespace

void BandwidthProbe::Unmap::operator()(uint8_t* pointer) const { munmap(pointer, static_cast<size_t>(num_bytes)); }

BandwidthProbe::BandwidthProbe(int64_t num_bytes)
    : num_bytes_(num_bytes / kHugePage * kHugePage), buffer_(nullptr, {}) {
    if (num_bytes < (1 << 20) || num_bytes > (int64_t{1} << 40))
        throw std::invalid_argument("BandwidthProbe: num_bytes 1 MiB..1 TiB");
    num_bytes_ = std::max(num_bytes_, kHugePage);
    const int64_t mapped = num_bytes_ + kHugePage;
    void* memory =
        mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    buffer_ = {static_cast<uint8_t*>(memory), {mapped}};
#ifdef MADV_HUGEPAGE
    madvise(memory, static_cast<size_t>(mapped), MADV_HUGEPAGE);  // refused: the probe works with small pages
#endif
    // Every thread touches what lies next to it first, which also places it in that thread's memory node.
    auto* words = reinterpret_cast<uint64_t*>(memory);
    const int64_t words_per_page = kHugePage / 8;
    parallel_for(static_cast<int>(std::min<int64_t>(mapped / kHugePage, 32768)), [&](int chunk) {
        for (int64_t page = chunk; page < mapped / kHugePage; page += 32768)
            std::fill_n(words + page * words_per_page, words_per_page, uint64_t{1});
    });
}

ReadRate BandwidthProbe::read(int64_t num_bytes, int num_streams, int64_t prefetch_bytes) {
    if (num_streams < 1 || num_streams > kMaxStreams || prefetch_bytes < 0 || prefetch_bytes > kMaxPrefetch ||
        num_bytes < kLine || num_bytes > num_bytes_)
        throw std::invalid_argument("BandwidthProbe: num_streams 1..16, prefetch_bytes 0..1 MiB, num_bytes 64..buffer");
    const int num_pieces = num_threads() * kPiecesPerThread;
    int64_t stretch = num_bytes / num_pieces / num_streams / kLine * kLine;
    if (stretch > 8 * kSkew) stretch -= kSkew;
    if (stretch == 0) throw std::invalid_argument("BandwidthProbe: a pass is too short for so many threads");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (position_ + num_bytes > num_bytes_) position_ = 0;
    const uint8_t* begin = buffer_.get() + position_;
    position_ += (num_bytes + kLine - 1) / kLine * kLine;
    static const ReadFunction read_streams = fastest_read();
    std::atomic<uint64_t> total{0};
    parallel_for(num_threads(), [](int) {});  // wakes the workers, which then look for the next job for a while
    const auto start = std::chrono::steady_clock::now();
    parallel_for(num_pieces, [&](int piece) {
        total += read_streams(begin + piece * num_streams * stretch, stretch, num_streams, prefetch_bytes);
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const int64_t num_read = num_pieces * num_streams * stretch;
    if (total.load() != static_cast<uint64_t>(num_read / 8))
        throw std::runtime_error("BandwidthProbe: memory returned wrong data");
    return {static_cast<double>(num_read) / seconds, num_streams, prefetch_bytes};
}

ReadRate BandwidthProbe::read_best(int64_t num_bytes) {
    ReadRate best{};
    for (const auto& [num_streams, prefetch_bytes] : kVariants) {
        const ReadRate rate = read(num_bytes, num_streams, prefetch_bytes);
        if (rate.bytes_per_s > best.bytes_per_s) best = rate;
    }
    return best;
}

}  // namespace rarefy::common
