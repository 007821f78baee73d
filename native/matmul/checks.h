// What the test programs of the products share: the kernels that this machine runs, random rows, products with a guard
// behind their outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/cpu.h"
#include "matmul/dispatch.h"
#include "matmul/samples.h"
#include "matmul/weights.h"

namespace rarefy::checks {

inline bool runs(matmul::Isa isa) { return matmul::can_run(isa, common::detect_cpu()); }

// A format and the instruction sets to test it with, the reference first. By formats, so that samples, rows and what
// is expected of them are made once for all instruction sets: in an emulator that takes longer than the kernels.
struct TestedFormat {
    std::string format;
    std::vector<matmul::Isa> isas;
};

inline std::vector<TestedFormat> tested_formats() {
    std::vector<TestedFormat> formats;
    for (const matmul::ListedKernel& kernel : matmul::list_kernels()) {
        if (!runs(kernel.isa)) continue;
        auto at = std::find_if(formats.begin(), formats.end(),
                               [&](const TestedFormat& tested) { return tested.format == kernel.format; });
        if (at == formats.end()) at = formats.insert(at, {kernel.format, {}});
        at->isas.push_back(kernel.isa);
        if (kernel.isa == matmul::Isa::reference) std::swap(at->isas.front(), at->isas.back());
    }
    return formats;
}

// In every arrangement that an instruction set has for codes under a mask.
inline std::vector<std::unique_ptr<matmul::Weights>> packed_for(const std::vector<matmul::Isa>& isas,
                                                                const matmul::Sample& sample) {
    using matmul::MaskedCodes;
    std::vector<std::unique_ptr<matmul::Weights>> all;
    const matmul::PackedArrays packed = sample.packed();
    const bool has_codes = packed.format.rfind("bitmask-int", 0) == 0 || packed.format.rfind("nm-int", 0) == 0;
    for (const matmul::Isa isa : isas) {
        std::vector<std::pair<matmul::Encoding, int64_t>> seen;
        for (const MaskedCodes masked : {MaskedCodes::singles, MaskedCodes::all, MaskedCodes::pairs}) {
            if (masked != MaskedCodes::singles && !has_codes) break;
            if (masked == MaskedCodes::pairs && isa < matmul::Isa::avx512) break;
            auto weights = std::make_unique<matmul::Weights>(packed, isa, masked);
            const std::pair<matmul::Encoding, int64_t> arrangement{weights->encoding(), weights->view().parameter};
            if (std::find(seen.begin(), seen.end(), arrangement) != seen.end()) break;
            seen.push_back(arrangement);
            all.push_back(std::move(weights));
        }
    }
    return all;
}

inline std::vector<float> product(const matmul::Weights& weights, const std::vector<float>& x, int64_t num_rows,
                                  int64_t num_inputs) {
    // One element more than needed, to see that nothing is written behind the last output.
    const auto size = static_cast<size_t>(num_rows * weights.view().num_outputs);
    std::vector<float> y(size + 1, 12345.0f);
    matmul::multiply(x.data(), num_rows, num_inputs, {{&weights, y.data()}});
    check(y.back() == 12345.0f, "nothing is written behind the outputs");
    y.pop_back();
    return y;
}

// "dense-int4-v1 on avx2, 17 x 65, rows 7"
inline std::string described(const std::string& format, matmul::Isa isa, int64_t num_outputs, int64_t num_inputs,
                             int64_t num_rows) {
    return format + " on " + matmul::name(isa) + ", " + std::to_string(num_outputs) + " x " +
           std::to_string(num_inputs) + ", rows " + std::to_string(num_rows);
}

// With the instruction sets that were tested.
inline int summary_of_isas() {
    std::string isas = ", on";
    for (const matmul::Isa isa : matmul::kIsas)
        if (runs(isa)) isas += std::string(" ") + matmul::name(isa);
    return summary(isas);
}

}  // namespace rarefy::checks
