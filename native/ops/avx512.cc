// x86-64 with AVX-512.
#include "ops/ops.h"
#include "ops/vec_avx512.h"

namespace rarefy::ops {
namespace avx512 {
namespace {
#include "ops/kernels.inc"
}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::kernels;

}  // namespace rarefy::ops
