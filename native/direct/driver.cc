#include "direct/driver.h"

#include <algorithm>
#include <utility>

#include "common/pool.h"
#include "matmul/decode.h"
#include "strided/strided.h"

namespace rarefy::direct {
namespace {

using matmul::Isa;
using matmul::Operator;

// Of a strip: what a first-level cache holds while the taps of a channel go over it, and what a second-level one does.
constexpr int64_t kPlanarFloats = 6 << 10, kManyChannelsFloats = 32 << 10, kPixelFloats = 8 << 10;
// Products of a task, some 10 us.
constexpr int64_t kTaskProducts = int64_t{1} << 18;
// Wider rows fill the vectors of planes well.
constexpr int64_t kMostTurned = 32;
// Of an image, which a thread then holds 16 channels of: 1 MB.
constexpr int64_t kMostTurnedPixels = 1 << 14;
// What copying a number and leaving one are worth beside a product of the sum.
constexpr int64_t kCopyProducts = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Isa isa_of(const Operator& by) { return by.weights() != nullptr ? by.weights()->isa() : isa_of(by.part(0)); }

const Kernels& kernels_of(Isa isa) {
#if RAREFY_X86
    if (isa >= Isa::avx512) return kAvx512Kernels;
    if (isa >= Isa::avx2) return kAvx2Kernels;
#elif RAREFY_ARM
    if (isa == Isa::neon) return kNeonKernels;
#endif
    static_cast<void>(isa);
    return kRefKernels;
}

// Outputs of one panel that see the same channels.
struct Member {
    const Operator* by;
    int64_t panel, lane, count;
    int64_t group, output;  // the group, and the first output
};

std::vector<Member> members_of(const Convolution& c) {
    std::vector<Member> members;
    const bool is_one = c.operators.size() == 1;
    for (int64_t group = 0; group < c.shape.groups; ++group) {
        const Operator* const by = c.operators[is_one ? 0 : static_cast<size_t>(group)];
        const int64_t first = is_one ? group * c.shape.group_outputs : 0, end = first + c.shape.group_outputs;
        for (int64_t row = first; row < end;) {
            const int64_t lane = row % kPanel, count = std::min(end - row, kPanel - lane);
            members.push_back({by, row / kPanel, lane, count, group, group * c.shape.group_outputs + row - first});
            row += count;
        }
    }
    return members;
}

// Calls body(first, end) for stretches of so many pieces of work, each long enough to be a task. Consecutive pieces
// share what they decode, so a stretch is no shorter than it must be for the threads.
template <class Body>
void share_out(int64_t num_pieces, int64_t products, Body body) {
    const int64_t fewest = std::max<int64_t>(1, ceil_div(kTaskProducts, std::max<int64_t>(1, products)));
    const int64_t wanted = common::num_threads() == 1 ? 1 : 8 * common::num_threads();
    const int64_t length = std::max(fewest, ceil_div(num_pieces, wanted));
    common::parallel_for(static_cast<int>(ceil_div(num_pieces, length)),
                         [&](int task) { body(task * length, std::min(num_pieces, (task + 1) * length)); });
}

// Memory of a thread.
struct Room {
    matmul::Decoder decoder;
    matmul::Scratch panel, weights, buffer, inputs, outputs;
    static float* floats(matmul::Scratch& scratch, int64_t count) {
        return reinterpret_cast<float*>(scratch.reserve(count * static_cast<int64_t>(sizeof(float))));
    }
    void trim() {
        for (matmul::Scratch* scratch : {&buffer, &inputs, &outputs}) scratch->trim();
    }
};

Room& room() {
    thread_local Room room;
    return room;
}

void convolve_planar(const Convolution& c, const Kernels& kernels) {
    const Shape& shape = c.shape;
    const std::vector<Member> members = members_of(c);
    const Strips strips(shape, shape.group_channels == 1 ? kPlanarFloats : kManyChannelsFloats, [&](int64_t length) {
        int64_t floats = shape.group_channels;
        int axis = 0;
        while (axis + 1 < kAxes && shape.out[axis] == 1) ++axis;
        for (int a = 0; a < kAxes; ++a) floats *= reach(shape, a, a == axis ? length : shape.out[a]);
        return floats;
    });
    const PlanarPlan plan(shape, strips.axis(), strips.length());
    const int64_t num_strips = strips.count(), per_member = num_strips * shape.batch;
    const auto num_terms = static_cast<int64_t>(plan.terms.size());
    const int64_t out_size = shape.out_size();
    const int64_t products =
        ceil_div(out_size, num_strips) * num_terms * shape.group_outputs + kCopyProducts * plan.num_floats;
    share_out(static_cast<int64_t>(members.size()) * per_member, products, [&](int64_t begin, int64_t end) {
        Room& own = room();
        const Member* decoded = nullptr;
        int64_t arranged = -1;
        float* const panel = Room::floats(own.panel, num_terms * kPanel);
        float* const weights = Room::floats(own.weights, num_terms * kPanel);
        float* const buffer = Room::floats(own.buffer, plan.num_floats + kReadBeyond);
        float starts[kPanel] = {};
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t number = piece / per_member, image = piece % per_member / num_strips;
            const Member& member = members[static_cast<size_t>(number)];
            if (decoded == nullptr || decoded->by != member.by || decoded->panel != member.panel) {
                own.decoder.decode(*member.by, member.panel, panel);
                decoded = &member;
            }
            if (arranged != number) {
                for (int64_t i = 0; i < member.count; ++i) {
                    const float* const from = panel + member.lane + i;
                    float* const to = weights + i * num_terms;
                    for (int64_t k = 0; k < num_terms; ++k) to[k] = from[plan.terms[static_cast<size_t>(k)] * kPanel];
                    if (c.bias != nullptr) starts[i] = c.bias[member.output + i];
                }
                arranged = number;
            }
            const Strip strip = strips.strip(piece % num_strips);
            const int64_t channel = image * shape.num_channels() + member.group * shape.group_channels;
            plan.fill(kernels, shape, strip, num_strips == 1 && piece > begin, c.x + channel * shape.image_size(),
                      buffer);
            float* const y = c.y + (image * shape.num_outputs() + member.output) * out_size;
            for (int64_t slice = strip.begin[0]; slice < strip.end[0]; ++slice) {
                const int64_t place = (slice * shape.out[1] + strip.begin[1]) * shape.out[2] + strip.begin[2];
                kernels.correlate({buffer + (slice - strip.begin[0]) * plan.slice_step, plan.row_step,
                                   plan.bands.data(), static_cast<int64_t>(plan.bands.size()), plan.columns.data(),
                                   static_cast<int64_t>(plan.columns.size()), weights, num_terms, starts, member.count,
                                   strip.length(1), strip.length(2), y + place, out_size, shape.out[2]});
            }
        }
        own.trim();
    });
}

// The first and the end of the pixels of an image that the outputs of a strip see.
std::pair<int64_t, int64_t> strip_pixels(const Shape& shape, int axis, const Strip& strip) {
    int64_t behind = 1;
    for (int a = axis + 1; a < kAxes; ++a) behind *= shape.size[a];
    for (int a = 0; a < axis; ++a)
        if (shape.size[a] > 1) return {0, shape.image_size()};
    const int64_t start = strip.begin[axis] * shape.stride[axis] - shape.before[axis];
    const int64_t end = start + reach(shape, axis, strip.length(axis));
    const int64_t first = std::clamp<int64_t>(start, 0, shape.size[axis]);
    return {first * behind, std::clamp<int64_t>(end, first, shape.size[axis]) * behind};
}

void convolve_pixels(const Convolution& c, const Kernels& kernels) {
    const Shape& shape = c.shape;
    const Strips strips(shape, kPixelFloats, [&](int64_t length) {
        int64_t floats = kPanel;
        int axis = 0;
        while (axis + 1 < kAxes && shape.out[axis] == 1) ++axis;
        for (int a = 0; a < kAxes; ++a) floats *= reach(shape, a, a == axis ? length : shape.out[a]);
        return floats;
    });
    const PixelPlan plan(shape, strips.axis(), strips.length());
    const int64_t num_channels = shape.num_channels(), num_panels = ceil_div(num_channels, kPanel);
    const int64_t num_strips = strips.count(), per_panel = num_strips * shape.batch;
    const auto num_taps = static_cast<int64_t>(plan.taps.size());
    const int64_t most_outputs = ceil_div(shape.out_size(), shape.out[strips.axis()]) * strips.length();
    const int64_t products = most_outputs * num_taps * kPanel + kCopyProducts * plan.num_floats;
    const int64_t run = shape.stride[2] == 1 && shape.dilation[2] == 1 ? shape.kernel[2] : 0;
    // Where channels lie in planes, those of a panel are put side by side first, and what comes out is put back.
    const bool turns = !c.channels_last;
    const int64_t most_pixels = turns ? shape.image_size() : 0;
    share_out(num_panels * per_panel, products, [&](int64_t begin, int64_t end) {
        Room& own = room();
        int64_t decoded = -1;
        float* const weights = Room::floats(own.panel, num_taps * kPanel);
        float* const buffer = Room::floats(own.buffer, plan.num_floats + kReadBeyond);
        float* const inputs = Room::floats(own.inputs, most_pixels * kPanel);
        float* const outputs = Room::floats(own.outputs, turns ? most_outputs * kPanel : 0);
        alignas(64) float starts[kPanel] = {};
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t panel = piece / per_panel, image = piece % per_panel / num_strips, first = panel * kPanel;
            const int64_t count = std::min<int64_t>(kPanel, num_channels - first);
            if (decoded != panel) {
                own.decoder.decode(*c.operators[0], panel, weights);
                std::fill(starts, starts + kPanel, 0.0f);
                if (c.bias != nullptr) std::copy_n(c.bias + first, count, starts);
                decoded = panel;
            }
            const Strip strip = strips.strip(piece % num_strips);
            const int64_t plane = shape.image_size();
            const bool is_clear = num_strips == 1 && piece > begin;
            if (turns) {
                const auto [from, to] = strip_pixels(shape, strips.axis(), strip);
                strided::transpose(c.x + (image * num_channels + first) * plane + from, plane, inputs + from * kPanel,
                                   kPanel, to - from, count);
                plan.fill(kernels, shape, strip, is_clear, count, inputs, kPanel, buffer);
            } else {
                plan.fill(kernels, shape, strip, is_clear, count, c.x + image * plane * num_channels + first,
                          num_channels, buffer);
            }
            // Outputs of a strip follow each other.
            const int64_t place = (strip.begin[0] * shape.out[1] + strip.begin[1]) * shape.out[2] + strip.begin[2];
            const int64_t y_step = turns ? kPanel : num_channels;
            float* y = turns ? outputs : c.y + (image * shape.out_size() + place) * num_channels + first;
            const float* slice = buffer;
            for (int64_t i = 0; i < strip.length(0); ++i, slice += shape.stride[0] * plan.slice_step) {
                const float* row = slice;
                for (int64_t j = 0; j < strip.length(1); ++j, row += shape.stride[1] * plan.row_step) {
                    kernels.accumulate({row, shape.stride[2] * kPanel, plan.taps.data(), num_taps, run, weights, starts,
                                        strip.length(2), count, y, y_step});
                    y += strip.length(2) * y_step;
                }
            }
            if (turns)
                strided::transpose(outputs, kPanel, c.y + (image * num_channels + first) * shape.out_size() + place,
                                   shape.out_size(), count, strip.length(0) * strip.length(1) * strip.length(2));
        }
        own.trim();
    });
}

// Whether channels in planes are better put side by side.
bool turns_planes(const Convolution& c) {
    const Shape& shape = c.shape;
    return shape.group_channels == 1 && shape.group_outputs == 1 && c.operators.size() == 1 &&
           shape.out[2] <= kMostTurned && shape.image_size() <= kMostTurnedPixels;
}

}  // namespace

int64_t count_floats(const Shape& shape) {
    constexpr double kMost = double(int64_t{1} << 34);
    double floats = kPanel;
    int axis = 0;
    while (axis + 1 < kAxes && shape.out[axis] == 1) ++axis;
    for (int a = 0; a < kAxes; ++a) {
        const double count = a == axis ? 1.0 : static_cast<double>(shape.out[a]);
        floats *= (count - 1) * static_cast<double>(shape.stride[a]) +
                  static_cast<double>(shape.kernel[a] - 1) * static_cast<double>(shape.dilation[a]) + 1 + kPanel;
    }
    floats *= static_cast<double>(shape.group_channels);
    return floats > kMost ? -1 : static_cast<int64_t>(floats);
}

void convolve(const Convolution& convolution) {
    const Shape& shape = convolution.shape;
    if (shape.batch == 0 || shape.groups == 0 || shape.out_size() == 0) return;
    const Kernels& kernels = kernels_of(isa_of(*convolution.operators[0]));
    if (convolution.channels_last || turns_planes(convolution)) {
        convolve_pixels(convolution, kernels);
    } else {
        convolve_planar(convolution, kernels);
    }
}

}  // namespace rarefy::direct
