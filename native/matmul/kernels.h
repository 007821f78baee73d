// Declares every kernel and every quantizer of the list.
#pragma once

#include "matmul/contract.h"

// The instruction sets of an encoding: each list calls macro(name, isa, namespace of the kernel) once for each. Those
// of x86-64 behind AVX2 need a recent compiler (CMakeLists.txt). Where nothing is bfloat16, avx512_bf16 is avx512.
#if RAREFY_AVX_VNNI
#define RAREFY_AVX_VNNI_ISA(macro, name) macro(name, avx_vnni, avx_vnni)
#else
#define RAREFY_AVX_VNNI_ISA(macro, name)
#endif
#if RAREFY_AVX512_BF16
#define RAREFY_AVX512_BF16_ISA(macro, name, space) macro(name, avx512_bf16, space)
#else
#define RAREFY_AVX512_BF16_ISA(macro, name, space)
#endif
#if RAREFY_AMX
#define RAREFY_AMX_ISA(macro, name) macro(name, amx, amx)
#else
#define RAREFY_AMX_ISA(macro, name)
#endif
#if RAREFY_X86
#define RAREFY_X86_ISAS(macro, name, bf16_space)                                               \
    macro(name, reference, reference) macro(name, avx2, avx2) RAREFY_AVX_VNNI_ISA(macro, name) \
        macro(name, avx512, avx512) RAREFY_AVX512_BF16_ISA(macro, name, bf16_space) RAREFY_AMX_ISA(macro, name)
#define RAREFY_EVERY_ISA(macro, name) RAREFY_X86_ISAS(macro, name, avx512)
#define RAREFY_EVERY_ISA_AND_BF16(macro, name) RAREFY_X86_ISAS(macro, name, avx512_bf16)
#else
#if RAREFY_ARM
#define RAREFY_EVERY_ISA(macro, name) macro(name, reference, reference) macro(name, neon, neon)
#else
#define RAREFY_EVERY_ISA(macro, name) macro(name, reference, reference)
#endif
#define RAREFY_EVERY_ISA_AND_BF16(macro, name) RAREFY_EVERY_ISA(macro, name)
#endif

namespace rarefy::matmul {

#define RAREFY_DECLARE(name, isa, space)                      \
    namespace space {                                         \
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

// Rounds one row of `num_inputs` numbers to bfloat16, the nearest, half to even; numbers below 2^-126 become zeros, a
// NaN or an infinity stays one. Writes whole blocks, of their bits and of the numbers, unless null.
using RoundFunction = void (*)(const float* x, int64_t num_inputs, uint16_t* bits, float* numbers);
void round_row_reference(const float*, int64_t, uint16_t*, float*);
#if RAREFY_X86
void round_row_avx2(const float*, int64_t, uint16_t*, float*);
void round_row_avx512(const float*, int64_t, uint16_t*, float*);
#elif RAREFY_ARM
void round_row_neon(const float*, int64_t, uint16_t*, float*);
#endif

}  // namespace rarefy::matmul
