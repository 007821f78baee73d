// Read bandwidth of main memory, as a matrix-vector product could use it.
#pragma once

#include <cstdint>
#include <vector>

namespace rarefy::common {

// Seconds of each of `repeats` passes over a buffer of `num_bytes`, split over the pool's threads; every thread walks
// `num_streams` (1 to 16) places far apart together.
std::vector<double> read_seconds(int64_t num_bytes, int num_streams, int repeats);

}  // namespace rarefy::common
