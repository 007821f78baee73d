// Declares every kernel and every quantizer of the list.
#pragma once

#include "matmul/contract.h"

// The instruction sets of an encoding: each list calls macro(name, isa) once for each. The last two on x86-64 need a
// recent compiler (CMakeLists.txt).
#if RAREFY_AVX_VNNI
#define RAREFY_AVX_VNNI_ISA(macro, name) macro(name, avx_vnni)
#else
#define RAREFY_AVX_VNNI_ISA(macro, name)
#endif
#if RAREFY_AMX
#define RAREFY_AMX_ISA(macro, name) macro(name, amx)
#else
#define RAREFY_AMX_ISA(macro, name)
#endif
#if RAREFY_X86
#define RAREFY_EVERY_ISA(macro, name)                                                             \
    macro(name, reference) macro(name, avx2) RAREFY_AVX_VNNI_ISA(macro, name) macro(name, avx512) \
        RAREFY_AMX_ISA(macro, name)
#elif RAREFY_ARM
#define RAREFY_EVERY_ISA(macro, name) macro(name, reference) macro(name, neon)
#else
#define RAREFY_EVERY_ISA(macro, name) macro(name, reference)
#endif

namespace rarefy::matmul {

#define RAREFY_DECLARE(name, isa)                             \
    namespace isa {                                           \
    void name(const PanelWeights&, const Rows&, const Part&); \
    }
#define RAREFY_ENCODING(name, values, isas, ...) RAREFY_##isas(RAREFY_DECLARE, name)
#include "matmul/kernels.inc"
#undef RAREFY_DECLARE

// Quantizes one row of `num_inputs` numbers in blocks of 64 columns: amax = max |x|, inv = 127 / amax,
// q = rint(x * inv) half to even, scale = amax / 127. A block whose amax is 0 or makes inv overflow becomes zeros with
// scale 0; one with a NaN or an infinity becomes zeros with scale NaN, which makes all outputs of the row NaN.
// Writes whole blocks of q, the sums of q of each half block and, unless null, wide_q, which quantize_row_avx512
// and quantize_row_neon ignore.
using QuantizeFunction = void (*)(const float* x, int64_t num_inputs, int8_t* q, int16_t* wide_q, float* scales,
                                  int32_t* sums);
void quantize_row_reference(const float*, int64_t, int8_t*, int16_t*, float*, int32_t*);
#if RAREFY_X86
void quantize_row_avx2(const float*, int64_t, int8_t*, int16_t*, float*, int32_t*);
void quantize_row_avx512(const float*, int64_t, int8_t*, int16_t*, float*, int32_t*);
#elif RAREFY_ARM
void quantize_row_neon(const float*, int64_t, int8_t*, int16_t*, float*, int32_t*);
#endif

}  // namespace rarefy::matmul
