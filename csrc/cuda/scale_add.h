// out = scale * input (+ out) on a GPU, with conversion between element types. `stream` is a cudaStream_t.
#pragma once

#include "../common/scale_add.h"

namespace sslkernels {

// Any two of float, bfloat16 and half, or double with itself. In place with scale 1 nothing is read but the scale: what
// a gradient is multiplied with is mostly 1, and the host does not know it without a synchronisation.
void launch_scale_add(const ScaleAdd& arguments, void* stream);

}  // namespace sslkernels
