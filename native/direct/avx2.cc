// x86-64 with AVX2 and FMA.
#include "direct/direct.h"
#include "ops/vec_avx2.h"

namespace rarefy::direct {
namespace {
using namespace ops::avx2;

// Vectors of sums of each of four rows or outputs, and of one row of one output: of 16 registers.
constexpr int kVectors = 2, kAloneVectors = 6;

inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }

#include "direct/kernels.inc"
}  // namespace

const Kernels kAvx2Kernels = kernels;

}  // namespace rarefy::direct
