// scale_add: out = scale * input (+ out), with conversion between element types.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// Contiguous tensors of `count` elements. `input` may alias `out` if their elements are the same.
struct ScaleAdd {
  Element input_element;
  Element out_element;
  const void* input;
  void* out;
  int64_t count;
  const void* scale;  // one number on the device of the tensors; null: 1
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

// Elements [begin, end).
SSLKERNELS_CPU_KERNELS(void scale_add(const ScaleAdd& arguments, int64_t begin, int64_t end);)

// Any pair of float, bfloat16 and half, or double with itself. In place with scale 1 the kernel reads only the scale:
// the factor of a gradient is mostly 1, and the host cannot know it without a synchronisation.
void launch_scale_add(const ScaleAdd& arguments, void* stream);

}  // namespace sslkernels
