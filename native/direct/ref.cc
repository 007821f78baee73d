// Any CPU.
#include <cstring>

#include "direct/direct.h"
#include "ops/vec_ref.h"

namespace rarefy::direct {
namespace {
using namespace ops::ref;

// Vectors of sums of each of four rows or outputs, and of one row of one output.
constexpr int kVectors = 2, kAloneVectors = 4;

// a * b + c rounded once, as the others' instruction does; std::fma is a slow library call where the baseline target
// has none. The product is exact in double precision. Their sum is rounded to odd, so that rounding it to float is as
// good as rounding the exact one.
inline float fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, term = c, sum = product + term;
    const double part = sum - product, error = (product - (sum - part)) + (term - part);
    if (!(error > 0.0 || error < 0.0)) return static_cast<float>(sum);
    int64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if (bits % 2 == 0) bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return static_cast<float>(odd);
}
inline Vec fused(Vec a, Vec b, Vec c) {
    return map([&](int i) { return fused(a.v[i], b.v[i], c.v[i]); });
}

#include "direct/kernels.inc"
}  // namespace

const Kernels kRefKernels = kernels;

}  // namespace rarefy::direct
