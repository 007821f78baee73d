// x86-64 with AVX-512.
#include "direct/direct.h"
#include "ops/vec_avx512.h"

namespace rarefy::direct {
namespace {
using namespace ops::avx512;

// Vectors of sums of each of four rows or outputs, and of one row of one output: of 32 registers.
constexpr int kVectors = 4, kAloneVectors = 6;

inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }

#include "direct/kernels.inc"
}  // namespace

const Kernels kAvx512Kernels = kernels;

}  // namespace rarefy::direct
