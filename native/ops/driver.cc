// Splits the small ops over the thread pool. Chunk sizes depend on the shapes alone, so that the number of threads
// never changes a result.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/cpu.h"
#include "common/pool.h"
#include "ops/ops.h"

namespace rarefy::ops {
namespace {

// Floats below which another thread costs more than it saves.
constexpr int64_t kChunkFloats = 32 * 1024;

// Query floats x keys of a single token below which one thread is faster.
constexpr int64_t kSerialAttention = 64 * 1024;

// Keys of one attention task when there is a single query token (a multiple of kKeyBlock).
constexpr int64_t kSplitKeys = 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(first, count) for chunks of the rows.
template <class Body>
void for_row_chunks(int64_t rows, int64_t width, Body body) {
    if (width == 0) return;  // of rows without columns there can be any number
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkFloats / std::max<int64_t>(1, width));
    common::parallel_for(static_cast<int>(ceil_div(rows, rows_per_chunk)), [&](int chunk) {
        const int64_t first = chunk * rows_per_chunk;
        body(first, std::min(rows_per_chunk, rows - first));
    });
}

// Scratch of one attention tile.
class TileScratch {
public:
    explicit TileScratch(int64_t head_dim)
        : floats_(new float[2 * kTileRows * head_dim + kTileRows * kKeyBlock + 2 * kTileRows]), head_dim_(head_dim) {}
    float* q() { return floats_.get(); }
    float* sum() { return q() + kTileRows * head_dim_; }
    float* scores() { return sum() + kTileRows * head_dim_; }
    float* row_max() { return scores() + kTileRows * kKeyBlock; }
    float* row_weight() { return row_max() + kTileRows; }

private:
    std::unique_ptr<float[]> floats_;
    int64_t head_dim_;
};

void scaled_copy(const float* source, float scale, int64_t size, float* target) {
    for (int64_t i = 0; i < size; ++i) target[i] = source[i] * scale;
}

// The keys and values of all key/value heads. Positions below v_begin have no value and are never visible.
struct KeysValues {
    int64_t num_kv_heads, head_dim;
    const float* k_blocks;
    int64_t k_head_stride;
    const float* v;
    int64_t v_head_stride, v_begin;

    AttentionTile tile(int64_t kv_head) const {
        AttentionTile tile{};
        tile.k_blocks = k_blocks + kv_head * k_head_stride;
        tile.v = v + kv_head * v_head_stride;
        tile.v_begin = v_begin;
        tile.v_stride = tile.head_dim = head_dim;
        return tile;
    }
};

// A single query token: the keys are split as well, so that long contexts use every thread however few heads there are.
void attention_of_one(const Kernels& kernels, const float* q, int64_t num_heads, const KeysValues& cache, int64_t start,
                      int64_t window, float scale, float* out) {
    const int64_t head_dim = cache.head_dim, group = num_heads / cache.num_kv_heads;
    const int64_t first_key = window > 0 ? std::max<int64_t>(0, start + 1 - window) / kKeyBlock * kKeyBlock : 0;
    const int64_t num_splits = ceil_div(start + 1 - first_key, kSplitKeys);
    const int64_t tiles_per_head = ceil_div(group, kTileRows);
    const std::unique_ptr<float[]> scaled(new float[num_heads * head_dim]);
    scaled_copy(q, scale, num_heads * head_dim, scaled.get());
    const std::unique_ptr<float[]> sums(new float[num_splits * num_heads * (head_dim + 2)]);
    float* maxima = sums.get() + num_splits * num_heads * head_dim;
    float* weights = maxima + num_splits * num_heads;
    const int num_tasks = static_cast<int>(cache.num_kv_heads * tiles_per_head * num_splits);
    const auto run_task = [&](int task) {
        const int64_t split = task % num_splits, tile_index = task / num_splits;
        const int64_t kv_head = tile_index / tiles_per_head;
        const int64_t head = kv_head * group + tile_index % tiles_per_head * kTileRows;
        const std::unique_ptr<float[]> scores(new float[kTileRows * kKeyBlock]);
        AttentionTile tile = cache.tile(kv_head);
        tile.q = scaled.get() + head * head_dim;
        tile.num_rows = std::min(kTileRows, (kv_head + 1) * group - head);
        tile.key_begin = first_key + split * kSplitKeys;
        tile.key_end = std::min(start + 1, tile.key_begin + kSplitKeys);
        tile.first_visible_end = start + 1;
        tile.window = window;
        tile.scores = scores.get();
        tile.sum = sums.get() + (split * num_heads + head) * head_dim;
        tile.row_max = maxima + split * num_heads + head;
        tile.row_weight = weights + split * num_heads + head;
        kernels.attend(tile);
    };
    if (num_heads * head_dim * (start + 1 - first_key) < kSerialAttention) {
        for (int task = 0; task < num_tasks; ++task) run_task(task);
    } else {
        common::parallel_for(num_tasks, [&](int task) { run_task(task); });
    }
    for (int64_t head = 0; head < num_heads; ++head) {
        kernels.merge(sums.get() + head * head_dim, maxima + head, weights + head, num_splits, num_heads * head_dim,
                      num_heads, head_dim, out + head * head_dim);
    }
}

void attention_of_all(const Kernels& kernels, const float* q, int64_t num_tokens, int64_t num_heads,
                      const KeysValues& cache, int64_t start, int64_t window, float scale, float* out) {
    if (num_tokens == 1) {
        attention_of_one(kernels, q, num_heads, cache, start, window, scale, out);
        return;
    }
    const int64_t head_dim = cache.head_dim, group = num_heads / cache.num_kv_heads;
    // A tile holds the query heads of one key/value head for some tokens; of a very large group, a part.
    const int64_t heads_per_tile = std::min(group, kTileRows), tokens_per_tile = kTileRows / heads_per_tile;
    const int64_t tiles_per_group = ceil_div(group, heads_per_tile),
                  token_tiles = ceil_div(num_tokens, tokens_per_tile);
    const int64_t tiles_per_token_tile = cache.num_kv_heads * tiles_per_group;
    common::parallel_for(static_cast<int>(token_tiles), [&](int task) {
        TileScratch scratch(head_dim);
        // The last tokens see the most keys: begin with them, so that the threads end together.
        const int64_t token = (token_tiles - 1 - task) * tokens_per_tile;
        const int64_t tokens = std::min(tokens_per_tile, num_tokens - token);
        for (int64_t index = 0; index < tiles_per_token_tile; ++index) {
            const int64_t kv_head = index / tiles_per_group;
            const int64_t head = kv_head * group + index % tiles_per_group * heads_per_tile;
            const int64_t heads = std::min(heads_per_tile, (kv_head + 1) * group - head);
            for (int64_t t = 0; t < tokens; ++t) {
                scaled_copy(q + ((token + t) * num_heads + head) * head_dim, scale, heads * head_dim,
                            scratch.q() + t * heads * head_dim);
            }
            AttentionTile tile = cache.tile(kv_head);
            tile.q = scratch.q();
            tile.num_rows = tokens * heads;
            tile.key_end = start + token + tokens;
            tile.first_visible_end = start + token + 1;
            tile.rows_per_token = heads;
            tile.window = window;
            tile.scores = scratch.scores();
            tile.sum = scratch.sum();
            tile.row_max = scratch.row_max();
            tile.row_weight = scratch.row_weight();
            kernels.attend(tile);
            for (int64_t row = 0; row < tile.num_rows; ++row) {
                kernels.merge(tile.sum + row * head_dim, tile.row_max + row, tile.row_weight + row, 1, 0, 0, head_dim,
                              out + ((token + row / heads) * num_heads + head + row % heads) * head_dim);
            }
        }
    });
}

}  // namespace

Vectors find_vectors(const char* isa) {
    const auto is = [isa](const char* name) { return std::strcmp(isa, name) == 0; };
    if (is("reference")) return Vectors::reference;
#if RAREFY_X86
    const common::CpuFlags cpu = common::detect_cpu();
    if ((is("avx512") && common::can_run_avx512(cpu)) || (is("avx512_bf16") && common::can_run_avx512_bf16(cpu)) ||
        (is("amx") && common::can_run_amx(cpu)))
        return Vectors::avx512;
    if ((is("avx2") && common::can_run_avx2(cpu)) || (is("avx_vnni") && common::can_run_avx_vnni(cpu)))
        return Vectors::avx2;
#elif RAREFY_ARM
    if (is("neon") && common::can_run_neon(common::detect_cpu())) return Vectors::neon;
#endif
    throw std::invalid_argument(std::string("this CPU cannot run the instruction set ") + isa);
}

const Kernels& find_kernels(const char* isa) {
    switch (find_vectors(isa)) {
#if RAREFY_X86
        case Vectors::avx512: return kAvx512Kernels;
        case Vectors::avx2: return kAvx2Kernels;
#elif RAREFY_ARM
        case Vectors::neon: return kNeonKernels;
#endif
        default: return kRefKernels;
    }
}

void rms_norm(const Kernels& kernels, const float* x, float* sum, const float* weight, float eps, int64_t rows,
              int64_t width, float* y) {
    for_row_chunks(rows, width, [&](int64_t first, int64_t count) {
        const int64_t at = first * width;
        kernels.rms_norm(x + at, sum == nullptr ? nullptr : sum + at, weight, eps, count, width, y + at);
    });
}

void layer_norm(const Kernels& kernels, const float* x, const float* residual, const float* weight, const float* bias,
                float eps, int64_t rows, int64_t width, float* y) {
    for_row_chunks(rows, width, [&](int64_t first, int64_t count) {
        const int64_t at = first * width;
        kernels.layer_norm(x + at, residual == nullptr ? nullptr : residual + at, weight, bias, eps, count, width,
                           y + at);
    });
}

void add_bias(const Kernels& kernels, float* x, const float* bias, int64_t rows, int64_t width) {
    for_row_chunks(rows, width,
                   [&](int64_t first, int64_t count) { kernels.add_bias(x + first * width, bias, count, width); });
}

void activate(const Kernels& kernels, float* x, int64_t size, Activation activation) {
    for_row_chunks(size, 1, [&](int64_t first, int64_t count) { kernels.activate(x + first, count, activation); });
}

void gate(const Kernels& kernels, float* gate, const float* up, int64_t size, Activation activation) {
    for_row_chunks(size, 1,
                   [&](int64_t first, int64_t count) { kernels.gate(gate + first, up + first, count, activation); });
}

void rope_store(const Kernels& kernels, float* q, float* k, const float* v, const float* cos, const float* sin,
                int64_t num_tokens, int64_t num_heads, const CacheShape& cache, float* k_cache, float* v_cache,
                int64_t start) {
    const int64_t head_dim = cache.head_dim, half = head_dim / 2, num_kv_heads = cache.num_kv_heads;
    const int64_t head_keys = cache.num_blocks * kKeyBlock * head_dim;
    for_row_chunks(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, [&](int64_t first, int64_t count) {
        for (int64_t token = first; token < first + count; ++token) {
            const int64_t position = start + token;
            float* q_row = q + token * num_heads * head_dim;
            float* k_row = k + token * num_kv_heads * head_dim;
            const float* v_row = v + token * num_kv_heads * head_dim;
            kernels.rotate(q_row, cos + position * half, sin + position * half, num_heads, half, q_row);
            kernels.rotate(k_row, cos + position * half, sin + position * half, num_kv_heads, half, k_row);
            for (int64_t head = 0; head < num_kv_heads; ++head) {
                float* column =
                    k_cache + head * head_keys + position / kKeyBlock * kKeyBlock * head_dim + position % kKeyBlock;
                for (int64_t d = 0; d < head_dim; ++d) column[d * kKeyBlock] = k_row[head * head_dim + d];
                std::copy_n(v_row + head * head_dim, head_dim, v_cache + head * head_keys + position * head_dim);
            }
        }
    });
}

void attention(const Kernels& kernels, const float* q, int64_t num_tokens, int64_t num_heads, const CacheShape& cache,
               const float* k_cache, const float* v_cache, int64_t start, int64_t window, float scale, float* out) {
    const int64_t head_keys = cache.num_blocks * kKeyBlock * cache.head_dim;
    const KeysValues keys_values{cache.num_kv_heads, cache.head_dim, k_cache, head_keys, v_cache, head_keys, 0};
    attention_of_all(kernels, q, num_tokens, num_heads, keys_values, start, window, scale, out);
}

void attention_rows(const Kernels& kernels, const float* q, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                    int64_t num_keys, int64_t head_dim, const float* k, const float* v, int64_t start, int64_t window,
                    float scale, int64_t shift, float* out) {
    // Positions from here on, of which key 0 has `shift`.
    start += shift;
    const int64_t first_block = window > 0 ? std::max<int64_t>(0, start + 1 - window) / kKeyBlock : 0;
    const int64_t num_blocks = ceil_div(start + num_tokens, kKeyBlock), block_floats = kKeyBlock * head_dim;
    const std::unique_ptr<float[]> k_blocks(new float[num_kv_heads * num_blocks * block_floats]);
    const int64_t used_blocks = num_blocks - first_block;
    for_row_chunks(num_kv_heads * used_blocks, block_floats, [&](int64_t first, int64_t count) {
        for (int64_t index = first; index < first + count; ++index) {
            const int64_t kv_head = index / used_blocks, block = first_block + index % used_blocks;
            const int64_t begin = block * kKeyBlock;
            // Columns outside of [shift, shift + num_keys) are read, but never count.
            const int64_t from = std::max<int64_t>(begin, shift);
            const int64_t to = std::min(begin + kKeyBlock, shift + num_keys);
            float* target = k_blocks.get() + (kv_head * num_blocks + block) * block_floats;
            if (from > begin || to < begin + kKeyBlock) std::fill_n(target, block_floats, 0.0f);
            for (int64_t position = from; position < to; ++position) {
                const float* source = k + (kv_head * num_keys + position - shift) * head_dim;
                float* column = target + position - begin;
                for (int64_t d = 0; d < head_dim; ++d) column[d * kKeyBlock] = source[d];
            }
        }
    });
    const KeysValues keys_values{num_kv_heads,        head_dim, k_blocks.get(), num_blocks * block_floats, v,
                                 num_keys * head_dim, shift};
    attention_of_all(kernels, q, num_tokens, num_heads, keys_values, start, window, scale, out);
}

void attention_segments(const Kernels& kernels, const float* q, const float* k, const float* v, const int64_t* offsets,
                        int64_t num_segments, int64_t num_heads, int64_t head_dim, float scale, float* out) {
    const int64_t width = num_heads * head_dim;
    common::parallel_for(static_cast<int>(num_segments * num_heads), [&](int task) {
        const int64_t begin = offsets[task / num_heads], length = offsets[task / num_heads + 1] - begin;
        const int64_t corner = begin * width + task % num_heads * head_dim;
        const std::unique_ptr<float[]> k_blocks(new float[ceil_div(length, kKeyBlock) * kKeyBlock * head_dim]);
        for (int64_t j = 0; j < length; ++j) {
            float* column = k_blocks.get() + j / kKeyBlock * kKeyBlock * head_dim + j % kKeyBlock;
            for (int64_t d = 0; d < head_dim; ++d) column[d * kKeyBlock] = k[corner + j * width + d];
        }
        TileScratch scratch(head_dim);
        for (int64_t first = 0; first < length; first += kTileRows) {
            AttentionTile tile{};
            tile.q = scratch.q();
            tile.k_blocks = k_blocks.get();
            tile.v = v + corner;
            tile.v_stride = width;
            tile.head_dim = head_dim;
            tile.num_rows = std::min(kTileRows, length - first);
            tile.key_end = tile.first_visible_end = length;
            tile.scores = scratch.scores();
            tile.sum = scratch.sum();
            tile.row_max = scratch.row_max();
            tile.row_weight = scratch.row_weight();
            for (int64_t row = 0; row < tile.num_rows; ++row) {
                scaled_copy(q + corner + (first + row) * width, scale, head_dim, scratch.q() + row * head_dim);
            }
            kernels.attend(tile);
            for (int64_t row = 0; row < tile.num_rows; ++row) {
                kernels.merge(tile.sum + row * head_dim, tile.row_max + row, tile.row_weight + row, 1, 0, 0, head_dim,
                              out + corner + (first + row) * width);
            }
        }
    });
}

}  // namespace rarefy::ops
