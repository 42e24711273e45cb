#pragma once

#include "contrastive/query_negatives.h"
#include "core/bind.h"

namespace sslkernels {

// An output without elements is not wanted.
inline QueryNegatives parse_query_negatives(const Tensor& query, const Tensor& negatives, const OptionalTensor& mask,
                                            const OptionalTensor& query_inverse_norm, const Tensor& logit_scale,
                                            const OptionalTensor& logit_bias, int64_t energy,
                                            const OptionalTensor& reference, const OptionalTensor& coefficient,
                                            const OptionalTensor& smoothing, bool final, const Tensor& scores,
                                            const Tensor& value, const Tensor& grad_query, const Tensor& grad_negatives,
                                            const Tensor& grad_scale, const Tensor& grad_bias) {
  STD_TORCH_CHECK(query.dim() == 2 && negatives.dim() == 3, "sslkernels: query is (N, D) and negatives (N, K, D)");
  STD_TORCH_CHECK(energy >= 0 && energy <= 2, "sslkernels: energy must be 0, 1 or 2");
  const int64_t rows = query.size(0), count = negatives.size(1), dim = query.size(1);
  const auto element = query.scalar_type(), type = accumulation_type(query);
  const auto wanted = [](const Tensor& tensor, Shape shape, ScalarType dtype, const char* name) -> void* {
    return tensor.numel() == 0 ? nullptr : writable(tensor, shape, dtype, name);
  };
  QueryNegatives args{};
  args.element = element_of(query);
  args.query = readable(query, {rows, dim}, element, "query");
  args.negatives = readable(negatives, {rows, count, dim}, element, "negatives");
  args.rows = rows;
  args.count = count;
  args.dim = dim;
  args.mask = readable<uint8_t>(mask, {rows, count}, ScalarType::Bool, "mask");
  args.query_inverse_norm = readable(query_inverse_norm, {rows}, type, "query_inverse_norm");
  args.logit_scale = readable(logit_scale, {1}, type, "logit_scale");
  args.logit_bias = readable(logit_bias, {1}, type, "logit_bias");
  args.energy = Energy(energy);
  args.reference = readable(reference, {rows}, type, "reference");
  args.coefficient = readable(coefficient, {rows}, type, "coefficient");
  args.smoothing = readable(smoothing, {rows}, type, "smoothing");
  args.final = final;
  args.scores = wanted(scores, {rows, count}, type, "scores");
  args.value = wanted(value, {rows}, type, "value");
  args.grad_query = wanted(grad_query, {rows, dim}, type, "grad_query");
  args.grad_negatives = wanted(grad_negatives, {rows, count, dim}, element, "grad_negatives");
  args.grad_scale = wanted(grad_scale, {rows}, type, "grad_scale");
  args.grad_bias = wanted(grad_bias, {rows}, type, "grad_bias");
  STD_TORCH_CHECK(rows == 0 || args.value != nullptr, "sslkernels: own_negatives always writes value");
  STD_TORCH_CHECK(rows == 0 || args.coefficient == nullptr || (args.grad_scale != nullptr && args.grad_bias != nullptr),
                  "sslkernels: a coefficient needs grad_scale and grad_bias");
  return args;
}

}  // namespace sslkernels
