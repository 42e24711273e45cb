// The arguments of scale_add: out = scale * input (+ out), with conversion between element types.
#pragma once

#include <cstdint>

#include "cross_entropy_rows.h"

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
}  // namespace sslkernels
