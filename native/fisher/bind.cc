// Python bindings of the work on blocks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/pool.h"
#include "common/unlocked.h"
#include "fisher/fisher.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

template <class Number, int Axes>
using Array = nb::ndarray<Number, nb::ndim<Axes>, nb::c_contig, nb::device::cpu>;
using Blocks = Array<float, 3>;
using ConstBlocks = Array<const float, 3>;
using Triangles = Array<float, 2>;
using ConstTriangles = Array<const float, 2>;

// Blocks that one thread works on before it takes the next: a few hundred kilobytes.
constexpr int64_t kNumbersAtOnce = 1 << 16;

template <class Any>
int size_of(const Any& blocks) {
    if (blocks.shape(1) != blocks.shape(2) || blocks.shape(1) > fisher::kMostSize || blocks.shape(1) == 0)
        throw std::invalid_argument("blocks must be square, of 1 to 512 rows");
    return static_cast<int>(blocks.shape(1));
}

template <class Any>
void check_triangles(int size, const Any& triangles) {
    if (size < 1 || size > fisher::kMostSize) throw std::invalid_argument("blocks must have 1 to 512 rows");
    if (static_cast<int64_t>(triangles.shape(1)) != fisher::triangle(size))
        throw std::invalid_argument("triangles must have size * (size + 1) / 2 numbers");
}

template <class Any, class Vectors>
void check_vectors(const Any& blocks, const Vectors& vectors) {
    if (vectors.shape(0) != blocks.shape(0) || vectors.shape(1) != blocks.shape(1))
        throw std::invalid_argument("every block needs a vector as long as it is wide");
}

// body(first block, number of blocks) for runs of blocks, shared out to the threads.
template <class Body>
void for_runs(int64_t num_blocks, int size, const Body& body) {
    const int64_t run = std::max<int64_t>(1, kNumbersAtOnce / (int64_t{size} * size));
    common::parallel_for(static_cast<int>((num_blocks + run - 1) / run), [&](int chunk) {
        const int64_t first = chunk * run;
        body(first, std::min(run, num_blocks - first));
    });
}

template <class Number>
using Rows = std::vector<Array<const Number, 1>>;

template <class Number, class Function>
void add(const Rows<Number>& x, int size, const Triangles& total, Function function) {
    check_triangles(size, total);
    const auto num_blocks = static_cast<int64_t>(total.shape(0));
    std::vector<const Number*> rows;
    for (const auto& row : x) {
        if (static_cast<int64_t>(row.shape(0)) != num_blocks * size)
            throw std::invalid_argument("x must have a vector for every block in each row");
        rows.push_back(row.data());
    }
    float* to = total.data();
    const common::Unlocked unlocked;
    for_runs(num_blocks, size, [&](int64_t first, int64_t count) {
        const auto num_rows = static_cast<int64_t>(rows.size());
        function(rows.data(), num_rows, first * size, count, size, to + first * fisher::triangle(size));
    });
}

void invert(const ConstTriangles& block, double scale, double damp, const Blocks& inverse) {
    const int size = size_of(inverse);
    check_triangles(size, block);
    if (inverse.shape(0) != block.shape(0)) throw std::invalid_argument("there must be an inverse for every block");
    const float* from = block.data();
    float* to = inverse.data();
    const auto num_blocks = static_cast<int64_t>(block.shape(0));
    const common::Unlocked unlocked;
    for_runs(num_blocks, size, [&](int64_t first, int64_t count) {
        fisher::functions().invert(from + first * fisher::triangle(size), count, size, scale, damp,
                                   to + first * size * size);
    });
}

void costs(const Array<const float, 2>& weight, const ConstBlocks& inverse, const Array<const bool, 2>& free,
           const Array<float, 2>& cost) {
    const int size = size_of(inverse);
    check_vectors(inverse, weight);
    check_vectors(inverse, free);
    check_vectors(inverse, cost);
    const float *own = weight.data(), *blocks = inverse.data();
    const auto* mask = reinterpret_cast<const uint8_t*>(free.data());
    float* to = cost.data();
    const auto num_blocks = static_cast<int64_t>(inverse.shape(0));
    const common::Unlocked unlocked;
    for_runs(num_blocks, size, [&](int64_t first, int64_t count) {
        const int64_t offset = first * size;
        fisher::functions().costs(own + offset, blocks + offset * size, mask + offset, count, size, to + offset);
    });
}

void drop(const Array<const bool, 2>& dropped, const Array<float, 2>& weight, const Blocks& inverse) {
    const int size = size_of(inverse);
    check_vectors(inverse, weight);
    check_vectors(inverse, dropped);
    const auto* mask = reinterpret_cast<const uint8_t*>(dropped.data());
    float *own = weight.data(), *blocks = inverse.data();
    const auto num_blocks = static_cast<int64_t>(inverse.shape(0));
    const common::Unlocked unlocked;
    for_runs(num_blocks, size, [&](int64_t first, int64_t count) {
        const int64_t offset = first * size;
        fisher::functions().drop(mask + offset, count, size, own + offset, blocks + offset * size);
    });
}

}  // namespace

void bind_fisher(nb::module_& module) {
    module.def(
        "fisher_add_bf16",
        [](const Rows<uint16_t>& x, int size, const Triangles& total) {
            add(x, size, total, fisher::functions().add_bf16);
        },
        nb::arg("x").noconvert(), nb::arg("size"), nb::arg("total").noconvert());
    module.def(
        "fisher_add_float",
        [](const Rows<float>& x, int size, const Triangles& total) {
            add(x, size, total, fisher::functions().add_float);
        },
        nb::arg("x").noconvert(), nb::arg("size"), nb::arg("total").noconvert());
    module.def("fisher_invert", &invert, nb::arg("block").noconvert(), nb::arg("scale"), nb::arg("damp"),
               nb::arg("inverse").noconvert());
    module.def("fisher_costs", &costs, nb::arg("weight").noconvert(), nb::arg("inverse").noconvert(),
               nb::arg("free").noconvert(), nb::arg("cost").noconvert());
    module.def("fisher_drop", &drop, nb::arg("drop").noconvert(), nb::arg("weight").noconvert(),
               nb::arg("inverse").noconvert());
}

}  // namespace rarefy
