#include "matmul/decode.h"

#include <algorithm>
#include <cstring>

namespace rarefy::matmul {
namespace {

constexpr int kByteStart = -kByteZeroPoint;
constexpr uint16_t kOneBits = 0x3f80;  // 1 in bfloat16

// Of the columns 0, 1, 2, 3 of a step, as quantize_row_avx2 writes them for wide_q.
constexpr int kWidePlace[] = {0, 2, 1, 3};

}  // namespace

void Decoder::decode(const Operator& by, int64_t panel, float* numbers) {
    if (by.weights() != nullptr) return decode_weights(*by.weights(), panel, numbers);
    const Operator &first = by.part(0), &second = by.part(1);
    const int64_t num_inputs = by.num_inputs();
    if (by.num_runs() == 0) {
        std::vector<float> terms(static_cast<size_t>(num_inputs * kPanelOutputs));
        decode(first, panel, numbers);
        decode(second, panel, terms.data());
        for (size_t i = 0; i < terms.size(); ++i) numbers[i] += terms[i];
        return;
    }
    // Every run of the inputs meets `first`, whose outputs are inputs of `second`.
    const int64_t rank = first.num_outputs(), run = first.num_inputs();
    std::vector<float> outer(static_cast<size_t>(second.num_inputs() * kPanelOutputs));
    std::vector<float> inner(static_cast<size_t>(run * kPanelOutputs));
    decode(second, panel, outer.data());
    std::fill_n(numbers, num_inputs * kPanelOutputs, 0.0f);
    for (int64_t begin = 0; begin < rank; begin += kPanelOutputs) {
        decode(first, begin / kPanelOutputs, inner.data());
        const int64_t count = std::min<int64_t>(kPanelOutputs, rank - begin);
        for (int64_t i = 0; i < num_inputs; ++i) {
            const float* const from = inner.data() + i % run * kPanelOutputs;
            const float* const by_rank = outer.data() + (i / run * rank + begin) * kPanelOutputs;
            float* const to = numbers + i * kPanelOutputs;
            for (int64_t r = 0; r < count; ++r)
                for (int lane = 0; lane < kPanelOutputs; ++lane)
                    to[lane] += from[r] * by_rank[r * kPanelOutputs + lane];
        }
    }
}

void Decoder::decode_weights(const Weights& weights, int64_t panel, float* numbers) {
    const PanelWeights& view = weights.view();
    const int64_t lanes = std::min<int64_t>(kPanelOutputs, view.num_outputs - panel * kPanelOutputs);
    if (lanes < kPanelOutputs) std::fill_n(numbers, view.num_inputs * kPanelOutputs, 0.0f);
    if (view.num_blocks == 0) return;
    const Form form = weights.is_integer() ? Form::integers : weights.is_bf16() ? Form::bf16 : Form::floats;
    if (form != form_ || view.num_blocks != num_blocks_) prepare(form, view.num_blocks);
    Rows rows = rows_;
    if (weights.isa() != Isa::avx2) rows.wide_q = nullptr;
    if (weights.isa() < Isa::avx512) {
        rows.bf16_x = nullptr;
        rows.byte_starts = nullptr;
    } else if (form == Form::bf16 && weights.isa() > Isa::avx512) {
        rows.x = nullptr;
    }
    // Kernels write output o of y at y[o]: panel 0 would begin before the numbers.
    const auto before = static_cast<uintptr_t>(panel) * kPanelOutputs * sizeof(float);
    for (int64_t block = 0; block < view.num_blocks; ++block) {
        if (block != block_) {
            if (block_ >= 0) set_ones(form, block_, false);
            set_ones(form, block, true);
            block_ = block;
        }
        rows.num_rows = std::min<int64_t>(kBlockInputs, view.num_inputs - block * kBlockInputs);
        float* const to = numbers + block * kBlockInputs * kPanelOutputs;
        auto* const y = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(to) - before);
        weights.kernel()(view, rows, {panel, panel + 1, 0, rows.num_rows, y, kPanelOutputs, 0});
    }
}

void Decoder::prepare(Form form, int64_t num_blocks) {
    const int64_t stride = num_blocks * kBlockInputs, count = kBlockInputs * stride;
    const int64_t blocks = kBlockInputs * num_blocks;
    const bool integers = form == Form::integers;
    form_ = Form::none;  // should the memory be refused
    // Whole lines each, so that all are aligned.
    const int64_t bytes = kBlockInputs * 4 + (integers ? count * 3 + blocks * 16 : count * 6);
    uint8_t* memory = scratch_.reserve(bytes);
    std::memset(memory, 0, static_cast<size_t>(bytes));
    rows_ = Rows{};
    rows_.stride = stride;
    rows_.num_blocks = num_blocks;
    rows_.starts = reinterpret_cast<float*>(memory);
    memory += kBlockInputs * 4;
    if (integers) {
        rows_.q = q_ = reinterpret_cast<int8_t*>(memory);
        rows_.wide_q = wide_q_ = reinterpret_cast<int16_t*>(memory + count);
        auto* const scales = reinterpret_cast<float*>(memory + count * 3);
        std::fill_n(scales, blocks, 1.0f);
        rows_.scales = scales;
        rows_.sums = sums_ = reinterpret_cast<int32_t*>(memory + count * 3 + blocks * 4);
        rows_.byte_starts = byte_starts_ = reinterpret_cast<int32_t*>(memory + count * 3 + blocks * 12);
    } else {
        rows_.x = x_ = reinterpret_cast<float*>(memory);
        rows_.bf16_x = bits_ = reinterpret_cast<uint16_t*>(memory + count * 4);
    }
    form_ = form;
    num_blocks_ = num_blocks;
    block_ = -1;
}

void Decoder::set_ones(Form form, int64_t block, bool on) {
    for (int64_t row = 0; row < kBlockInputs; ++row) {
        const int64_t at = row * rows_.stride + block * kBlockInputs;
        if (form != Form::integers) {
            x_[at + row] = on ? 1.0f : 0.0f;
            bits_[at + row] = on ? kOneBits : 0;
            continue;
        }
        const int64_t place = row * num_blocks_ + block;
        q_[at + row] = on;
        wide_q_[at + row / 4 * 4 + kWidePlace[row % 4]] = on;
        sums_[2 * place + row / (kBlockInputs / 2)] = on;
        byte_starts_[place] = on ? kByteStart : 0;
    }
}

}  // namespace rarefy::matmul
