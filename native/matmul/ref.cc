// The plain C++ kernels: what the vector kernels must compute, and what runs on CPUs that have none.
#include <cmath>
#include <cstring>

#include "matmul/kernels.h"

namespace rarefy::matmul {
namespace {

constexpr int kCodes = kBlockInputs * kPanelOutputs;

float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint64_t step_mask(const uint8_t* mask, int step, int bytes) {
    uint64_t bits = 0;
    for (int i = 0; i < bytes; ++i) bits |= static_cast<uint64_t>(mask[step * bytes + i]) << (8 * i);
    return bits;
}

// Reads a panel block by block. `Element` is what a lane holds `kColumns` of.
struct Stream {
    const uint8_t* values;
    const uint8_t* high;  // 4-bit codes under a mask: where the high nibbles are
    const uint8_t* mask;

    Stream(const PanelWeights& w, int64_t panel)
        : values(w.values + w.value_offsets[panel]),
          high(values),
          mask(w.mask == nullptr ? nullptr : w.mask + panel * w.num_blocks * kMaskBytes) {}
};

// The next block as float32, [column][output].
struct DenseF32 : Stream {
    using Stream::Stream;
    void block(float* out) {
        std::memcpy(out, values, kCodes * 4);
        values += kCodes * 4;
    }
};

struct DenseBf16 : Stream {
    using Stream::Stream;
    void block(float* out) {
        for (int i = 0; i < kCodes; ++i, values += 2) {
            uint16_t bits;
            std::memcpy(&bits, values, 2);
            out[(i / 32 * 2 + i % 2) * kPanelOutputs + i % 32 / 2] = widen(bits);
        }
    }
};

struct MaskBf16 : Stream {
    using Stream::Stream;
    void block(float* out) {
        for (int step = 0; step < 32; ++step) {
            const uint64_t bits = step_mask(mask, step, 4);
            for (int i = 0; i < 32; ++i) {
                uint16_t value = 0;
                if (bits >> i & 1) {
                    std::memcpy(&value, values, 2);
                    values += 2;
                }
                out[(step * 2 + i % 2) * kPanelOutputs + i / 2] = widen(value);
            }
        }
        mask += kMaskBytes;
    }
};

// The next block as codes, [column][output]; pruned ones are the zero point of their column's half and output.
struct DenseInt8 : Stream {
    using Stream::Stream;
    void block(const uint8_t*, uint8_t* out) {
        for (int i = 0; i < kCodes; ++i) out[(i / 64 * 4 + i % 4) * kPanelOutputs + i % 64 / 4] = *values++;
    }
};

struct DenseInt4 : Stream {
    using Stream::Stream;
    void block(const uint8_t*, uint8_t* out) {
        for (int i = 0; i < kCodes / 2; ++i, ++values) {
            const int column = i / 64 * 8 + i % 4;
            out[column * kPanelOutputs + i % 64 / 4] = *values & 15;
            out[(column + 4) * kPanelOutputs + i % 64 / 4] = *values >> 4;
        }
    }
};

template <bool kInt4>
struct MaskInt : Stream {
    using Stream::Stream;
    void block(const uint8_t* pruned, uint8_t* out) {
        for (int step = 0; step < 16; ++step) {
            const uint64_t bits = step_mask(mask, step, 8);
            for (int i = 0; i < 64; ++i) {
                uint8_t code = pruned[step / 8 * kPanelOutputs + i / 4];
                if (bits >> i & 1) {
                    if (!kInt4) {
                        code = *values++;
                    } else {
                        code = step % 2 == 0 ? *values++ & 15 : *high++ >> 4;
                    }
                }
                out[(step * 4 + i % 4) * kPanelOutputs + i / 4] = code;
            }
        }
        mask += kMaskBytes;
    }
};

template <class PanelStream>
void multiply_floats(const PanelWeights& w, const Rows& rows, const Part& part) {
    float values[kCodes];
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        PanelStream stream(w, panel);
        const int64_t left = w.num_outputs - panel * kPanelOutputs;
        const int num_outputs = static_cast<int>(left < kPanelOutputs ? left : kPanelOutputs);
        for (int64_t row = part.row_begin; row < part.row_end; ++row)
            for (int o = 0; o < num_outputs; ++o) part.y[row * part.y_stride + panel * kPanelOutputs + o] = 0.0f;
        for (int64_t block = 0; block < w.num_blocks; ++block) {
            stream.block(values);
            for (int64_t row = part.row_begin; row < part.row_end; ++row) {
                const float* x = rows.x + row * rows.stride + block * kBlockInputs;
                float sums[kPanelOutputs] = {};
                for (int column = 0; column < kBlockInputs; ++column) {
                    for (int o = 0; o < kPanelOutputs; ++o) {
                        const double product =
                            static_cast<double>(x[column]) * static_cast<double>(values[column * kPanelOutputs + o]);
                        sums[o] = static_cast<float>(product + static_cast<double>(sums[o]));
                    }
                }
                float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
                for (int o = 0; o < num_outputs; ++o) y[o] += sums[o];
            }
        }
    }
}

template <class PanelStream>
void multiply_integers(const PanelWeights& w, const Rows& rows, const Part& part) {
    uint8_t codes[kCodes];
    uint8_t zero_points[2 * kPanelOutputs];  // of each half of the block
    const int segments = 16 / w.steps_per_segment;
    const int columns = w.steps_per_segment * 4;
    for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel) {
        PanelStream stream(w, panel);
        const int64_t left = w.num_outputs - panel * kPanelOutputs;
        const int num_outputs = static_cast<int>(left < kPanelOutputs ? left : kPanelOutputs);
        for (int64_t row = part.row_begin; row < part.row_end; ++row)
            for (int o = 0; o < num_outputs; ++o) part.y[row * part.y_stride + panel * kPanelOutputs + o] = 0.0f;
        for (int64_t block = 0; block < w.num_blocks; ++block) {
            for (int half = 0; half < 2; ++half) {
                const int64_t segment = block * segments + (segments == 2 ? half : 0);
                const int64_t group = panel * w.num_groups + segment / w.segments_per_group;
                for (int o = 0; o < kPanelOutputs; ++o)
                    zero_points[half * kPanelOutputs + o] = w.zero_points == nullptr
                                                                ? static_cast<uint8_t>(w.zero_point)
                                                                : w.zero_points[group * kPanelOutputs + o];
            }
            stream.block(zero_points, codes);
            for (int64_t row = part.row_begin; row < part.row_end; ++row) {
                const int8_t* q = rows.q + row * rows.stride + block * kBlockInputs;
                float* y = part.y + row * part.y_stride + panel * kPanelOutputs;
                const float row_scale = rows.scales[row * rows.num_blocks + block];
                const int32_t* half_sums = rows.sums + (row * rows.num_blocks + block) * 2;
                for (int part_of_block = 0; part_of_block < segments; ++part_of_block) {
                    const int first = part_of_block * columns;
                    const int32_t sum = segments == 2 ? half_sums[part_of_block] : half_sums[0] + half_sums[1];
                    int32_t dots[kPanelOutputs] = {};
                    for (int column = first; column < first + columns; ++column)
                        for (int o = 0; o < kPanelOutputs; ++o)
                            dots[o] += q[column] * codes[column * kPanelOutputs + o];
                    const int64_t segment = block * segments + part_of_block;
                    const uint16_t* scales =
                        w.scales + (panel * w.num_groups + segment / w.segments_per_group) * kPanelOutputs;
                    for (int o = 0; o < num_outputs; ++o) {
                        const int32_t level = dots[o] - zero_points[part_of_block * kPanelOutputs + o] * sum;
                        y[o] = std::fma(static_cast<float>(level), row_scale * widen(scales[o]), y[o]);
                    }
                }
            }
        }
    }
}

}  // namespace

void dense_f32_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_floats<DenseF32>(w, rows, part);
}
void dense_bf16_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_floats<DenseBf16>(w, rows, part);
}
void mask_bf16_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_floats<MaskBf16>(w, rows, part);
}
void dense_int8_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_integers<DenseInt8>(w, rows, part);
}
void dense_int4_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_integers<DenseInt4>(w, rows, part);
}
void mask_int8_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_integers<MaskInt<false>>(w, rows, part);
}
void mask_int4_reference(const PanelWeights& w, const Rows& rows, const Part& part) {
    multiply_integers<MaskInt<true>>(w, rows, part);
}

void quantize_row_reference(const float* x, int64_t num_inputs, int8_t* q, int16_t* wide_q, float* scales,
                            int32_t* sums) {
    for (int64_t begin = 0, block = 0; begin < num_inputs; begin += kBlockInputs, ++block) {
        const int size = static_cast<int>(num_inputs - begin < kBlockInputs ? num_inputs - begin : kBlockInputs);
        float amax = 0.0f;
        bool finite = true;
        for (int i = 0; i < size; ++i) {
            const float magnitude = std::fabs(x[begin + i]);
            finite &= std::isfinite(magnitude);
            if (magnitude > amax) amax = magnitude;
        }
        const float inverse = amax > 0.0f ? 127.0f / amax : INFINITY;
        const bool usable = finite && std::isfinite(inverse);
        int8_t* out = q + begin;
        int32_t half_sums[2] = {0, 0};
        for (int i = 0; i < kBlockInputs; ++i) {
            const float rounded = usable && i < size ? std::nearbyint(x[begin + i] * inverse) : 0.0f;
            out[i] = static_cast<int8_t>(rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
            half_sums[i / 32] += out[i];
        }
        scales[block] = !finite ? NAN : usable ? amax / 127.0f : 0.0f;
        sums[2 * block] = half_sums[0];
        sums[2 * block + 1] = half_sums[1];
        if (wide_q == nullptr) continue;
        for (int step = 0; step < 16; ++step) {
            const int8_t* from = out + step * 4;
            int16_t* to = wide_q + begin + step * 4;
            to[0] = from[0];
            to[1] = from[2];
            to[2] = from[1];
            to[3] = from[3];
        }
    }
}

}  // namespace rarefy::matmul
