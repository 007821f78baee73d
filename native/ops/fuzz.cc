// Every shape that the bindings let through, with any numbers, into the engine's ops on every instruction set of this
// machine: no access outside of the arrays, and the same bits for every number of threads.
#include <algorithm>
#include <functional>
#include <utility>

#include "common/cpu.h"
#include "common/fuzz.h"
#include "common/pool.h"
#include "ops/ops.h"

namespace {

using namespace rarefy;
using fuzz::Exact;
using fuzz::Input;
using ops::Kernels;

std::vector<const Kernels*> runnable_tables() {
    std::vector<const Kernels*> tables = {&ops::kRefKernels};
#if RAREFY_X86
    const common::CpuFlags cpu = common::detect_cpu();
    if (common::can_run_avx2(cpu)) tables.push_back(&ops::kAvx2Kernels);
    if (common::can_run_avx512(cpu)) tables.push_back(&ops::kAvx512Kernels);
#endif
    return tables;
}

std::vector<float> numbers(Input& input, int64_t count) { return fuzz::floats(input, count, false); }

// Runs body(out) on one thread and on several. `out` begins as a copy of `before`.
template <class Body>
void check(Input& input, const char* what, const std::vector<float>& before, Body body) {
    const Exact<float> one(before), many(before);
    common::set_num_threads(1);
    body(one.data());
    common::set_num_threads(static_cast<int>(input.between(1, 4)));
    body(many.data());
    if (!before.empty() && std::memcmp(one.data(), many.data(), before.size() * 4) != 0)
        fuzz::fail(std::string(what) + ": other bits with other threads");
}

void rows(Input& input, const Kernels& kernels) {
    const int64_t num_rows = input.size(300), width = input.size(300), size = num_rows * width;
    const std::vector<float> x = numbers(input, size), nothing(x.size());
    const Exact<float> in(x), other(numbers(input, size)), weight(numbers(input, width)), bias(numbers(input, width));
    const auto activation = static_cast<ops::Activation>(input.between(0, ops::kNumActivations - 1));
    check(input, "rms_norm", nothing,
          [&](float* out) { ops::rms_norm(kernels, in.data(), nullptr, weight.data(), 1e-5f, num_rows, width, out); });
    check(input, "add_rms_norm", x, [&](float* sum) {
        const Exact<float> out(x.size());
        ops::rms_norm(kernels, other.data(), sum, weight.data(), 1e-5f, num_rows, width, out.data());
    });
    const float* residual = input.one_in(2) ? nullptr : other.data();
    check(input, "layer_norm", nothing, [&](float* out) {
        ops::layer_norm(kernels, in.data(), residual, weight.data(), bias.data(), 1e-5f, num_rows, width, out);
    });
    check(input, "add_bias", x, [&](float* out) { ops::add_bias(kernels, out, bias.data(), num_rows, width); });
    check(input, "activate", x, [&](float* out) { ops::activate(kernels, out, size, activation); });
    check(input, "gate", x, [&](float* out) { ops::gate(kernels, out, other.data(), size, activation); });
}

// Fewer tokens where many heads and keys would take seconds.
int64_t affordable(int64_t num_tokens, int64_t products_per_token) {
    constexpr int64_t kMaxProducts = int64_t{1} << 21;
    return std::min(num_tokens, std::max<int64_t>(1, kMaxProducts / std::max<int64_t>(1, products_per_token)));
}

void cached(Input& input, const Kernels& kernels) {
    const int64_t half = input.between(1, 40), head_dim = 2 * half, num_kv_heads = input.between(1, 4);
    const int64_t num_heads = num_kv_heads * input.pick<int64_t>({1, 1, 2, 3, 7, 33});
    const ops::CacheShape cache{num_kv_heads, input.between(0, 6), head_dim};
    const int64_t room = cache.num_blocks * ops::kKeyBlock;
    const int64_t wanted = std::min(room, input.pick<int64_t>({0, 1, 1, 2, 5, 31, 33, 64, 100, 300}));
    const int64_t num_tokens = affordable(wanted, num_heads * head_dim * room);
    const int64_t start = input.between(0, room - num_tokens), end = start + num_tokens;
    const int64_t window = input.one_in(2) ? 0 : input.pick<int64_t>({1, 2, 63, 64, 65, 200, INT64_MAX});
    const int64_t cache_size = num_kv_heads * room * head_dim;
    const Exact<float> k(numbers(input, num_tokens * num_kv_heads * head_dim));
    const Exact<float> v(numbers(input, num_tokens * num_kv_heads * head_dim));
    const Exact<float> cos(numbers(input, end * half)), sin(numbers(input, end * half));
    const Exact<float> k_cache(numbers(input, cache_size)), v_cache(numbers(input, cache_size));
    const std::vector<float> q = numbers(input, num_tokens * num_heads * head_dim), nothing(q.size());
    ops::rope_store(kernels, Exact<float>(q).data(), k.data(), v.data(), cos.data(), sin.data(), num_tokens, num_heads,
                    cache, k_cache.data(), v_cache.data(), start);
    const Exact<float> queries(q);
    check(input, "attention", nothing, [&](float* out) {
        ops::attention(kernels, queries.data(), num_tokens, num_heads, cache, k_cache.data(), v_cache.data(), start,
                       window, 0.3f, out);
    });
}

void from_rows(Input& input, const Kernels& kernels) {
    const int64_t head_dim = input.between(1, 70), num_kv_heads = input.between(1, 4);
    const int64_t num_heads = num_kv_heads * input.pick<int64_t>({1, 1, 2, 5, 33});
    const int64_t num_keys = std::max<int64_t>(1, input.size(300));
    const int64_t wanted = std::min(num_keys, input.pick<int64_t>({0, 1, 1, 2, 5, 31, 33, 64, 100, 300}));
    const int64_t num_tokens = affordable(wanted, num_heads * head_dim * num_keys);
    const int64_t start = input.between(0, num_keys - num_tokens);
    const int64_t window = input.one_in(2) ? 0 : input.between(1, start + 1);
    const int64_t shift = window == 0 ? 0 : input.between(0, ops::kKeyBlock - 1);
    const Exact<float> k(numbers(input, num_kv_heads * num_keys * head_dim));
    const Exact<float> v(numbers(input, num_kv_heads * num_keys * head_dim));
    const std::vector<float> q = numbers(input, num_tokens * num_heads * head_dim), nothing(q.size());
    const Exact<float> queries(q);
    check(input, "attention_rows", nothing, [&](float* out) {
        ops::attention_rows(kernels, queries.data(), num_tokens, num_heads, num_kv_heads, num_keys, head_dim, k.data(),
                            v.data(), start, window, 0.3f, shift, out);
    });
}

void segments(Input& input, const Kernels& kernels) {
    const int64_t num_heads = input.between(1, 5), head_dim = input.between(1, 70), width = num_heads * head_dim;
    std::vector<int64_t> offsets = {0};
    for (int64_t i = input.between(0, 6); i > 0; --i) offsets.push_back(offsets.back() + input.size(90));
    const int64_t size = offsets.back() * width;
    const std::vector<float> nothing(static_cast<size_t>(size));
    const Exact<float> q(numbers(input, size)), k(numbers(input, size)), v(numbers(input, size));
    const Exact<int64_t> places(offsets);
    check(input, "attention_segments", nothing, [&](float* out) {
        ops::attention_segments(kernels, q.data(), k.data(), v.data(), places.data(),
                                static_cast<int64_t>(offsets.size()) - 1, num_heads, head_dim, 0.3f, out);
    });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::vector<const Kernels*> tables = runnable_tables();
    Input input(data, size);
    const auto op = input.pick({rows, cached, from_rows, segments});
    op(input, *tables[static_cast<size_t>(input.between(0, static_cast<int64_t>(tables.size()) - 1))]);
    return 0;
}
