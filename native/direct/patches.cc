#include "direct/patches.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/pool.h"
#include "matmul/activations.h"
#include "strided/strided.h"

namespace rarefy::direct {
namespace {

// Rows of a strip: enough that reading the weight pays, in patches that a second-level cache holds.
constexpr int64_t kMostRows = 512, kFewestRows = 32, kPatchFloats = int64_t{1} << 17;
constexpr int64_t kMostInputs = kPatchFloats / kFewestRows;
// Where the threads would get shorter strips than this, they share the outputs of a strip instead.
constexpr int64_t kFewestShared = 24;
// Of an image with channels in front: what a strip sees of it, with the channels last.
constexpr int64_t kMostPixelFloats = int64_t{1} << 20;

int64_t most_rows(const Shape& shape) { return std::clamp(kPatchFloats / shape.num_inputs(), kFewestRows, kMostRows); }

bool is_pointwise(const Shape& shape) {
    for (int a = 0; a < kAxes; ++a)
        if (shape.kernel[a] != 1 || shape.stride[a] != 1 || shape.before[a] != 0 || shape.out[a] != shape.size[a])
            return false;
    return true;
}

void clear(float* to, int64_t count) { std::memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

// Runs of `length` numbers, so many from one to the next. A call of memcpy takes longer than the few channels of most.
struct Runs {
    int64_t count, length, from_step, to_step;
};

template <int kQuads>
void copy_short(const Runs& runs, const float* from, float* to) {
    constexpr int kQuad = 4;
    const int64_t last = runs.length - kQuad;
    for (int64_t i = 0; i < runs.count; ++i, from += runs.from_step, to += runs.to_step) {
        for (int quad = 0; quad + 1 < kQuads; ++quad) std::memcpy(to + kQuad * quad, from + kQuad * quad, 4 * kQuad);
        std::memcpy(to + last, from + last, 4 * kQuad);
    }
}

void copy(const Runs& runs, const float* from, float* to) {
    switch ((runs.length + 3) / 4) {
        case 0: return;
        case 1:
            if (runs.length == 4) return copy_short<1>(runs, from, to);
            for (int64_t i = 0; i < runs.count; ++i)
                for (int64_t k = 0; k < runs.length; ++k) to[i * runs.to_step + k] = from[i * runs.from_step + k];
            return;
        case 2: return copy_short<2>(runs, from, to);
        case 3: return copy_short<3>(runs, from, to);
        case 4: return copy_short<4>(runs, from, to);
        case 5: return copy_short<5>(runs, from, to);
        case 6: return copy_short<6>(runs, from, to);
        default:
            for (int64_t i = 0; i < runs.count; ++i)
                std::memcpy(to + i * runs.to_step, from + i * runs.from_step, static_cast<size_t>(runs.length) * 4);
    }
}

// The axis that a strip of places is cut along, and the pixels and outputs of one step on it.
struct Cut {
    int axis = 0;
    int64_t pixels, places;
    explicit Cut(const Shape& shape) : pixels(shape.image_size()), places(shape.out_size()) {
        for (;; ++axis) {
            pixels /= shape.size[axis];
            places /= shape.out[axis];
            if (axis + 1 == kAxes || shape.size[axis] > 1 || shape.out[axis] > 1) return;
        }
    }
};

// The first and the end of the pixels of an image that its outputs [begin, end) see, and some more.
std::pair<int64_t, int64_t> seen_by(const Shape& shape, int64_t begin, int64_t end) {
    const Cut cut(shape);
    const int64_t size = shape.size[cut.axis], stride = shape.stride[cut.axis], before = shape.before[cut.axis];
    const int64_t low = begin / cut.places * stride - before, high = (end - 1) / cut.places * stride - before;
    const int64_t first = std::clamp<int64_t>(low, 0, size);
    return {first * cut.pixels, std::clamp(high + reach(shape, cut.axis, 1), first, size) * cut.pixels};
}

// An image whose channels lie last, from pixel number `first` on.
struct Pixels {
    const float* x;
    int64_t step;  // from pixel to pixel
    int64_t first;
};

// One row of the kernel at `count` outputs side by side, `to_step` apart: `row` holds the image's row that it meets,
// and `start` is where the first tap of the first output falls.
void copy_row(const Shape& shape, const float* row, int64_t step, int64_t start, int64_t count, int64_t to_step,
              float* to) {
    const int64_t channels = shape.group_channels, taps = shape.kernel[2], size = shape.size[2];
    const int64_t stride = shape.stride[2];
    const bool joined = shape.dilation[2] == 1 && step == channels;  // taps side by side are one run
    const int64_t num_runs = joined ? 1 : taps, length = joined ? taps : 1;
    for (int64_t run = 0; run < num_runs; ++run, start += shape.dilation[2], to += channels) {
        // Outputs whose run lies in the image as a whole.
        const Inside whole(start, stride, count, size - length + 1);
        const int64_t low = whole.begin, high = whole.end;
        if (low < high)
            copy({high - low, length * channels, stride * step, to_step}, row + (start + low * stride) * step,
                 to + low * to_step);
        for (int64_t i = 0; i < count; ++i) {
            if (i == low) i = high;
            if (i == count) break;
            const int64_t first = start + i * stride;
            const int64_t begin = std::clamp<int64_t>(-first, 0, length), end = std::clamp(size - first, begin, length);
            float* const at = to + i * to_step;
            clear(at, begin * channels);
            if (begin < end)
                copy({1, (end - begin) * channels, 0, 0}, row + (first + begin) * step, at + begin * channels);
            clear(at + end * channels, (length - end) * channels);
        }
    }
}

// The patches of the outputs [begin, end) of one image, one after the other.
void copy_patches(const Shape& shape, const Pixels& image, int64_t begin, int64_t end, float* to) {
    const int64_t length = shape.kernel[2] * shape.group_channels, width = shape.num_inputs();
    for (int64_t place = begin, count; place < end; place += count, to += count * width) {
        const int64_t line = place / shape.out[2], column = place % shape.out[2];
        count = std::min(end - place, shape.out[2] - column);
        const int64_t start = column * shape.stride[2] - shape.before[2];
        const int64_t first_slice = line / shape.out[1] * shape.stride[0] - shape.before[0];
        const int64_t first_row = line % shape.out[1] * shape.stride[1] - shape.before[1];
        float* at = to;
        for (int64_t i = 0; i < shape.kernel[0]; ++i) {
            const int64_t slice = first_slice + i * shape.dilation[0];
            for (int64_t j = 0; j < shape.kernel[1]; ++j, at += length) {
                const int64_t row = first_row + j * shape.dilation[1];
                if (slice < 0 || slice >= shape.size[0] || row < 0 || row >= shape.size[1]) {
                    for (int64_t k = 0; k < count; ++k) clear(at + k * width, length);
                    continue;
                }
                const int64_t pixel = (slice * shape.size[1] + row) * shape.size[2] - image.first;
                copy_row(shape, image.x + pixel * image.step, image.step, start, count, width, at);
            }
        }
    }
}

// Memory of a thread.
struct Room {
    matmul::Scratch pixels, patches, outputs;
    void trim() {
        for (matmul::Scratch* scratch : {&pixels, &patches, &outputs}) scratch->trim();
    }
};

Room& room() {
    thread_local Room room;
    return room;
}

// Calls body(image, first place, end, rows before) for the part of [begin, end) that lies in each image.
template <class Body>
void for_images(const Shape& shape, int64_t begin, int64_t end, Body body) {
    const int64_t places = shape.out_size();
    for (int64_t at = begin; at < end;) {
        const int64_t image = at / places, stop = std::min(end, (image + 1) * places);
        body(image, at - image * places, stop - image * places, at - begin);
        at = stop;
    }
}

// The rows of one group for the places [begin, end) of all images: the image itself where it holds them as they are.
const float* rows_of(const Convolution& c, int64_t group, int64_t begin, int64_t end, bool pointwise, Room& own) {
    const Shape& shape = c.shape;
    const int64_t channels = shape.group_channels, width = shape.num_inputs(), plane = shape.image_size();
    if (pointwise && c.channels_last && shape.groups == 1) return c.x + begin * width;
    float* const rows = own.patches.floats((end - begin) * width);
    for_images(shape, begin, end, [&](int64_t image, int64_t first, int64_t stop, int64_t before) {
        float* const to = rows + before * width;
        const float* const x = c.x + image * plane * shape.num_channels();
        if (c.channels_last)
            return copy_patches(shape, {x + group * channels, shape.num_channels(), 0}, first, stop, to);
        const float* const planes = x + group * channels * plane;
        if (pointwise) return strided::transpose(planes + first, plane, to, channels, stop - first, channels);
        const auto [from, until] = seen_by(shape, first, stop);
        float* const pixels = own.pixels.floats((until - from) * channels);
        strided::transpose(planes + from, plane, pixels, channels, until - from, channels);
        copy_patches(shape, {pixels, channels, from}, first, stop, to);
    });
    return rows;
}

void add_bias(const float* bias, int64_t num_rows, int64_t width, float* y) {
    for (int64_t row = 0; row < num_rows; ++row, y += width)
        for (int64_t i = 0; i < width; ++i) y[i] += bias[i];
}

void convolve_strip(const Convolution& c, int64_t begin, int64_t end, bool pointwise) {
    const Shape& shape = c.shape;
    const int64_t outputs = shape.group_outputs, all = shape.num_outputs(), num_rows = end - begin;
    const bool in_place = c.channels_last && shape.groups == 1;
    Room& own = room();
    for (int64_t group = 0; group < shape.groups; ++group) {
        const float* const rows = rows_of(c, group, begin, end, pointwise, own);
        float* const y = in_place ? c.y + begin * all : own.outputs.floats(num_rows * outputs);
        matmul::multiply(rows, num_rows, shape.num_inputs(), {{c.operators[static_cast<size_t>(group)], y}});
        if (c.bias != nullptr) add_bias(c.bias + group * outputs, num_rows, outputs, y);
        if (in_place) continue;
        if (c.channels_last) {
            float* const to = c.y + begin * all + group * outputs;
            copy({num_rows, outputs, outputs, all}, y, to);
            continue;
        }
        for_images(shape, begin, end, [&](int64_t image, int64_t first, int64_t stop, int64_t before) {
            strided::transpose(y + before * outputs, outputs,
                               c.y + (image * all + group * outputs) * shape.out_size() + first, shape.out_size(),
                               outputs, stop - first);
        });
    }
    own.trim();
}

}  // namespace

bool fits_strips(const Convolution& convolution) {
    const Shape& shape = convolution.shape;
    if (shape.num_inputs() > kMostInputs) return false;
    if (convolution.channels_last || is_pointwise(shape)) return true;
    const Cut cut(shape);
    const int64_t steps = std::min(shape.out[cut.axis], (most_rows(shape) - 2) / cut.places + 2);
    const int64_t seen = std::min(shape.size[cut.axis], reach(shape, cut.axis, steps)) * cut.pixels;
    return seen <= kMostPixelFloats / shape.group_channels;
}

void convolve_patches(const Convolution& convolution) {
    const Shape& shape = convolution.shape;
    const int64_t num_places = shape.batch * shape.out_size();
    if (num_places == 0 || shape.num_outputs() == 0) return;
    const bool pointwise = is_pointwise(shape);
    // Strips of the same length for every number of threads, where the bits depend on it.
    const auto depends = [](const matmul::Operator* by) { return by->depends_on_rows(); };
    const bool is_fixed = std::any_of(convolution.operators.begin(), convolution.operators.end(), depends);
    const int64_t num_threads = common::num_threads(), fewest = ceil_div(num_places, most_rows(shape));
    const int64_t shared = ceil_div(fewest, num_threads) * num_threads;
    const bool shares = num_threads > 1 && (is_fixed ? fewest >= num_threads : num_places / shared >= kFewestShared);
    const int64_t num_strips = shares && !is_fixed ? shared : fewest;
    const auto run = [&](int64_t strip) {
        convolve_strip(convolution, num_places * strip / num_strips, num_places * (strip + 1) / num_strips, pointwise);
    };
    if (!shares) {
        for (int64_t strip = 0; strip < num_strips; ++strip) run(strip);
        return;
    }
    constexpr int64_t kMostTasks = 1 << 15;
    const int64_t per_task = ceil_div(num_strips, kMostTasks);
    common::parallel_for(static_cast<int>(ceil_div(num_strips, per_task)), [&](int task) {
        const common::OneThread alone;
        const int64_t end = std::min(num_strips, (task + 1) * per_task);
        for (int64_t strip = task * per_task; strip < end; ++strip) run(strip);
    });
}

}  // namespace rarefy::direct
