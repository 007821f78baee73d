// The inner loop of the bandwidth probe, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace rarefy::common {

constexpr int kMaxStreams = 16;

// Reads `num_streams` (1 to kMaxStreams) stretches of `stretch` bytes that follow each other, side by side and line by
// line, with a software prefetch `prefetch_bytes` ahead in each (0: none; it may reach beyond the end). `begin` and
// `stretch` are multiples of 64. Returns the sum of all 64-bit words, so that no read can be left out.
using ReadFunction = uint64_t (*)(const uint8_t* begin, int64_t stretch, int num_streams, int64_t prefetch_bytes);

uint64_t read_streams_reference(const uint8_t* begin, int64_t stretch, int num_streams, int64_t prefetch_bytes);
uint64_t read_streams_avx2(const uint8_t* begin, int64_t stretch, int num_streams, int64_t prefetch_bytes);
uint64_t read_streams_avx512(const uint8_t* begin, int64_t stretch, int num_streams, int64_t prefetch_bytes);

}  // namespace rarefy::common
