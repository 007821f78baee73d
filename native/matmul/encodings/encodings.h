// Included by every file of this folder. Each is compiled several times (CMakeLists.txt), and its sections are:
//   RAREFY_PASS_REFERENCE  the packer, and the kernel in plain C++
//   RAREFY_PASS_AVX2       the AVX2 kernel, and again as the AVX-VNNI one
//   RAREFY_PASS_AVX512     the AVX-512 kernel, and again as the AMX one
//   RAREFY_PASS_NEON       the kernel for NEON with the dot product
//   RAREFY_PASS_SAMPLES    random weights for the test and the benchmark programs
#pragma once

#if RAREFY_PASS_REFERENCE
#include "matmul/core_reference.h"
#include "matmul/packing.h"
#elif RAREFY_PASS_AVX2
#include "matmul/core_avx2.h"
#elif RAREFY_PASS_AVX512
#include "matmul/core_avx512.h"
#elif RAREFY_PASS_NEON
#include "matmul/core_neon.h"
#elif RAREFY_PASS_SAMPLES
#include "matmul/samples.h"
#endif
