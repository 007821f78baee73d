// Any CPU.
#include "ops/vec_ref.h"
#include "recurrent/gates.h"

namespace rarefy::recurrent {
namespace ref {
namespace {
using namespace ops::ref;
#include "ops/functions.inc"
#include "recurrent/kernels.inc"
}  // namespace
}  // namespace ref

const Kernels kRefKernels = ref::kernels;

}  // namespace rarefy::recurrent
