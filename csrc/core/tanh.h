// tanh near zero, where formulas in exp(2 x) cancel.
#pragma once

#include "core/host_device.h"

namespace sslkernels {
namespace {  // one copy for each instruction set of the CPU

// tanh x for |x| < 0.625, by the polynomial of Cephes' tanhf (Moshier).
SSLKERNELS_HD float tanh_near_zero(float x) {
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  return x + x * s * p;
}

}  // namespace
}  // namespace sslkernels
