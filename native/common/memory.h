// Memory that the kernels stream through.
#pragma once

#include <cstdint>
#include <memory>

namespace rarefy::common {

class Slab;

struct ReleaseSlab {
    std::shared_ptr<Slab> slab;
    void operator()(uint8_t*) const {}
};
using AlignedBytes = std::unique_ptr<uint8_t[], ReleaseSlab>;

// Zeroed bytes, aligned to 64. Small pieces share slabs of huge pages: a product that walks the weights of a model
// reads each page once, and with small pages spends a tenth of its time on looking them up. A slab goes back to the
// system when its last piece is gone. Throws std::bad_alloc.
AlignedBytes allocate_aligned(int64_t num_bytes);

}  // namespace rarefy::common
