// The steps of a recurrent layer as a caller asks for them, and whether sizes and lengths fit together: bindings and
// fuzz.cc go through this, and what it lets through the driver trusts.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "recurrent/recurrent.h"

namespace rarefy::recurrent {

// Any numbers. What is missing was not given.
struct Request {
    int mode;
    const matmul::Operator *meet_hidden, *project;
    std::array<int64_t, 3> x;  // the sizes of each array
    std::optional<int64_t> input_bias, hidden_bias;
    std::array<int64_t, 2> hidden;
    std::optional<std::array<int64_t, 2>> cell;
    std::optional<int64_t> num_lengths;
    const int64_t* lengths;
};

// The layer but for its biases. Throws std::invalid_argument.
Layer checked(const Request& request);

}  // namespace rarefy::recurrent
