// x86-64 with AVX-512.
#include "ops/vec_avx512.h"
#include "recurrent/gates.h"

namespace rarefy::recurrent {
namespace avx512 {
namespace {
using namespace ops::avx512;
#include "ops/functions.inc"
#include "recurrent/kernels.inc"
}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::kernels;

}  // namespace rarefy::recurrent
