// Any CPU.
#include "ops/ops.h"
#include "ops/vec_ref.h"

namespace rarefy::ops {
namespace ref {
namespace {
#include "ops/kernels.inc"
}  // namespace
}  // namespace ref

const Kernels kRefKernels = ref::kernels;

}  // namespace rarefy::ops
