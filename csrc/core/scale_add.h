// The arguments of scale_add: out = scale * input (+ out), with conversion between element types.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// Contiguous tensors of `count` elements. `input` may be `out` where their elements are the same.
struct ScaleAdd {
  Element input_element;
  Element out_element;
  const void* input;
  void* out;
  int64_t count;
  const void* scale;  // one number, where the tensors are; null: 1
  bool wide_scale;    // double, else float
  bool add;
};

namespace {  // one copy for each instruction set of the CPU

SSLKERNELS_HD double scale_of(const ScaleAdd& arguments) {
  if (arguments.scale == nullptr) return 1;
  return arguments.wide_scale ? *static_cast<const double*>(arguments.scale)
                              : double(*static_cast<const float*>(arguments.scale));
}

}  // namespace

// The elements [begin, end) of contiguous tensors.
SSLKERNELS_CPU_KERNELS(void scale_add(const ScaleAdd& arguments, int64_t begin, int64_t end);)

// Any two of float, bfloat16 and half, or double with itself. In place with scale 1 nothing is read but the scale: what
// a gradient is multiplied with is mostly 1, and the host does not know it without a synchronisation.
void launch_scale_add(const ScaleAdd& arguments, void* stream);

}  // namespace sslkernels
