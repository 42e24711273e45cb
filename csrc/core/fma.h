// a * b + c, with one rounding where the hardware has an FMA. Files that fix their results to the bit forbid
// contraction by the compiler and call this instead.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace sslkernels {
namespace {  // one copy for each instruction set of the CPU

SSLKERNELS_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

SSLKERNELS_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace
}  // namespace sslkernels
