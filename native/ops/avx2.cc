// x86-64 with AVX2 and FMA.
#include "ops/ops.h"
#include "ops/vec_avx2.h"

namespace rarefy::ops {
namespace avx2 {
namespace {
#include "ops/kernels.inc"
}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::kernels;

}  // namespace rarefy::ops
