#pragma once

#include "core/bind.h"
#include "core/scale_add.h"

namespace sslkernels {

inline ScaleAdd parse_scale_add(const Tensor& input, const OptionalTensor& scale, const Tensor& out, bool add) {
  STD_TORCH_CHECK(input.is_contiguous() && out.is_contiguous() && input.numel() == out.numel(),
                  "sslkernels: scale_add needs contiguous tensors of one size");
  const bool wide_scale = scale && scale->scalar_type() == ScalarType::Double;
  return {element_of(input),
          element_of(out),
          input.const_data_ptr(),
          out.mutable_data_ptr(),
          out.numel(),
          readable(scale, {1}, wide_scale ? ScalarType::Double : ScalarType::Float, "scale"),
          wide_scale,
          add};
}

}  // namespace sslkernels
