// Memory that the kernels stream through.
#pragma once

#include <cstdint>
#include <memory>

namespace rarefy::common {

class Slab;

struct ReleaseSlab {
    std::shared_ptr<Slab> slab;
    int64_t num_bytes;
    void operator()(uint8_t* bytes) const;
};
using AlignedBytes = std::unique_ptr<uint8_t[], ReleaseSlab>;

// Zeroed bytes, aligned to 64. Pieces share slabs of huge pages, the ends of large ones too: a product that walks the
// weights of a model reads each page once, and with small pages spends a tenth of its time on looking them up. The
// pages of a piece go back to the system with it, and the slab when its last piece is gone. Throws std::bad_alloc.
AlignedBytes allocate_aligned(int64_t num_bytes);

}  // namespace rarefy::common
