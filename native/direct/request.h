// A convolution as a caller asks for it, and whether its numbers fit together: bindings and fuzz.cc go through this,
// and what it lets through the driver trusts.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "direct/driver.h"

namespace rarefy::direct {

// convolve() or convolve_patches().
enum class Way { taps, patches };

// Any numbers. Those of `kernel` to `out` are of the spatial axes, one to three.
struct Request {
    Way way;
    std::vector<int64_t> x;  // sizes: batch and channels, or batch, with the spatial ones behind, and channels last
    std::vector<const matmul::Operator*> operators;
    int64_t groups;
    std::vector<int64_t> kernel, stride, dilation, before, out;
    bool channels_last;
    std::optional<int64_t> num_biases;  // nothing: there is no bias
};

// The convolution but for its arrays. Throws std::invalid_argument.
Convolution checked(const Request& request);

// Sizes of the result.
std::vector<int64_t> sizes_of_output(const Request& request, const Convolution& checked);

}  // namespace rarefy::direct
