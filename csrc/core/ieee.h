// Operations whose result IEEE 754 fixes to the bit and that no compiler contracts: CUDA intrinsics never are, and the
// C++ files that include this header are compiled with -ffp-contract=off (exact_kernels in CMakeLists.txt).
#pragma once

#include <cmath>

#include "core/host_device.h"

#if !defined(__CUDACC__) && !defined(SSLKERNELS_EXACT)
#error "add this file to exact_kernels in CMakeLists.txt"
#endif

namespace sslkernels {
namespace {  // one copy for each instruction set of the CPU

#if defined(__CUDA_ARCH__)
SSLKERNELS_HD float exact_add(float a, float b) { return __fadd_rn(a, b); }
SSLKERNELS_HD float exact_multiply(float a, float b) { return __fmul_rn(a, b); }
SSLKERNELS_HD float exact_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SSLKERNELS_HD float exact_sqrt(float a) { return __fsqrt_rn(a); }
SSLKERNELS_HD double exact_add(double a, double b) { return __dadd_rn(a, b); }
SSLKERNELS_HD double exact_multiply(double a, double b) { return __dmul_rn(a, b); }
#else
SSLKERNELS_HD float exact_add(float a, float b) { return a + b; }
SSLKERNELS_HD float exact_multiply(float a, float b) { return a * b; }
SSLKERNELS_HD float exact_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SSLKERNELS_HD float exact_sqrt(float a) { return __builtin_sqrtf(a); }
SSLKERNELS_HD double exact_add(double a, double b) { return a + b; }
SSLKERNELS_HD double exact_multiply(double a, double b) { return a * b; }
#endif

}  // namespace
}  // namespace sslkernels
