#include <algorithm>
#include <cstring>

#include "common/pool.h"
#include "strided/strided.h"

namespace rarefy::strided {
namespace {

// Numbers of a chunk of work, 64 KiB: long beside the claim of a chunk.
constexpr int64_t kChunkNumbers = 1 << 14;

// Drops axes of size 1 and joins neighbours that are one run of equal steps.
void simplify(View& view) {
    int num_axes = 0;
    for (int axis = 0; axis < view.num_axes; ++axis) {
        if (view.sizes[axis] == 1) continue;
        if (num_axes > 0 && view.strides[num_axes - 1] == view.sizes[axis] * view.strides[axis]) {
            view.sizes[num_axes - 1] *= view.sizes[axis];
            view.strides[num_axes - 1] = view.strides[axis];
            continue;
        }
        view.sizes[num_axes] = view.sizes[axis];
        view.strides[num_axes] = view.strides[axis];
        ++num_axes;
    }
    if (num_axes == 0) {
        view.sizes[0] = view.strides[0] = 1;
        num_axes = 1;
    }
    view.num_axes = num_axes;
}

// Copies the entries of the last axis for all outer indices in [begin, end), counted in the order of `out`.
void copy_rows(const View& view, int64_t begin, int64_t end, float* out) {
    const int last = view.num_axes - 1;
    const int64_t run = view.sizes[last], step = view.strides[last];
    int64_t index[kMaxAxes] = {};
    const float* from = view.data;
    for (int64_t rest = begin, axis = last - 1; axis >= 0; --axis) {
        index[axis] = rest % view.sizes[axis];
        rest /= view.sizes[axis];
        from += index[axis] * view.strides[axis];
    }
    float* to = out + begin * run;
    for (int64_t row = begin; row < end; ++row, to += run) {
        if (step == 1) {
            std::memcpy(to, from, static_cast<size_t>(run) * sizeof(float));
        } else {
            for (int64_t i = 0; i < run; ++i) to[i] = from[i * step];
        }
        for (int axis = last - 1; axis >= 0; --axis) {
            from += view.strides[axis];
            if (++index[axis] < view.sizes[axis]) break;
            from -= view.sizes[axis] * view.strides[axis];
            index[axis] = 0;
        }
    }
}

// Sides of the tiles of a transposition: lines of a cache, and what four registers hold.
constexpr int64_t kTile = 16, kQuad = 4;
// Entries of the last axis in a chunk of a transposition.
constexpr int64_t kStretch = 1024;

typedef float Quad __attribute__((vector_size(4 * kQuad)));
typedef int32_t Lanes __attribute__((vector_size(4 * kQuad)));

#if defined(__clang__)
#define RAREFY_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RAREFY_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif

// to[i * to_step + j] = from[j * from_step + i] for four of each.
inline void transpose_quad(const float* from, int64_t from_step, float* to, int64_t to_step) {
    Quad row[kQuad];
    for (int64_t j = 0; j < kQuad; ++j) std::memcpy(&row[j], from + j * from_step, sizeof row[j]);
    const Quad low01 = RAREFY_SHUFFLE(row[0], row[1], 0, 4, 1, 5), high01 = RAREFY_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
    const Quad low23 = RAREFY_SHUFFLE(row[2], row[3], 0, 4, 1, 5), high23 = RAREFY_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
    const Quad column[] = {RAREFY_SHUFFLE(low01, low23, 0, 1, 4, 5), RAREFY_SHUFFLE(low01, low23, 2, 3, 6, 7),
                           RAREFY_SHUFFLE(high01, high23, 0, 1, 4, 5), RAREFY_SHUFFLE(high01, high23, 2, 3, 6, 7)};
    for (int64_t i = 0; i < kQuad; ++i) std::memcpy(to + i * to_step, &column[i], sizeof column[i]);
}

}  // namespace

void transpose(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t height, int64_t width) {
    // Few rows at a time: the caches see their ends coming, which they do not of a hundred.
    for (; height > kTile; height -= kTile, from += kTile, to += kTile * to_step)
        transpose(from, from_step, to, to_step, kTile, width);
    for (int64_t j = 0; j < width; j += kTile) {
        const int64_t wide = std::min(kTile, width - j), quads = wide / kQuad * kQuad, rows = height / kQuad * kQuad;
        for (int64_t i = 0; i < rows; i += kQuad)
            for (int64_t k = 0; k < quads; k += kQuad)
                transpose_quad(from + (j + k) * from_step + i, from_step, to + i * to_step + j + k, to_step);
        for (int64_t i = 0; i < height; ++i)
            for (int64_t k = i < rows ? quads : 0; k < wide; ++k)
                to[i * to_step + j + k] = from[(j + k) * from_step + i];
    }
}

namespace {

// An axis other than the last one along which neighbours lie side by side; -1 without one, or where it is the last.
int transposed_axis(const View& view) {
    const int last = view.num_axes - 1;
    if (view.strides[last] == 1 || view.sizes[last] < kQuad) return -1;
    for (int axis = 0; axis < last; ++axis)
        if (view.strides[axis] == 1 && view.sizes[axis] >= kQuad) return axis;
    return -1;
}

// For every index of the other axes a transposition of `axis` and the last one, shared out in strips.
void copy_transposed(const View& view, int axis, float* out) {
    const int last = view.num_axes - 1;
    const int64_t height = view.sizes[axis], width = view.sizes[last];
    const int64_t strips = (height + kTile - 1) / kTile, stretches = (width + kStretch - 1) / kStretch;
    int64_t steps[kMaxAxes], outer = 1;
    for (int64_t step = 1, other = last; other >= 0; --other) {
        steps[other] = step;
        step *= view.sizes[other];
        if (other != axis && other != last) outer *= view.sizes[other];
    }
    const int64_t num_strips = outer * stretches * strips;
    const int64_t per_chunk = std::max<int64_t>(1, kChunkNumbers / (kTile * std::min(width, kStretch)));
    common::parallel_for(static_cast<int>((num_strips + per_chunk - 1) / per_chunk), [&](int chunk) {
        const int64_t end = std::min(num_strips, (chunk + 1) * per_chunk);
        for (int64_t strip = chunk * per_chunk; strip < end; ++strip) {
            const int64_t i = strip % strips * kTile, j = strip / strips % stretches * kStretch;
            const float* from = view.data + i + j * view.strides[last];
            float* to = out + i * steps[axis] + j;
            int64_t rest = strip / strips / stretches;
            for (int other = last - 1; other >= 0; --other) {
                if (other == axis) continue;
                from += rest % view.sizes[other] * view.strides[other];
                to += rest % view.sizes[other] * steps[other];
                rest /= view.sizes[other];
            }
            transpose(from, view.strides[last], to, steps[axis], std::min(kTile, height - i),
                      std::min(kStretch, width - j));
        }
    });
}

}  // namespace

void copy(View view, float* out) {
    for (int axis = 0; axis < view.num_axes; ++axis)
        if (view.sizes[axis] == 0) return;
    simplify(view);
    if (const int axis = transposed_axis(view); axis >= 0) return copy_transposed(view, axis, out);
    int64_t num_rows = 1;
    for (int axis = 0; axis + 1 < view.num_axes; ++axis) num_rows *= view.sizes[axis];
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkNumbers / view.sizes[view.num_axes - 1]);
    const auto num_chunks = static_cast<int>((num_rows + rows_per_chunk - 1) / rows_per_chunk);
    common::parallel_for(num_chunks, [&](int chunk) {
        const int64_t begin = chunk * rows_per_chunk;
        copy_rows(view, begin, std::min(num_rows, begin + rows_per_chunk), out);
    });
}

}  // namespace rarefy::strided
