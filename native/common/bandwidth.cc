#include "common/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "common/pool.h"

namespace rarefy::common {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kPrefetchBytes = 2048;

// Sum of the 64-bit words of `num_streams` stretches of `stretch` bytes each.
uint64_t read(const uint8_t* begin, int64_t stretch, int num_streams) {
    uint64_t sums[8] = {};
    for (int64_t offset = 0; offset + kLine <= stretch; offset += kLine) {
        for (int stream = 0; stream < num_streams; ++stream) {
            const uint8_t* line = begin + stream * stretch + offset;
            __builtin_prefetch(line + kPrefetchBytes);
            const uint64_t* words = reinterpret_cast<const uint64_t*>(line);
            for (int i = 0; i < 8; ++i) sums[i] += words[i];
        }
    }
    uint64_t sum = 0;
    for (const uint64_t value : sums) sum += value;
    return sum;
}

}  // namespace

std::vector<double> read_seconds(int64_t num_bytes, int num_streams, int repeats) {
    if (num_streams < 1 || num_streams > 16 || repeats < 1 || num_bytes < (1 << 20) || num_bytes > (int64_t{1} << 40))
        throw std::invalid_argument("read_seconds: num_streams 1..16, repeats >= 1, num_bytes 1 MiB..1 TiB");
    const int num_chunks = num_threads() * 4;
    // Streams a power of two apart would share cache sets and memory banks.
    constexpr int64_t kSkew = 4096 + kLine;
    const int64_t stretch = num_bytes / num_chunks / num_streams / kLine * kLine - kSkew;
    if (stretch <= 0) throw std::invalid_argument("read_seconds: the buffer is too small for so many threads");
    std::vector<uint64_t> buffer(static_cast<size_t>(num_chunks * num_streams * stretch / 8) + kPrefetchBytes / 8, 1);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(buffer.data());
    std::vector<double> seconds;
    std::atomic<uint64_t> total{0};
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        parallel_for(num_chunks,
                     [&](int chunk) { total += read(bytes + chunk * num_streams * stretch, stretch, num_streams); });
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    // The sums are used, so that no compiler may skip the reads.
    if (total.load() != static_cast<uint64_t>(repeats) * num_chunks * num_streams * (stretch / 8))
        throw std::runtime_error("read_seconds: memory returned wrong data");
    return seconds;
}

}  // namespace rarefy::common
