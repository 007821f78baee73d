// For fuzz programs: weights of any format that are as they should be, or damaged, and numbers beyond reason.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/fuzz.h"
#include "matmul/dispatch.h"
#include "matmul/samples.h"
#include "matmul/weights.h"

namespace rarefy::matmul {

constexpr int64_t kMaxNumber = std::numeric_limits<int64_t>::max();

struct Machine {
    std::vector<std::string> formats;
    std::vector<Isa> isas;
    Machine() {
        for (const ListedKernel& kernel : list_kernels()) {
            if (std::find(formats.begin(), formats.end(), kernel.format) == formats.end())
                formats.push_back(kernel.format);
            if (std::find(isas.begin(), isas.end(), kernel.isa) != isas.end()) continue;
            try {
                isas.push_back(runnable_isa(name(kernel.isa)));
            } catch (const std::invalid_argument&) {
                continue;
            }
        }
    }
    const std::string& format(fuzz::Input& input) const {
        return formats[static_cast<size_t>(input.between(0, static_cast<int64_t>(formats.size()) - 1))];
    }
};

inline int64_t wild_number(fuzz::Input& input) {
    if (input.one_in(2)) return input.between(-2, 300);
    const int64_t number = input.pick<int64_t>({kMaxNumber, -kMaxNumber - 1, -1, int64_t{1} << 31,
                                                (int64_t{1} << 31) - 1, int64_t{1} << 32, (int64_t{1} << 24) - 1,
                                                int64_t{1} << 48, int64_t{1} << 62, 4096, 65536, 48, 32, 64});
    return number == kMaxNumber || number == -kMaxNumber - 1 ? number : number + input.pick<int64_t>({0, 0, -1, 1});
}

// Wraps around instead of overflowing.
inline int64_t shifted(int64_t number, int64_t by) {
    return static_cast<int64_t>(static_cast<uint64_t>(number) + static_cast<uint64_t>(by));
}

inline SampleSpec random_spec(fuzz::Input& input, const Machine& machine) {
    SampleSpec spec{machine.format(input), input.size(80), input.size(400), 0, false, 0.5, 0};
    if (input.one_in(4)) spec.num_inputs = kBlockInputs * input.between(0, 6);
    spec.group_size = input.pick<int64_t>({0, 32, 64, 96, 128, 160, 256, 1024});
    spec.symmetric = input.one_in(2);
    spec.density = input.pick({0.0, 0.05, 0.125, 0.5, 0.9, 1.0});
    spec.seed = static_cast<unsigned>(input.bits(4));
    spec.group = input.pick({64, 64, 64, 32, 16, 8, 4, 2, 1, 12, 5});
    spec.keep = static_cast<int>(input.between(1, spec.group));
    return spec;
}

inline void damage_array(fuzz::Input& input, Sample& sample) {
    if (sample.arrays.empty()) return;
    const auto last = static_cast<int64_t>(sample.arrays.size()) - 1;
    const auto at = static_cast<size_t>(input.between(0, last));
    SampleArray& array = sample.arrays[at];
    const auto size = static_cast<int64_t>(array.bytes.size());
    std::mt19937 random(static_cast<unsigned>(input.bits(4)));
    switch (input.between(0, 8)) {
        case 0:
        case 1:  // some bytes
            for (int64_t i = input.between(1, 8); i > 0 && size > 0; --i)
                array.bytes[random() % array.bytes.size()] = static_cast<uint8_t>(random());
            break;
        case 2:  // all bytes
            for (uint8_t& byte : array.bytes) byte = static_cast<uint8_t>(random());
            break;
        case 3: {  // bfloat16 or float32 that are not finite, or bits all alike
            const uint16_t word = input.pick<uint16_t>({0x7f80, 0xff80, 0x7fc0, 0xffff, 0, 0x7f7f, 0x0001});
            const int64_t begin = size / 2 > 0 ? 2 * input.between(0, size / 2 - 1) : size;
            for (int64_t i = begin; i + 1 < size && (i < begin + 64 || input.one_in(4)); i += 2)
                std::memcpy(array.bytes.data() + i, &word, 2);
            break;
        }
        case 4: array.bytes.resize(static_cast<size_t>(input.between(0, size))); break;
        case 5: array.bytes.resize(static_cast<size_t>(std::max<int64_t>(0, size + input.between(-3, 70)))); break;
        case 6: array.element = static_cast<Element>(input.between(0, static_cast<int64_t>(Element::other))); break;
        case 7: sample.arrays.erase(sample.arrays.begin() + static_cast<std::ptrdiff_t>(at)); break;
        default:  // twice, or under another array's name
            sample.arrays.push_back(array);
            sample.arrays.back().name = sample.arrays[static_cast<size_t>(input.between(0, last))].name;
    }
}

// The formats' integers, and their names for the arrays, are few: those of another format are worth a try.
inline void damage_numbers(fuzz::Input& input, Sample& sample, const Machine& machine) {
    switch (input.between(0, 5)) {
        case 0:
            sample.num_outputs =
                input.one_in(2) ? wild_number(input) : shifted(sample.num_outputs, input.between(-20, 20));
            break;
        case 1:
            sample.num_inputs =
                input.one_in(2) ? wild_number(input) : shifted(sample.num_inputs, input.between(-70, 70));
            break;
        case 2: sample.format = machine.format(input); break;
        case 3:
            sample.integers.push_back(
                {input.pick({"group_size", "keep", "group", "scaled", "block_shape_0", "block_shape_1", "rank"}),
                 wild_number(input)});
            break;
        default: {
            if (sample.integers.empty()) break;
            const auto at = static_cast<size_t>(input.between(0, static_cast<int64_t>(sample.integers.size()) - 1));
            if (input.one_in(6))
                sample.integers.erase(sample.integers.begin() + static_cast<std::ptrdiff_t>(at));
            else
                sample.integers[at].value = wild_number(input);
        }
    }
}

// A sample with so many damages, in memory of exactly its size.
struct Hostile {
    PackedArrays packed;
    bool is_damaged;

    Hostile(fuzz::Input& input, const Machine& machine, const SampleSpec& spec, int64_t num_damages)
        : is_damaged(num_damages > 0), sample_(make_sample(spec)) {
        for (int64_t i = 0; i < num_damages; ++i) {
            if (input.between(0, 2) == 0)
                damage_numbers(input, sample_, machine);
            else
                damage_array(input, sample_);
        }
        packed = sample_.packed();
        for (size_t i = 0; i < packed.arrays.size(); ++i) {
            exact_.emplace_back(sample_.arrays[i].bytes, static_cast<size_t>(input.between(0, 3)));
            packed.arrays[i].bytes = is_damaged && input.one_in(200) ? nullptr : exact_.back().data();
        }
    }
    // Null where it is refused.
    std::shared_ptr<const Weights> weights(Isa isa, MaskedCodes masked = MaskedCodes::fastest) const {
        try {
            return std::make_shared<const Weights>(packed, isa, masked);
        } catch (const std::invalid_argument& error) {
            if (!is_damaged) fuzz::fail(packed.format + ": refused, " + error.what());
        } catch (const std::bad_alloc&) {
        }
        return nullptr;
    }

private:
    Sample sample_;
    std::vector<fuzz::Exact<uint8_t>> exact_;
};

}  // namespace rarefy::matmul
