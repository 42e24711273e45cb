// From tensors to the arguments of the kernels, with checks. The public functions have checked what users pass: a
// message here names a mistake of the package. Outputs are allocated by the caller.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "core/scale_add.h"
#include "vocabulary/cross_entropy.h"

namespace sslkernels {

using OptionalTensor = std::optional<torch::stable::Tensor>;

inline Element element_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(false, "sslkernels: the dtype must be float32, float64, bfloat16 or float16");
  }
}

inline torch::headeronly::ScalarType accumulation_type(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_vector(const torch::stable::Tensor& tensor, int64_t size, torch::headeronly::ScalarType dtype,
                         const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous(), "sslkernels: ", name,
                  " must be contiguous of size ", size);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "sslkernels: wrong dtype of ", name);
}

// int64, else int32.
inline bool is_wide(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int, "sslkernels: ", name, " must be int64 or int32");
  return wide;
}

inline void check_matrix(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "sslkernels: ", name, " must have 2 dimensions");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1 || tensor.size(0) == 0, "sslkernels: ", name,
                  " must have unit stride in its last dimension");
}

inline const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The arguments that forward and backward of the rows of cross-entropy have in common.
inline CrossEntropyRows cross_entropy_rows(const torch::stable::Tensor& logits, const torch::stable::Tensor& target,
                                           const OptionalTensor& bias, const OptionalTensor& weight,
                                           const OptionalTensor& weight_sum, const OptionalTensor& coefficient,
                                           const torch::stable::Tensor& row_max, const torch::stable::Tensor& sum_exp,
                                           const torch::stable::Tensor& logprob, const OptionalTensor& grad,
                                           const RowOptions& options) {
  check_matrix(logits, "logits");
  const int64_t count = logits.size(0), vocab = logits.size(1);
  const auto type = accumulation_type(logits);
  const bool wide_target = is_wide(target, "target");
  check_vector(target, count, target.scalar_type(), "target");
  check_vector(row_max, count, type, "row_max");
  check_vector(sum_exp, count, type, "sum_exp");
  check_vector(logprob, count, type, "logprob");
  if (bias) check_vector(*bias, vocab, type, "bias");
  if (weight) check_vector(*weight, vocab, type, "weight");
  if (weight_sum) check_vector(*weight_sum, 1, type, "weight_sum");
  if (coefficient) check_vector(*coefficient, count, type, "coefficient");
  STD_TORCH_CHECK(weight.has_value() == weight_sum.has_value(), "sslkernels: weight and weight_sum go together");
  if (grad) {
    STD_TORCH_CHECK(coefficient.has_value(), "sslkernels: a gradient needs coefficients");
    check_matrix(*grad, "grad");
    STD_TORCH_CHECK(grad->size(0) == count && grad->size(1) == vocab && grad->scalar_type() == logits.scalar_type(),
                    "sslkernels: grad must have the shape and dtype of logits");
  }
  CrossEntropyRows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = logits.stride(0);
  rows.count = count;
  rows.vocab = vocab;
  rows.target = target.const_data_ptr();
  rows.wide_target = wide_target;
  rows.bias = pointer(bias);
  rows.weight = pointer(weight);
  rows.weight_sum = pointer(weight_sum);
  rows.coefficient = pointer(coefficient);
  rows.row_max = row_max.mutable_data_ptr();
  rows.sum_exp = sum_exp.mutable_data_ptr();
  rows.logprob = logprob.mutable_data_ptr();
  rows.grad = grad ? grad->mutable_data_ptr() : nullptr;
  rows.grad_stride = grad ? grad->stride(0) : 0;
  rows.options = options;
  return rows;
}

inline ScaleAdd scale_add_arguments(const torch::stable::Tensor& input, const OptionalTensor& scale,
                                    const torch::stable::Tensor& out, bool add) {
  STD_TORCH_CHECK(input.is_contiguous() && out.is_contiguous() && input.numel() == out.numel(),
                  "sslkernels: scale_add needs contiguous tensors of one size");
  if (scale) check_vector(*scale, 1, accumulation_type(*scale), "scale");
  return {element_of(input),
          element_of(out),
          input.const_data_ptr(),
          out.mutable_data_ptr(),
          out.numel(),
          pointer(scale),
          scale && element_of(*scale) == Element::kDouble,
          add};
}

inline void add_forward_outputs(CrossEntropyRows& rows, const torch::stable::Tensor& logits,
                                const torch::stable::Tensor& loss, const torch::stable::Tensor& prediction,
                                const torch::stable::Tensor& entropy, bool stats) {
  check_vector(loss, rows.count, accumulation_type(logits), "loss");
  rows.loss = loss.mutable_data_ptr();
  if (!stats) return;
  check_vector(prediction, rows.count, torch::headeronly::ScalarType::Long, "prediction");
  check_vector(entropy, rows.count, accumulation_type(logits), "entropy");
  rows.prediction = prediction.mutable_data_ptr<int64_t>();
  rows.entropy = entropy.mutable_data_ptr();
}

}  // namespace sslkernels
