// The tile instructions of AMX that the kernels use, as macros: the intrinsics want tile numbers that are literals.
// With RAREFY_EMULATE_AMX they are a software model, written from Intel's definition of the instructions, which traps
// where the processor would raise an exception: so the kernels are tested on machines without AMX.
#pragma once

#include <immintrin.h>

#include "matmul/contract.h"

namespace rarefy::matmul::amx {

// What LDTILECFG reads.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t num_rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

}  // namespace rarefy::matmul::amx

#if !RAREFY_EMULATE_AMX

// gcc's intrinsics do not say that they read memory, of the configuration only the first 8 bytes: what was stored there
// before must not come later, or never.
#define TILE_CONFIGURE(config)                              \
    do {                                                    \
        __asm__ volatile("" : : "r"(&(config)) : "memory"); \
        _tile_loadconfig(&(config));                        \
    } while (false)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride)                  \
    do {                                               \
        __asm__ volatile("" : : "r"(from) : "memory"); \
        _tile_loadd(tile, from, stride);               \
    } while (false)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT_S8_S8(sums, a, b) _tile_dpbssd(sums, a, b)
#define TILE_DOT_S8_U8(sums, a, b) _tile_dpbsud(sums, a, b)
#define TILE_DOT_BF16(sums, a, b) _tile_dpbf16ps(sums, a, b)

#else

#define TILE_CONFIGURE(config) emulated.configure(config)
#define TILE_RELEASE() emulated.release()
#define TILE_ZERO(tile) emulated.zero(tile)
#define TILE_LOAD(tile, from, stride) emulated.load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulated.store(tile, to, stride)
#define TILE_DOT_S8_S8(sums, a, b) emulated.dot<int8_t>(sums, a, b)
#define TILE_DOT_S8_U8(sums, a, b) emulated.dot<uint8_t>(sums, a, b)
#define TILE_DOT_BF16(sums, a, b) emulated.dot_bf16(sums, a, b)

namespace rarefy::matmul::amx {

class EmulatedTiles {
public:
    void configure(const TileConfig& config) {
        require(config.palette == 1 && config.start_row == 0);
        for (const uint8_t byte : config.reserved) require(byte == 0);
        for (int i = 0; i < 16; ++i) {
            require(config.num_rows[i] <= 16 && config.row_bytes[i] <= 64 && config.row_bytes[i] % 4 == 0);
            require((config.num_rows[i] == 0) == (config.row_bytes[i] == 0));
            require(i < kTiles || config.num_rows[i] == 0);
        }
        config_ = config;
        __builtin_memset(bytes_, 0, sizeof(bytes_));
    }
    void release() { config_ = TileConfig{}; }
    void zero(int tile) {
        require(config_.num_rows[tile] > 0);
        __builtin_memset(bytes_[tile], 0, sizeof(bytes_[tile]));
    }
    void load(int tile, const void* from, int64_t stride) {
        zero(tile);
        for (int row = 0; row < config_.num_rows[tile]; ++row)
            __builtin_memcpy(bytes_[tile][row], static_cast<const uint8_t*>(from) + row * stride,
                             config_.row_bytes[tile]);
    }
    void store(int tile, void* to, int64_t stride) const {
        require(config_.num_rows[tile] > 0);
        for (int row = 0; row < config_.num_rows[tile]; ++row)
            __builtin_memcpy(static_cast<uint8_t*>(to) + row * stride, bytes_[tile][row], config_.row_bytes[tile]);
    }
    template <class Weight>
    void dot(int sums, int a, int b) {
        check_shapes(sums, a, b);
        for (int m = 0; m < config_.num_rows[sums]; ++m)
            for (int n = 0; n < config_.row_bytes[sums] / 4; ++n) {
                auto sum = get<uint32_t>(sums, m, n);  // wraps
                for (int k = 0; k < config_.row_bytes[a]; ++k)
                    sum += static_cast<uint32_t>(get<int8_t>(a, m, k) * get<Weight>(b, k / 4, 4 * n + k % 4));
                put(sums, m, n, sum);
            }
    }
    void dot_bf16(int sums, int a, int b) {
        check_shapes(sums, a, b);
        for (int m = 0; m < config_.num_rows[sums]; ++m)
            for (int n = 0; n < config_.row_bytes[sums] / 4; ++n) {
                float pair[2] = {};
                for (int k = 0; k < config_.row_bytes[a] / 2; ++k)
                    pair[k % 2] = flushed(__builtin_fmaf(widened(get<uint16_t>(a, m, k)),
                                                         widened(get<uint16_t>(b, k / 2, 2 * n + k % 2)), pair[k % 2]));
                put(sums, m, n, flushed(flushed(get<float>(sums, m, n)) + flushed(pair[0] + pair[1])));
            }
    }

private:
    static constexpr int kTiles = 8;
    TileConfig config_{};
    uint8_t bytes_[kTiles][16][64] = {};

    static void require(bool condition) {
        if (!condition) __builtin_trap();
    }
    void check_shapes(int sums, int a, int b) const {
        require(sums != a && sums != b && a != b);
        require(config_.num_rows[sums] > 0 && config_.num_rows[a] > 0 && config_.num_rows[b] > 0);
        require(config_.num_rows[sums] == config_.num_rows[a] && config_.row_bytes[sums] == config_.row_bytes[b] &&
                config_.row_bytes[a] == 4 * config_.num_rows[b]);
    }
    template <class T>
    T get(int tile, int row, int index) const {
        T value;
        __builtin_memcpy(&value, bytes_[tile][row] + index * static_cast<int>(sizeof(T)), sizeof(T));
        return value;
    }
    template <class T>
    void put(int tile, int row, int index, T value) {
        __builtin_memcpy(bytes_[tile][row] + index * static_cast<int>(sizeof(T)), &value, sizeof(T));
    }
    // Subnormal numbers count as zero, and become it.
    static float flushed(float value) { return value > -0x1p-126f && value < 0x1p-126f ? 0.0f : value; }
    static float widened(uint16_t bits) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        __builtin_memcpy(&value, &wide, 4);
        return flushed(value);
    }
};

inline thread_local EmulatedTiles emulated;

}  // namespace rarefy::matmul::amx

#endif

namespace rarefy::matmul::amx {

// Tiles 0 to kCount - 1, of which there are 1, 2 or 4, hold sums: in memory those of tile i are from at(i) on.
template <int kCount>
inline void zero_sums() {
    TILE_ZERO(0);
    if constexpr (kCount > 1) TILE_ZERO(1);
    if constexpr (kCount > 2) {
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
}
template <int kCount, class At>
inline void load_sums(const At& at, int64_t stride_bytes) {
    TILE_LOAD(0, at(0), stride_bytes);
    if constexpr (kCount > 1) TILE_LOAD(1, at(1), stride_bytes);
    if constexpr (kCount > 2) {
        TILE_LOAD(2, at(2), stride_bytes);
        TILE_LOAD(3, at(3), stride_bytes);
    }
}
template <int kCount, class At>
inline void store_sums(const At& at, int64_t stride_bytes) {
    TILE_STORE(0, at(0), stride_bytes);
    if constexpr (kCount > 1) TILE_STORE(1, at(1), stride_bytes);
    if constexpr (kCount > 2) {
        TILE_STORE(2, at(2), stride_bytes);
        TILE_STORE(3, at(3), stride_bytes);
    }
}

}  // namespace rarefy::matmul::amx
