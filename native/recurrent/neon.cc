// ARM with NEON.
#include "ops/vec_neon.h"
#include "recurrent/gates.h"

namespace rarefy::recurrent {
namespace neon {
namespace {
using namespace ops::neon;
#include "ops/functions.inc"
#include "recurrent/kernels.inc"
}  // namespace
}  // namespace neon

const Kernels kNeonKernels = neon::kernels;

}  // namespace rarefy::recurrent
