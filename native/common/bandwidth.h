// Read bandwidth of main memory: the most that a product which reads its weight once could reach.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

namespace rarefy::common {

struct ReadRate {
    double bytes_per_s;
    int num_streams;
    int64_t prefetch_bytes;
};

// A buffer larger than the caches, in huge pages where the system gives them, and passes over parts of it.
class BandwidthProbe {
public:
    // 1 MiB to 1 TiB; throws std::invalid_argument otherwise, std::bad_alloc where there is no memory.
    explicit BandwidthProbe(int64_t num_bytes);

    // One pass of every thread of the pool over the next `num_bytes` of the buffer, which starts again at
    // its end. Each thread reads `num_streams` (1 to 16) places far apart side by side, and prefetches
    // `prefetch_bytes` (0 to 1 MiB, 0: not at all) ahead in each. A pass is right only if the buffer is several times
    // the last-level cache and longer than one pass.
    ReadRate read(int64_t num_bytes, int num_streams, int64_t prefetch_bytes);

    // The fastest of one such pass for each of a small set of streams and distances.
    ReadRate read_best(int64_t num_bytes);

    int64_t num_bytes() const { return num_bytes_; }

private:
    struct Unmap {
        int64_t num_bytes;
        void operator()(uint8_t* pointer) const;
    };
    int64_t num_bytes_;
    int64_t position_ = 0;
    std::mutex mutex_;  // one pass at a time
    std::unique_ptr<uint8_t, Unmap> buffer_;
};

}  // namespace rarefy::common
