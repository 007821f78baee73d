// x86-64 with AVX2 and FMA.
#include "ops/vec_avx2.h"
#include "recurrent/gates.h"

namespace rarefy::recurrent {
namespace avx2 {
namespace {
using namespace ops::avx2;
#include "ops/functions.inc"
#include "recurrent/kernels.inc"
}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::kernels;

}  // namespace rarefy::recurrent
