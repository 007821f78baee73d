// Memory of outputs, used again. What malloc gives for a large array is new memory nearly every time, and the system
// clears it page by page while the product waits: of 1536 x 384 and 128 rows that is longer than the product.
#pragma once

#include <cstdint>
#include <memory>

namespace rarefy::common {

struct Recycle {
    int64_t num_bytes;
    void operator()(uint8_t* bytes) const;
};
using RecycledBytes = std::unique_ptr<uint8_t[], Recycle>;

// At least so many bytes, aligned to 64, that hold anything. Those of a piece that is gone wait for one of the same
// size, the newest first; beyond kMaxWaitingBytes the oldest go back to the system. Throws std::bad_alloc.
RecycledBytes allocate_recycled(int64_t num_bytes);

constexpr int64_t kMaxWaitingBytes = int64_t{32} << 20;
// Of all pieces that wait.
int64_t waiting_bytes();

}  // namespace rarefy::common
