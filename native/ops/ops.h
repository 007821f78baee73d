// The engine's small operations: norms, rotary positions, attention, activations. float32, row-major.
//
// One table of functions per instruction set. A table's functions are single-threaded and work on whole rows or tiles;
// driver.cc splits the work over the thread pool. kernels.inc holds the arithmetic once, in terms of the vector type of
// vec_*.h; ref.cc, avx2.cc, avx512.cc and neon.cc compile it for one instruction set each.
#pragma once

#include <cstdint>

namespace rarefy::ops {

// Keys per block of the key cache, which is [kv_head][block][head_dim][kKeyBlock]: transposed inside a block, so that
// one vector holds the scores of neighbouring keys.
constexpr int64_t kKeyBlock = 64;

// Query rows of one attention tile.
constexpr int64_t kTileRows = 32;

// Numbers as in rarefy.kernels.ops.ACTIVATIONS.
enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kNumActivations = 4 };

// Attention of num_rows queries over the keys [key_begin, key_end) of one key/value head, without the final division.
struct AttentionTile {
    const float* q;         // num_rows x head_dim, already multiplied by the scale
    const float* k_blocks;  // block 0 of the head; key j lies in block j / kKeyBlock
    const float* v;         // of key j at v + (j - v_begin) * v_stride
    int64_t v_begin, v_stride, head_dim;
    int64_t num_rows;            // at most kTileRows
    int64_t key_begin, key_end;  // key_begin is a multiple of kKeyBlock
    int64_t first_visible_end;   // row r sees keys below first_visible_end + r / rows_per_token ...
    int64_t rows_per_token;      // ... (0: every row sees keys below first_visible_end) ...
    int64_t window;              // ... and of those only the last `window` (0: all)
    float* scores;               // scratch, kTileRows x kKeyBlock
    float* sum;                  // out, num_rows x head_dim: sum of exp(score - row_max) * v
    float* row_max;              // out, num_rows; -inf where no key was visible
    float* row_weight;           // out, num_rows: sum of exp(score - row_max)
};

struct Kernels {
    // y = rms_norm(x) * weight; with `sum` not null first sum += x, and the norm is of sum.
    void (*rms_norm)(const float* x, float* sum, const float* weight, float eps, int64_t rows, int64_t width, float* y);
    // y = layer_norm(x + residual) * weight + bias; `residual` may be null.
    void (*layer_norm)(const float* x, const float* residual, const float* weight, const float* bias, float eps,
                       int64_t rows, int64_t width, float* y);
    void (*add_bias)(float* x, const float* bias, int64_t rows, int64_t width);
    void (*activate)(float* x, int64_t size, Activation activation);
    void (*gate)(float* gate, const float* up, int64_t size, Activation activation);
    // Each head of width 2 * half: (a, b) -> (a cos - b sin, b cos + a sin); `out` may be `x`.
    void (*rotate)(const float* x, const float* cos, const float* sin, int64_t num_heads, int64_t half, float* out);
    void (*attend)(const AttentionTile& tile);
    // out = sum of exp(max_s - max) * sums[s] over num_splits partial results, divided by the total weight.
    void (*merge)(const float* sums, const float* maxima, const float* weights, int64_t num_splits,
                  int64_t split_stride, int64_t split_rows, int64_t head_dim, float* out);
};

extern const Kernels kRefKernels;
#if RAREFY_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif RAREFY_ARM
extern const Kernels kNeonKernels;
#endif

// The vectors that small operations use on an instruction set of the products.
enum class Vectors { reference, avx2, avx512, neon };
// Throws std::invalid_argument where this build or CPU has none; so does find_kernels.
Vectors find_vectors(const char* isa);
const Kernels& find_kernels(const char* isa);

// Split over the thread pool. Shapes as in rarefy.kernels.ops; every size is checked by the caller.
void rms_norm(const Kernels&, const float* x, float* sum, const float* weight, float eps, int64_t rows, int64_t width,
              float* y);
void layer_norm(const Kernels&, const float* x, const float* residual, const float* weight, const float* bias,
                float eps, int64_t rows, int64_t width, float* y);
void add_bias(const Kernels&, float* x, const float* bias, int64_t rows, int64_t width);
void activate(const Kernels&, float* x, int64_t size, Activation activation);
void gate(const Kernels&, float* gate, const float* up, int64_t size, Activation activation);

struct CacheShape {
    int64_t num_kv_heads, num_blocks, head_dim;
};
void rope_store(const Kernels&, float* q, float* k, const float* v, const float* cos, const float* sin,
                int64_t num_tokens, int64_t num_heads, const CacheShape& cache, float* k_cache, float* v_cache,
                int64_t start);
void attention(const Kernels&, const float* q, int64_t num_tokens, int64_t num_heads, const CacheShape& cache,
               const float* k_cache, const float* v_cache, int64_t start, int64_t window, float scale, float* out);
// The same over keys and values that are [kv_head][key][head_dim], num_keys of them; the bits are those of `attention`
// over a cache in which key 0 lies at position `shift` < kKeyBlock. No query may see a key before key 0.
void attention_rows(const Kernels&, const float* q, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                    int64_t num_keys, int64_t head_dim, const float* k, const float* v, int64_t start, int64_t window,
                    float scale, int64_t shift, float* out);
void attention_segments(const Kernels&, const float* q, const float* k, const float* v, const int64_t* offsets,
                        int64_t num_segments, int64_t num_heads, int64_t head_dim, float scale, float* out);

}  // namespace rarefy::ops
