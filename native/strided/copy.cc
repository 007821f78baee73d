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

}  // namespace

void copy(View view, float* out) {
    for (int axis = 0; axis < view.num_axes; ++axis)
        if (view.sizes[axis] == 0) return;
    simplify(view);
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
