// ARM with NEON.
#include "ops/ops.h"
#include "ops/vec_neon.h"

namespace rarefy::ops {
namespace neon {
namespace {
#include "ops/kernels.inc"
}  // namespace
}  // namespace neon

const Kernels kNeonKernels = neon::kernels;

}  // namespace rarefy::ops
