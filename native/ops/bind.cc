// Python bindings of the engine's small ops: rarefy._native.Ops, one object per instruction set, with the methods of
// rarefy.kernels.ops.Ops. Every shape is checked here, because the kernels trust them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/arrays.h"
#include "ops/ops.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Floats4 = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Writable2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Writable3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Writable4 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Result new_result(size_t rows, size_t width, float** data) {
    *data = new float[rows * width];
    nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return Result(*data, {rows, width}, owner);
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <class A, class B>
void require_same_shape(const A& a, const B& b) {
    require(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1), "two arrays differ in shape");
}

ops::Activation as_activation(int number) {
    require(0 <= number && number < ops::kNumActivations, "unknown activation number");
    return static_cast<ops::Activation>(number);
}

template <class Keys, class Values>
ops::CacheShape cache_shape(const Keys& keys, const Values& values) {
    require(keys.shape(3) == ops::kKeyBlock && values.shape(0) == keys.shape(0) && values.shape(2) == keys.shape(2) &&
                values.shape(1) == keys.shape(1) * ops::kKeyBlock && keys.shape(0) > 0 && keys.shape(2) > 0,
            "k_cache must be (heads, blocks, head_dim, 64) and v_cache (heads, blocks * 64, head_dim)");
    return {static_cast<int64_t>(keys.shape(0)), static_cast<int64_t>(keys.shape(1)),
            static_cast<int64_t>(keys.shape(2))};
}

// Number of query heads, after checking that start + tokens fit into the cache.
template <class Queries>
int64_t query_heads(const Queries& q, const ops::CacheShape& cache, int64_t start) {
    const int64_t width = static_cast<int64_t>(q.shape(1)), tokens = static_cast<int64_t>(q.shape(0));
    require(width > 0 && width % (cache.head_dim * cache.num_kv_heads) == 0,
            "the width of q must be a multiple of the cache's heads * head_dim");
    require(0 <= start && start <= cache.num_blocks * ops::kKeyBlock - tokens, "positions lie outside the cache");
    return width / cache.head_dim;
}

class Ops {
public:
    explicit Ops(const std::string& isa) : isa(isa), kernels_(ops::find_kernels(isa.c_str())) {}

    const std::string isa;

    Result rms_norm(Floats2 x, Floats1 weight, float eps) const {
        require(x.shape(1) == weight.shape(0), "the weight must have one value per column");
        float* y;
        Result result = new_result(x.shape(0), x.shape(1), &y);
        ops::rms_norm(kernels_, x.data(), nullptr, weight.data(), eps, x.shape(0), x.shape(1), y);
        return result;
    }

    Result add_rms_norm(Writable2 sum, Floats2 x, Floats1 weight, float eps) const {
        require_same_shape(sum, x);
        require(x.shape(1) == weight.shape(0), "the weight must have one value per column");
        float* y;
        Result result = new_result(x.shape(0), x.shape(1), &y);
        ops::rms_norm(kernels_, x.data(), sum.data(), weight.data(), eps, x.shape(0), x.shape(1), y);
        return result;
    }

    Result add_layer_norm(Floats2 x, Floats2 residual, Floats1 weight, Floats1 bias, float eps) const {
        require_same_shape(x, residual);
        require(x.shape(1) == weight.shape(0) && x.shape(1) == bias.shape(0),
                "weight and bias must have one value per column");
        float* y;
        Result result = new_result(x.shape(0), x.shape(1), &y);
        ops::layer_norm(kernels_, x.data(), residual.data(), weight.data(), bias.data(), eps, x.shape(0), x.shape(1),
                        y);
        return result;
    }

    Result layer_norm(Floats2 x, Floats1 weight, Floats1 bias, float eps) const {
        require(x.shape(1) == weight.shape(0) && x.shape(1) == bias.shape(0),
                "weight and bias must have one value per column");
        float* y;
        Result result = new_result(x.shape(0), x.shape(1), &y);
        ops::layer_norm(kernels_, x.data(), nullptr, weight.data(), bias.data(), eps, x.shape(0), x.shape(1), y);
        return result;
    }

    void add_bias(Writable2 x, Floats1 bias) const {
        require(x.shape(1) == bias.shape(0), "the bias must have one value per column");
        ops::add_bias(kernels_, x.data(), bias.data(), x.shape(0), x.shape(1));
    }

    void activate(Writable2 x, int activation) const {
        ops::activate(kernels_, x.data(), x.size(), as_activation(activation));
    }

    void gate(Writable2 gate, Floats2 up, int activation) const {
        require_same_shape(gate, up);
        ops::gate(kernels_, gate.data(), up.data(), gate.size(), as_activation(activation));
    }

    void rope_store(Writable2 q, Writable2 k, Floats2 v, Floats2 cos, Floats2 sin, Writable4 k_cache, Writable3 v_cache,
                    int64_t start) const {
        const ops::CacheShape cache = cache_shape(k_cache, v_cache);
        const int64_t num_heads = query_heads(q, cache, start), end = start + static_cast<int64_t>(q.shape(0));
        require_same_shape(k, v);
        require_same_shape(cos, sin);
        require(k.shape(0) == q.shape(0) && static_cast<int64_t>(k.shape(1)) == cache.num_kv_heads * cache.head_dim,
                "k and v must be (tokens, heads * head_dim)");
        require(static_cast<int64_t>(cos.shape(0)) >= end && 2 * static_cast<int64_t>(cos.shape(1)) == cache.head_dim,
                "cos and sin must be (positions, head_dim / 2)");
        ops::rope_store(kernels_, q.data(), k.data(), v.data(), cos.data(), sin.data(), q.shape(0), num_heads, cache,
                        k_cache.data(), v_cache.data(), start);
    }

    Result attention(Floats2 q, Floats4 k_cache, Floats3 v_cache, int64_t start, int64_t window, float scale) const {
        const ops::CacheShape cache = cache_shape(k_cache, v_cache);
        const int64_t num_heads = query_heads(q, cache, start);
        require(window >= 0, "window must not be negative");
        float* out;
        Result result = new_result(q.shape(0), q.shape(1), &out);
        ops::attention(kernels_, q.data(), q.shape(0), num_heads, cache, k_cache.data(), v_cache.data(), start, window,
                       scale, out);
        return result;
    }

    Result attention_rows(Floats2 q, Floats3 k, Floats3 v, int64_t start, int64_t window, float scale,
                          int64_t shift) const {
        for (size_t axis = 0; axis < 3; ++axis)
            require(k.shape(axis) == v.shape(axis) && k.shape(axis) > 0, "k and v must be (heads, keys, head_dim)");
        const int64_t num_kv_heads = static_cast<int64_t>(k.shape(0)), num_keys = static_cast<int64_t>(k.shape(1));
        const int64_t head_dim = static_cast<int64_t>(k.shape(2)), width = static_cast<int64_t>(q.shape(1));
        require(width > 0 && width % (head_dim * num_kv_heads) == 0,
                "the width of q must be a multiple of the heads * head_dim of k");
        require(0 <= start && start <= num_keys - static_cast<int64_t>(q.shape(0)), "positions lie outside the keys");
        require(window >= 0, "window must not be negative");
        require(0 <= shift && shift < ops::kKeyBlock && (shift == 0 || (window > 0 && window <= start + 1)),
                "shift must be below 64, and 0 unless a window hides what lies before the keys");
        float* out;
        Result result = new_result(q.shape(0), q.shape(1), &out);
        ops::attention_rows(kernels_, q.data(), q.shape(0), width / head_dim, num_kv_heads, num_keys, head_dim,
                            k.data(), v.data(), start, window, scale, shift, out);
        return result;
    }

    Result attention_segments(Floats2 q, Floats2 k, Floats2 v, Offsets offsets, int64_t num_heads, float scale) const {
        require_same_shape(q, k);
        require_same_shape(q, v);
        const int64_t tokens = static_cast<int64_t>(q.shape(0)), width = static_cast<int64_t>(q.shape(1));
        require(num_heads > 0 && width > 0 && width % num_heads == 0, "the width must be a multiple of num_heads");
        const std::vector<int64_t> own = common::copied(offsets);
        const auto count = static_cast<int64_t>(own.size());
        require(count > 0 && own.front() == 0 && own.back() == tokens && std::is_sorted(own.begin(), own.end()),
                "offsets must rise from 0 to the number of tokens");
        require(count * num_heads <= std::numeric_limits<int>::max(), "too many segments");
        float* out;
        Result result = new_result(q.shape(0), q.shape(1), &out);
        ops::attention_segments(kernels_, q.data(), k.data(), v.data(), own.data(), count - 1, num_heads,
                                width / num_heads, scale, out);
        return result;
    }

private:
    const ops::Kernels& kernels_;
};

}  // namespace

void bind_ops(nb::module_& module) {
    using namespace nb::literals;
    // noconvert: a converted copy would take the in-place results with it.
    nb::class_<Ops>(module, "Ops")
        .def(nb::init<const std::string&>(), nb::arg("isa"))
        .def_ro("isa", &Ops::isa)
        .def("rms_norm", &Ops::rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a)
        .def("add_rms_norm", &Ops::add_rms_norm, "sum"_a.noconvert(), "x"_a.noconvert(), "weight"_a.noconvert(),
             "eps"_a)
        .def("add_layer_norm", &Ops::add_layer_norm, "x"_a.noconvert(), "residual"_a.noconvert(),
             "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a)
        .def("layer_norm", &Ops::layer_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a)
        .def("add_bias", &Ops::add_bias, "x"_a.noconvert(), "bias"_a.noconvert())
        .def("activate", &Ops::activate, "x"_a.noconvert(), "activation"_a)
        .def("gate", &Ops::gate, "gate"_a.noconvert(), "up"_a.noconvert(), "activation"_a)
        .def("rope_store", &Ops::rope_store, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
             "cos"_a.noconvert(), "sin"_a.noconvert(), "k_cache"_a.noconvert(), "v_cache"_a.noconvert(), "start"_a)
        .def("attention", &Ops::attention, "q"_a.noconvert(), "k_cache"_a.noconvert(), "v_cache"_a.noconvert(),
             "start"_a, "window"_a, "scale"_a)
        .def("attention_rows", &Ops::attention_rows, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "start"_a,
             "window"_a, "scale"_a, "shift"_a)
        .def("attention_segments", &Ops::attention_segments, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
             "offsets"_a.noconvert(), "num_heads"_a, "scale"_a);
}

}  // namespace rarefy
