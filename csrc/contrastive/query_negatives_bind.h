// From tensors to the arguments of own_negatives, as bind.h. Outputs of no element are not asked for.
#pragma once

#include "contrastive/query_negatives.h"
#include "core/bind.h"

namespace sslkernels {

inline OwnNegatives own_negatives_arguments(const torch::stable::Tensor& query, const torch::stable::Tensor& negatives,
                                            const OptionalTensor& mask, const OptionalTensor& query_inverse_norm,
                                            const torch::stable::Tensor& logit_scale, const OptionalTensor& logit_bias,
                                            int64_t energy, const OptionalTensor& reference,
                                            const OptionalTensor& coefficient, const OptionalTensor& smoothing,
                                            bool final, const torch::stable::Tensor& scores,
                                            const torch::stable::Tensor& value, const torch::stable::Tensor& grad_query,
                                            const torch::stable::Tensor& grad_negatives,
                                            const torch::stable::Tensor& grad_scale,
                                            const torch::stable::Tensor& grad_bias) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  STD_TORCH_CHECK(query.dim() == 2 && negatives.dim() == 3, "sslkernels: query is (N, D) and negatives (N, K, D)");
  const int64_t rows = query.size(0), count = negatives.size(1), dim = query.size(1);
  STD_TORCH_CHECK(negatives.size(0) == rows && negatives.size(2) == dim &&
                      negatives.scalar_type() == query.scalar_type() && negatives.is_contiguous() &&
                      query.is_contiguous(),
                  "sslkernels: negatives must match query, and both be contiguous");
  STD_TORCH_CHECK(energy >= 0 && energy <= 2, "sslkernels: energy must be 0, 1 or 2");
  const auto type = accumulation_type(query);
  const auto row_values = [&](const OptionalTensor& values, const char* name) {
    if (values) check_vector(*values, rows, type, name);
    return pointer(values);
  };
  const auto output = [&](const Tensor& tensor, int64_t elements, ScalarType dtype, const char* name) -> void* {
    if (tensor.numel() == 0) return nullptr;
    STD_TORCH_CHECK(tensor.numel() == elements && tensor.is_contiguous() && tensor.scalar_type() == dtype,
                    "sslkernels: wrong shape or dtype of ", name);
    return tensor.mutable_data_ptr();
  };
  if (mask) {
    STD_TORCH_CHECK(mask->numel() == rows * count && mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool,
                    "sslkernels: mask must be contiguous bool of shape (N, K)");
  }
  check_vector(logit_scale, 1, type, "logit_scale");
  if (logit_bias) check_vector(*logit_bias, 1, type, "logit_bias");

  OwnNegatives own{};
  own.element = element_of(query);
  own.query = query.const_data_ptr();
  own.negatives = negatives.const_data_ptr();
  own.rows = rows;
  own.count = count;
  own.dim = dim;
  own.mask = static_cast<const uint8_t*>(pointer(mask));
  own.query_inverse_norm = row_values(query_inverse_norm, "query_inverse_norm");
  own.logit_scale = logit_scale.const_data_ptr();
  own.logit_bias = pointer(logit_bias);
  own.energy = static_cast<Energy>(energy);
  own.reference = row_values(reference, "reference");
  own.coefficient = row_values(coefficient, "coefficient");
  own.smoothing = row_values(smoothing, "smoothing");
  own.final = final;
  own.scores = output(scores, rows * count, type, "scores");
  own.value = output(value, rows, type, "value");
  own.grad_query = output(grad_query, rows * dim, type, "grad_query");
  own.grad_negatives = output(grad_negatives, rows * count * dim, query.scalar_type(), "grad_negatives");
  own.grad_scale = output(grad_scale, rows, type, "grad_scale");
  own.grad_bias = output(grad_bias, rows, type, "grad_bias");
  STD_TORCH_CHECK(rows == 0 || own.value != nullptr, "sslkernels: own_negatives always writes value");
  STD_TORCH_CHECK(rows == 0 || own.coefficient == nullptr || (own.grad_scale != nullptr && own.grad_bias != nullptr),
                  "sslkernels: a coefficient needs grad_scale and grad_bias");
  return own;
}

}  // namespace sslkernels
