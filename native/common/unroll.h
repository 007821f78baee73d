// Loops that are unrolled before the optimizer looks at them. With `#pragma GCC unroll` gcc unrolls after it has
// decided which arrays live in registers, and then keeps storing tiles of accumulators to the stack.
#pragma once

#define RAREFY_INLINE __attribute__((always_inline))

namespace rarefy::common {

template <int kValue>
struct Index {
    RAREFY_INLINE constexpr operator int() const { return kValue; }
};

// body(Index<0>()), body(Index<1>()), ... Both this and the body must be inlined, or files compiled for different
// instruction sets would share one copy; write bodies as [&](auto i) RAREFY_INLINE { ... }.
template <int kCount, class Body>
RAREFY_INLINE inline void unroll(const Body& body) {
    if constexpr (kCount > 0) {
        unroll<kCount - 1>(body);
        body(Index<kCount - 1>());
    }
}

}  // namespace rarefy::common
