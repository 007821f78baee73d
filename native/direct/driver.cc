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
constexpr int64_t kPlanarFloats = 6 << 10, kManyChannelsFloats = 32 << 10, kPixelFloats = 8 << 10,
                  kGroupFloats = 64 << 10;
// Products of a task, some 10 us.
constexpr int64_t kTaskProducts = int64_t{1} << 18;
// Wider rows fill the vectors of planes well.
constexpr int64_t kMostTurned = 32;
// Of an image, which a thread then holds 16 channels of: 1 MB.
constexpr int64_t kMostTurnedPixels = 1 << 14;
// What copying a number and leaving one are worth beside a product of the sum.
constexpr int64_t kCopyProducts = 4;

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
        float* const panel = own.panel.floats(num_terms * kPanel);
        float* const weights = own.weights.floats(num_terms * kPanel);
        float* const buffer = own.buffer.floats(plan.num_floats + kReadBeyond);
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

// Outputs [first, first + count) of the decoded weight, side by side in the order of `terms`, and what they begin with.
void decode_outputs(const Convolution& c, int64_t first, int64_t count, const std::vector<int64_t>& terms, Room& own,
                    float* weights, float* starts) {
    const int64_t outputs = c.operators[0]->num_outputs();
    float* const panel = own.panel.floats(c.shape.num_inputs() * kPanel);
    for (int64_t lane = 0, end; lane < count; lane = end) {
        const int64_t row = (first + lane) % outputs, from = row % kPanel;
        end = std::min({count, lane + outputs - row, lane + kPanel - from});
        own.decoder.decode(*c.operators[static_cast<size_t>((first + lane) / outputs)], row / kPanel, panel);
        for (size_t k = 0; k < terms.size(); ++k)
            std::copy_n(panel + terms[k] * kPanel + from, end - lane,
                        weights + static_cast<int64_t>(k) * kPanel + lane);
    }
    std::fill(starts, starts + kPanel, 0.0f);
    if (c.bias != nullptr) std::copy_n(c.bias + first, count, starts);
}

// 16 outputs at a time, each with what it sees of a channel side by side. Planes are first put so, and what comes out
// is put back.
void convolve_pixels(const Convolution& c, const Kernels& kernels) {
    const Shape& shape = c.shape;
    const bool is_plain = shape.group_channels == 1;
    const Strips strips(shape, is_plain ? kPixelFloats : kGroupFloats, [&](int64_t length) {
        int64_t floats = kPanel * shape.group_channels;
        int axis = 0;
        while (axis + 1 < kAxes && shape.out[axis] == 1) ++axis;
        for (int a = 0; a < kAxes; ++a) floats *= reach(shape, a, a == axis ? length : shape.out[a]);
        return floats;
    });
    const PixelPlan plan(shape, strips.axis(), strips.length());
    const int64_t num_channels = shape.num_channels(), num_outputs = shape.num_outputs();
    const int64_t num_panels = ceil_div(num_outputs, kPanel), num_strips = strips.count();
    const int64_t per_panel = num_strips * shape.batch, in_size = shape.image_size(), out_size = shape.out_size();
    const auto num_terms = static_cast<int64_t>(plan.terms.size());
    const int64_t most_outputs = ceil_div(out_size, shape.out[strips.axis()]) * strips.length();
    const int64_t products = most_outputs * num_terms * kPanel + kCopyProducts * plan.num_floats;
    const int64_t run = shape.stride[2] == 1 && shape.dilation[2] == 1 ? shape.kernel[2] : 0;
    std::vector<int64_t> tap_weights;
    for (int64_t term = 0; term < num_terms; ++term) tap_weights.push_back(term * kPanel);
    share_out(num_panels * per_panel, products, [&](int64_t begin, int64_t end) {
        Room& own = room();
        int64_t decoded = -1;
        float* const weights = own.weights.floats(num_terms * kPanel);
        float* const buffer = own.buffer.floats(plan.num_floats + kReadBeyond);
        float* const inputs = c.channels_last ? nullptr : own.inputs.floats(in_size * kPanel);
        float* const outputs = c.channels_last ? nullptr : own.outputs.floats(most_outputs * kPanel);
        alignas(64) float starts[kPanel];
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t panel = piece / per_panel, image = piece % per_panel / num_strips, first = panel * kPanel;
            const Spread spread{shape.group_channels, shape.group_outputs,
                                std::min<int64_t>(kPanel, num_outputs - first)};
            const int64_t channel = first / shape.group_outputs * shape.group_channels, count = spread.num_outputs;
            if (decoded != panel) decode_outputs(c, first, count, plan.terms, own, weights, starts);
            decoded = panel;
            const Strip strip = strips.strip(piece % num_strips);
            // Outputs of a strip follow each other.
            const int64_t place = (strip.begin[0] * shape.out[1] + strip.begin[1]) * shape.out[2] + strip.begin[2];
            const float* x = inputs;
            float* y = outputs;
            int64_t in_step = kPanel, out_step = kPanel;
            if (c.channels_last) {
                x = c.x + image * in_size * num_channels + channel;
                y = c.y + (image * out_size + place) * num_outputs + first;
                in_step = num_channels;
                out_step = num_outputs;
            } else {
                const auto [from, to] = strip_pixels(shape, strips.axis(), strip);
                strided::transpose(c.x + (image * num_channels + channel) * in_size + from, in_size,
                                   inputs + from * kPanel, kPanel, to - from, spread.num_channels());
            }
            plan.fill(kernels, shape, strip, num_strips == 1 && piece > begin, spread, x, in_step, buffer);
            const float* slice = buffer;
            for (int64_t i = 0; i < strip.length(0); ++i, slice += shape.stride[0] * plan.slice_step) {
                const int64_t width = strip.length(2), height = strip.length(1);
                kernels.accumulate({slice, plan.pixel_step, shape.stride[2] * plan.pixel_step,
                                    shape.stride[1] * plan.row_step, plan.taps.data(), tap_weights.data(), num_terms,
                                    run, weights, 0, starts, height, width, count, y, out_step, width * out_step});
                y += height * width * out_step;
            }
            if (!c.channels_last)
                strided::transpose(outputs, kPanel, c.y + (image * num_outputs + first) * out_size + place, out_size,
                                   count, strip.length(0) * strip.length(1) * strip.length(2));
        }
        own.trim();
    });
}

// Channels that lie last, each with an output, read where they lie. Taps that fall outside of the image add nothing. As
// many panels as kMostWeights numbers hold are decoded at a time, and all outputs of theirs computed.
class LastChannels {
public:
    LastChannels(const Convolution& c, const Kernels& kernels)
        : c_(c),
          kernels_(kernels),
          shape_(c.shape),
          channels_(c.shape.num_channels()),
          num_taps_(c.shape.num_inputs()),
          inner_(-shape_.before[2], shape_.stride[2], shape_.out[2], shape_.size[2] - reach(shape_, 2, 1) + 1) {}

    void run() {
        const int64_t num_panels = ceil_div(channels_, kPanel);
        const int64_t most_panels = std::max<int64_t>(1, kMostWeights / ((num_taps_ + 1) * kPanel));
        Room& own = room();
        for (int64_t panel = 0; panel < num_panels; panel += most_panels)
            run_panels(panel, std::min(num_panels, panel + most_panels), own);
        own.weights.trim();
    }

private:
    void run_panels(int64_t first, int64_t last, Room& own) {
        // What every task reads.
        float* const weights = own.weights.floats((last - first) * (num_taps_ + 1) * kPanel);
        float* const starts = weights + (last - first) * num_taps_ * kPanel;
        weights_ = weights;
        starts_ = starts;
        first_channel_ = first * kPanel;
        num_channels_ = std::min(channels_, last * kPanel) - first_channel_;
        share_out(last - first, num_taps_ * matmul::kBlockInputs * kPanel, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                room().decoder.decode(*c_.operators[0], first + i, weights + i * num_taps_ * kPanel);
        });
        std::fill_n(starts, (last - first) * kPanel, 0.0f);
        if (c_.bias != nullptr) std::copy_n(c_.bias + first_channel_, num_channels_, starts);
        share_out(shape_.batch * shape_.out[0] * shape_.out[1],
                  shape_.out[2] * (num_taps_ + kCopyProducts) * num_channels_,
                  [&](int64_t begin, int64_t end) { run_rows(begin, end); });
    }

    // Where the taps of an output along one axis fall from `start` on, and which of them in the image.
    struct Along {
        int64_t start;
        Inside taps;
        Along(const Shape& shape, int axis, int64_t output)
            : start(output * shape.stride[axis] - shape.before[axis]),
              taps(start, shape.dilation[axis], shape.kernel[axis], shape.size[axis]) {}
        bool operator==(const Along& other) const {
            return taps.begin == other.taps.begin && taps.end == other.taps.end;
        }
    };
    // Places of which each meets the same taps, from `at` in its image on.
    struct Taps {
        std::vector<int64_t> pixels, weights;
        int64_t at;
    };

    // Rows of outputs, those of an image after those of the one before.
    void run_rows(int64_t begin, int64_t end) const {
        Taps taps;
        for (int64_t count; begin < end; begin += count) {
            const int64_t first = begin % shape_.out[1], slice = begin / shape_.out[1];
            const Along depth(shape_, 0, slice % shape_.out[0]), rows(shape_, 1, first);
            const int64_t most = std::min({kMostRows, end - begin, shape_.out[1] - first});
            for (count = 1; count < most && Along(shape_, 1, first + count) == rows;) ++count;
            const int64_t image = slice / shape_.out[0];
            const auto run_places = [&](int64_t place, int64_t end_place, const Along& columns, int64_t run) {
                list_taps(depth, rows, columns, taps);
                const int64_t pixel = image * shape_.image_size() + taps.at;
                const auto num_taps = static_cast<int64_t>(taps.pixels.size());
                kernels_.accumulate({c_.x + first_channel_ + (num_taps == 0 ? 0 : pixel * channels_), channels_,
                                     shape_.stride[2] * channels_, shape_.stride[1] * shape_.size[2] * channels_,
                                     taps.pixels.data(), taps.weights.data(), num_taps, run, weights_,
                                     num_taps_ * kPanel, starts_, count, end_place - place, num_channels_,
                                     c_.y + first_channel_ + (begin * shape_.out[2] + place) * channels_, channels_,
                                     shape_.out[2] * channels_});
            };
            for (int64_t place = 0; place < shape_.out[2];) {
                const bool is_inner = place == inner_.begin && inner_.begin < inner_.end;
                const int64_t next = is_inner ? inner_.end : place + 1;
                const bool is_run = is_inner && shape_.stride[2] == 1 && shape_.dilation[2] == 1;
                run_places(place, next, Along(shape_, 2, place), is_run ? shape_.kernel[2] : 0);
                place = next;
            }
        }
    }

    void list_taps(const Along& depth, const Along& rows, const Along& columns, Taps& taps) const {
        const auto first = [&](const Along& along, int axis) {
            return along.start + along.taps.begin * shape_.dilation[axis];
        };
        taps.pixels.clear();
        taps.weights.clear();
        taps.at = (first(depth, 0) * shape_.size[1] + first(rows, 1)) * shape_.size[2] + first(columns, 2);
        for (int64_t i = depth.taps.begin; i < depth.taps.end; ++i)
            for (int64_t j = rows.taps.begin; j < rows.taps.end; ++j)
                for (int64_t k = columns.taps.begin; k < columns.taps.end; ++k) {
                    const int64_t slice = (i - depth.taps.begin) * shape_.dilation[0] * shape_.size[1];
                    const int64_t line = (slice + (j - rows.taps.begin) * shape_.dilation[1]) * shape_.size[2];
                    taps.pixels.push_back((line + (k - columns.taps.begin) * shape_.dilation[2]) * channels_);
                    taps.weights.push_back(((i * shape_.kernel[1] + j) * shape_.kernel[2] + k) * kPanel);
                }
    }

    // Side by side, so that what one reads of an image is in a first-level cache for the next.
    static constexpr int64_t kMostRows = 8;
    // 256 KB, which a second-level cache holds beside the image.
    static constexpr int64_t kMostWeights = int64_t{1} << 16;

    const Convolution& c_;
    const Kernels& kernels_;
    const Shape& shape_;
    int64_t channels_, num_taps_;
    Inside inner_;  // outputs of a row whose taps all lie in the image
    const float *weights_ = nullptr, *starts_ = nullptr;
    int64_t first_channel_ = 0, num_channels_ = 0;  // of the panels that are decoded
};

// Whether channels in planes are better put side by side.
bool turns_planes(const Shape& shape) {
    return takes_pixels(shape) && shape.out[2] <= kMostTurned && shape.image_size() <= kMostTurnedPixels;
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
    const bool is_depthwise = shape.group_channels == 1 && shape.group_outputs == 1;
    if (convolution.channels_last && is_depthwise && convolution.operators.size() == 1) {
        LastChannels(convolution, kernels).run();
    } else if (convolution.channels_last || turns_planes(shape)) {
        convolve_pixels(convolution, kernels);
    } else {
        convolve_planar(convolution, kernels);
    }
}

}  // namespace rarefy::direct
