// Many small square matrices at once: sums of outer products, and the surgery that oBERT does on their inverses.
//
// Blocks are float32 and symmetric: sums are kept as their lower triangles, row after row (num_blocks, triangle(size)),
// inverses as (num_blocks, size, size). A vector of `size` numbers belongs to each. Every block is worked on by itself,
// so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace rarefy::fisher {

// Widest block.
constexpr int kMostSize = 512;

// Numbers of a lower triangle.
constexpr int64_t triangle(int64_t size) { return size * (size + 1) / 2; }

// What is done with a run of blocks; one table for each instruction set.
struct Functions {
    // The triangles total[b] += sum over n of v v^T, with v the vector of block b in row x[n], whose blocks begin at
    // number `first`.
    void (*add_bf16)(const uint16_t* const* x, int64_t num_rows, int64_t first, int64_t num_blocks, int size,
                     float* total);
    void (*add_float)(const float* const* x, int64_t num_rows, int64_t first, int64_t num_blocks, int size,
                      float* total);
    // inverse[b] = (block[b] / scale + damp I)^-1, in double precision, of triangles; the blocks are positive
    // semidefinite.
    void (*invert)(const float* block, int64_t num_blocks, int size, double scale, double damp, float* inverse);
    // The cheapest free entry of every block is dropped, the others moved to make up for it, until none is left; cost
    // is what each cost then, weight^2 / inverse[i][i], or one before it if that was more; 0 of those that are not
    // free.
    void (*costs)(const float* weight, const float* inverse, const uint8_t* free, int64_t num_blocks, int size,
                  float* cost);
    // The entries with `drop` set become 0, the others move to make up for it, and the inverses become those of the
    // blocks without them; in double precision, rounded at the end.
    void (*drop)(const uint8_t* drop, int64_t num_blocks, int size, float* weight, float* inverse);
};

extern const Functions reference;
#if RAREFY_X86
extern const Functions wide;  // needs AVX-512
#endif

// The fastest that this CPU runs.
const Functions& functions();

}  // namespace rarefy::fisher
