// Every instruction set's ops against loops in double precision, made to run under sanitizers: all arrays are exactly
// as large as they must be, and cells of the caches that no op may use hold NaN. Prints the failures and counts.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/cpu.h"
#include "common/pool.h"
#include "ops/ops.h"

namespace {

using namespace rarefy;
using checks::check_close;
using checks::random_floats;
using ops::kKeyBlock;
using Floats = std::vector<float>;

void check_norms(const ops::Kernels& kernels, const std::string& isa) {
    for (const int64_t rows : {0, 1, 3, 700}) {
        for (const int64_t width : {1, 7, 16, 33, 100}) {
            const Floats x = random_floats(rows * width, 1), residual = random_floats(rows * width, 2);
            const Floats weight = random_floats(width, 3), bias = random_floats(width, 4);
            Floats plain(x.size()), added(x.size()), layer(x.size()), alone(x.size()), sum = residual, biased = x;
            ops::rms_norm(kernels, x.data(), nullptr, weight.data(), 0.1f, rows, width, plain.data());
            ops::rms_norm(kernels, x.data(), sum.data(), weight.data(), 0.1f, rows, width, added.data());
            ops::layer_norm(kernels, x.data(), residual.data(), weight.data(), bias.data(), 0.1f, rows, width,
                            layer.data());
            ops::layer_norm(kernels, sum.data(), nullptr, weight.data(), bias.data(), 0.1f, rows, width, alone.data());
            ops::add_bias(kernels, biased.data(), bias.data(), rows, width);
            for (int64_t row = 0; row < rows; ++row) {
                double squares = 0, sum_squares = 0, mean = 0, variance = 0;
                const auto total = [&](int64_t i) { return double(x[row * width + i]) + residual[row * width + i]; };
                for (int64_t i = 0; i < width; ++i) {
                    squares += double(x[row * width + i]) * x[row * width + i] / width;
                    sum_squares += total(i) * total(i) / width;
                    mean += total(i) / width;
                }
                for (int64_t i = 0; i < width; ++i) variance += (total(i) - mean) * (total(i) - mean) / width;
                for (int64_t i = 0; i < width; ++i) {
                    const int64_t at = row * width + i;
                    check_close(plain[at], x[at] / std::sqrt(squares + 0.1) * weight[i], 1e-5, isa + " rms_norm");
                    check_close(added[at], total(i) / std::sqrt(sum_squares + 0.1) * weight[i], 1e-5,
                                isa + " add_rms_norm");
                    check_close(sum[at], total(i), 1e-6, isa + " sum of add_rms_norm");
                    check_close(layer[at], (total(i) - mean) / std::sqrt(variance + 0.1) * weight[i] + bias[i], 2e-5,
                                isa + " layer_norm");
                    check_close(alone[at], layer[at], 0, isa + " layer_norm of a sum");
                    check_close(biased[at], double(x[at]) + bias[i], 1e-6, isa + " add_bias");
                }
            }
        }
    }
}

void check_activations(const ops::Kernels& kernels, const std::string& isa) {
    const std::vector<std::function<double(double)>> exact = {
        [](double x) { return x / (1 + std::exp(-x)); },
        [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); },
        [](double x) { return x / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x))); },
        [](double x) { return std::max(x, 0.0); },
    };
    for (int activation = 0; activation < ops::kNumActivations; ++activation) {
        for (const int64_t size : {0, 1, 8, 31, 40000}) {
            Floats x = random_floats(size, 5), up = random_floats(size, 6);
            for (float& value : x) value *= 5;
            Floats activated = x, gated = x;
            ops::activate(kernels, activated.data(), size, static_cast<ops::Activation>(activation));
            ops::gate(kernels, gated.data(), up.data(), size, static_cast<ops::Activation>(activation));
            for (int64_t i = 0; i < size; ++i) {
                const double expected = exact[activation](x[i]);
                check_close(activated[i], expected, 1e-5 * std::fabs(expected) + 1e-7, isa + " activate");
                check_close(gated[i], expected * up[i], 1e-5 * std::fabs(expected * up[i]) + 1e-7, isa + " gate");
            }
        }
    }
}

struct AttentionCase {
    int64_t num_heads, num_kv_heads, head_dim, num_tokens, start, window;
};

// One query head over keys and values (position x head_dim), from `begin` to `end`.
std::vector<double> attended(const float* q, const float* keys, const float* values, int64_t begin, int64_t end,
                             int64_t stride, int64_t head_dim, double scale) {
    std::vector<double> weights, out(static_cast<size_t>(head_dim));
    double highest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t j = begin; j < end; ++j) {
        double score = 0;
        for (int64_t d = 0; d < head_dim; ++d) score += scale * q[d] * keys[j * stride + d];
        weights.push_back(score);
        highest = std::max(highest, score);
    }
    for (double& weight : weights) total += weight = std::exp(weight - highest);
    for (int64_t j = begin; j < end; ++j) {
        for (int64_t d = 0; d < head_dim; ++d) out[d] += weights[j - begin] / total * values[j * stride + d];
    }
    return out;
}

void check_attention(const ops::Kernels& kernels, const std::string& isa, const AttentionCase& c) {
    const int64_t num_keys = c.start + c.num_tokens, kv_width = c.num_kv_heads * c.head_dim, half = c.head_dim / 2;
    const ops::CacheShape cache{c.num_kv_heads, (num_keys + kKeyBlock - 1) / kKeyBlock, c.head_dim};
    const Floats q = random_floats(c.num_tokens * c.num_heads * c.head_dim, 7);
    const Floats k = random_floats(num_keys * kv_width, 8), v = random_floats(num_keys * kv_width, 9);
    const Floats cos(static_cast<size_t>(num_keys * half), 1.0f), sin(static_cast<size_t>(num_keys * half), 0.0f);
    Floats k_cache(static_cast<size_t>(cache.num_blocks * kKeyBlock * kv_width), std::nanf("")), v_cache = k_cache;
    // Stored in two calls, with rotations by 0, so that the cache holds k itself.
    Floats k_copy = k, q_copy = q;
    Floats ignored(static_cast<size_t>(c.start * c.num_heads * c.head_dim));
    ops::rope_store(kernels, ignored.data(), k_copy.data(), v.data(), cos.data(), sin.data(), c.start, c.num_heads,
                    cache, k_cache.data(), v_cache.data(), 0);
    ops::rope_store(kernels, q_copy.data(), k_copy.data() + c.start * kv_width, v.data() + c.start * kv_width,
                    cos.data(), sin.data(), c.num_tokens, c.num_heads, cache, k_cache.data(), v_cache.data(), c.start);
    Floats out(q.size());
    ops::attention(kernels, q_copy.data(), c.num_tokens, c.num_heads, cache, k_cache.data(), v_cache.data(), c.start,
                   c.window, 0.4f, out.data());
    // The same from [head][key], without the keys that a window has left behind.
    const int64_t first = c.window > 0 ? std::max<int64_t>(0, c.start + 1 - c.window) : 0, num_left = num_keys - first;
    Floats k_rows(static_cast<size_t>(num_left * kv_width)), v_rows = k_rows, from_rows(q.size());
    for (int64_t head = 0; head < c.num_kv_heads; ++head) {
        for (int64_t key = 0; key < num_left; ++key) {
            const int64_t to = (head * num_left + key) * c.head_dim,
                          from = (first + key) * kv_width + head * c.head_dim;
            std::copy_n(&k[from], c.head_dim, &k_rows[to]);
            std::copy_n(&v[from], c.head_dim, &v_rows[to]);
        }
    }
    ops::attention_rows(kernels, q_copy.data(), c.num_tokens, c.num_heads, c.num_kv_heads, num_left, c.head_dim,
                        k_rows.data(), v_rows.data(), c.start - first, c.window, 0.4f, first % kKeyBlock,
                        from_rows.data());
    for (size_t i = 0; i < out.size(); ++i) check_close(from_rows[i], out[i], 0, isa + " attention_rows");
    for (int64_t token = 0; token < c.num_tokens; ++token) {
        for (int64_t head = 0; head < c.num_heads; ++head) {
            const int64_t at = (token * c.num_heads + head) * c.head_dim, end = c.start + token + 1;
            const int64_t kv_at = head / (c.num_heads / c.num_kv_heads) * c.head_dim;
            const int64_t begin = c.window > 0 ? std::max<int64_t>(0, end - c.window) : 0;
            const auto expected = attended(&q[at], &k[kv_at], &v[kv_at], begin, end, kv_width, c.head_dim, 0.4f);
            for (int64_t d = 0; d < c.head_dim; ++d) check_close(out[at + d], expected[d], 2e-5, isa + " attention");
        }
    }
}

void check_segments(const ops::Kernels& kernels, const std::string& isa, int64_t num_heads, int64_t head_dim) {
    const std::vector<int64_t> offsets = {0, 1, 1, 65, 130, 133};
    const int64_t width = num_heads * head_dim, num_tokens = offsets.back();
    const Floats q = random_floats(num_tokens * width, 10), k = random_floats(num_tokens * width, 11);
    const Floats v = random_floats(num_tokens * width, 12);
    Floats out(q.size());
    ops::attention_segments(kernels, q.data(), k.data(), v.data(), offsets.data(),
                            static_cast<int64_t>(offsets.size()) - 1, num_heads, head_dim, 0.4f, out.data());
    for (size_t s = 0; s + 1 < offsets.size(); ++s) {
        for (int64_t token = offsets[s]; token < offsets[s + 1]; ++token) {
            for (int64_t at = 0; at < width; at += head_dim) {
                const auto expected =
                    attended(&q[token * width + at], &k[at], &v[at], offsets[s], offsets[s + 1], width, head_dim, 0.4f);
                for (int64_t d = 0; d < head_dim; ++d) {
                    check_close(out[token * width + at + d], expected[d], 2e-5, isa + " attention_segments");
                }
            }
        }
    }
}

}  // namespace

int main() {
    const common::CpuFlags cpu = common::detect_cpu();
    std::vector<std::pair<std::string, const ops::Kernels*>> tables = {{"reference", &ops::kRefKernels}};
#if RAREFY_X86
    if (common::can_run_avx2(cpu)) tables.emplace_back("avx2", &ops::kAvx2Kernels);
    if (common::can_run_avx512(cpu)) tables.emplace_back("avx512", &ops::kAvx512Kernels);
#elif RAREFY_ARM
    if (common::can_run_neon(cpu)) tables.emplace_back("neon", &ops::kNeonKernels);
#else
    (void)cpu;
#endif
    const AttentionCase cases[] = {{1, 1, 2, 1, 0, 0},   {6, 2, 20, 1, 600, 0}, {6, 2, 64, 1, 1100, 600},
                                   {4, 1, 6, 70, 30, 0}, {3, 3, 34, 40, 63, 5}, {40, 1, 4, 3, 64, 64},
                                   {70, 2, 2, 1, 5, 0},  {2, 1, 128, 5, 0, 1}};
    for (const int num_threads : {1, 3}) {
        common::set_num_threads(num_threads);
        for (const auto& [isa, kernels] : tables) {
            check_norms(*kernels, isa);
            check_activations(*kernels, isa);
            for (const AttentionCase& c : cases) check_attention(*kernels, isa, c);
            for (const int64_t head_dim : {1, 5, 32, 65}) check_segments(*kernels, isa, 3, head_dim);
        }
    }
    std::printf("on");
    for (const auto& table : tables) std::printf(" %s", table.first.c_str());
    std::printf("\n");
    return checks::summary();
}
