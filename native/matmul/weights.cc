#include "matmul/weights.h"

#include <stdexcept>

#include "matmul/dispatch.h"

namespace rarefy::matmul {
namespace {

struct Description {
    const char* format;
    Encoding encoding;
    Values values;
};

Description describe(const std::string& format) {
    constexpr struct {
        const char* formats[8];
        Encoding encoding;
        Values values;
    } kEncodings[] = {
#define RAREFY_ENCODING(name, values, isas, ...) {{__VA_ARGS__}, Encoding::name, Values::values},
#include "matmul/kernels.inc"
    };
    for (const auto& row : kEncodings) {
        for (const char* const name : row.formats)
            if (name != nullptr && format == name) return {name, row.encoding, row.values};
    }
    throw std::invalid_argument("unknown weight format " + format);
}

}  // namespace

Weights::Weights(const PackedArrays& arrays, Isa isa, MaskedCodes masked_codes) : isa_(isa) {
    const Description description = describe(arrays.format);
    values_ = description.values;
    kernel_ = find_kernel(description.encoding, isa);
    Packing packing(arrays, isa, masked_codes, view_);
    if (is_integer()) packing.pack_scales(code_bits());
    packing.pack(description.encoding);
    encoding_ = packing.encoding();
    kernel_ = find_kernel(encoding_, isa);
    packing.check_all_taken();
    num_bytes_ = packing.num_bytes();
    num_read_bytes_ = packing.num_read_bytes();
    memory_ = packing.release_memory();
}

}  // namespace rarefy::matmul
