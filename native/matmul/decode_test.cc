// The numbers that one-hot rows give (decode.h), against what the samples were made of: every kernel of every
// instruction set, panels cut short, and a decoder that goes from weight to weight. Made to run under sanitizers.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "matmul/checks.h"
#include "matmul/decode.h"

namespace {

using namespace rarefy;
using matmul::Sample;
using matmul::SampleSpec;
using matmul::Weights;

constexpr int64_t kLanes = matmul::kPanelOutputs;

float value_of(const Sample& sample, size_t at) {
    if (sample.levels.empty()) return sample.floats[at];
    return static_cast<float>(sample.levels[at]) * sample.level_scales[at];
}

void test_decoding() {
    constexpr struct {
        int64_t outputs, inputs, group_size;
        bool symmetric;
        double density;
    } kCases[] = {{1, 1, 0, true, 0.5},     {16, 64, 64, true, 0.5},  {17, 9, 0, false, 0.5},
                  {33, 65, 32, false, 0.3}, {5, 200, 64, true, 0.1},  {40, 128, 96, false, 0.9},
                  {35, 320, 0, false, 0.0}, {20, 1100, 64, true, 0.2}};
    matmul::Decoder decoder;  // of all of them, as a thread has one
    for (const checks::TestedFormat& tested : checks::tested_formats()) {
        for (const auto& c : kCases) {
            SampleSpec spec{tested.format, c.outputs, c.inputs, c.group_size, c.symmetric, c.density, 7};
            const Sample sample = matmul::make_sample(spec);
            for (const matmul::Isa isa : tested.isas) {
                const matmul::Operator by(std::make_shared<const Weights>(sample.packed(), isa));
                bool passed = true;
                for (int64_t panel = 0; panel * kLanes < c.outputs; ++panel) {
                    std::vector<float> numbers(static_cast<size_t>(c.inputs * kLanes), 12345.0f);
                    decoder.decode(by, panel, numbers.data());
                    for (int64_t input = 0; input < c.inputs; ++input) {
                        for (int64_t lane = 0; lane < kLanes; ++lane) {
                            const int64_t output = panel * kLanes + lane;
                            const float expected =
                                output < c.outputs ? value_of(sample, static_cast<size_t>(output * c.inputs + input))
                                                   : 0.0f;
                            passed &= numbers[static_cast<size_t>(input * kLanes + lane)] == expected;
                        }
                    }
                }
                checks::check(passed, "decoded " + checks::described(tested.format, isa, c.outputs, c.inputs, 1));
            }
        }
    }
}

}  // namespace

int main() {
    test_decoding();
    return checks::summary_of_isas();
}
