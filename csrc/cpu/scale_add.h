// out = scale * input (+ out), with conversion between element types, on the CPU.
#pragma once

#include "../common/scale_add.h"
#include "isa.h"

namespace sslkernels {

// The elements [begin, end) of contiguous tensors.
#define SSLKERNELS_DECLARE(isa)                                          \
  namespace isa {                                                        \
  void scale_add(const ScaleAdd& arguments, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
