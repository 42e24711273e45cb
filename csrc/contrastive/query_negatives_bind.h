#pragma once

#include "contrastive/query_negatives.h"
#include "core/bind.h"

namespace sslkernels {

inline void parse_negative_index(const Tensor& query, const Tensor& negatives, const Tensor& index,
                                 const OptionalTensor& bank, int64_t count, QueryNegatives& args) {
  const auto element = query.scalar_type();
  const int64_t rows = query.size(0), dim = query.size(1);
  args.table_rows = negatives.size(0);
  args.bank_rows = bank ? bank->size(0) : 0;
  args.negatives = readable(negatives, {args.table_rows, dim}, element, "negatives");
  args.bank = readable(bank, {args.bank_rows, dim}, element, "bank");
  args.wide_index = is_wide(index, "index");
  args.index = readable(index, {rows, count}, index.scalar_type(), "index");
  check_optional_indices(index, rows * count, args.table_rows + args.bank_rows, "index");
}

// An output without elements is not wanted.
inline QueryNegatives parse_query_negatives(const Tensor& query, const Tensor& negatives, const OptionalTensor& index,
                                            const OptionalTensor& bank, const OptionalTensor& mask,
                                            const OptionalTensor& query_inverse_norm, const Tensor& logit_scale,
                                            const OptionalTensor& logit_bias, int64_t energy,
                                            const OptionalTensor& reference, const OptionalTensor& coefficient,
                                            const OptionalTensor& smoothing, bool final, const Tensor& scores,
                                            const Tensor& value, const Tensor& grad_query, const Tensor& grad_negatives,
                                            const Tensor& grad_scale, const Tensor& grad_bias) {
  STD_TORCH_CHECK(query.dim() == 2 && negatives.dim() == (index ? 2 : 3) && (!index || index->dim() == 2),
                  "sslkernels: query is (N, D) and negatives (N, K, D), or (M, D) with an index (N, K)");
  STD_TORCH_CHECK(energy >= 0 && energy <= 2, "sslkernels: energy must be 0, 1 or 2");
  const int64_t rows = query.size(0), count = (index ? *index : negatives).size(1), dim = query.size(1);
  const auto element = query.scalar_type(), type = accumulation_type(query);
  const auto wanted = [](const Tensor& tensor, Shape shape, ScalarType dtype, const char* name) -> void* {
    return tensor.numel() == 0 ? nullptr : writable(tensor, shape, dtype, name);
  };
  QueryNegatives args{};
  args.element = element_of(query);
  args.query = readable(query, {rows, dim}, element, "query");
  if (index) {
    parse_negative_index(query, negatives, *index, bank, count, args);
  } else {
    args.negatives = readable(negatives, {rows, count, dim}, element, "negatives");
  }
  args.rows = rows;
  args.count = count;
  args.dim = dim;
  args.mask = readable<uint8_t>(mask, {rows, count}, ScalarType::Bool, "mask");
  args.query_inverse_norm = readable(query_inverse_norm, {rows}, type, "query_inverse_norm");
  args.logit_scale = readable(logit_scale, {1}, type, "logit_scale");
  args.logit_bias = readable(logit_bias, {1}, type, "logit_bias");
  args.energy = Energy(energy);
  args.reference = readable<double>(reference, {rows}, ScalarType::Double, "reference");
  args.coefficient = readable(coefficient, {rows}, type, "coefficient");
  args.smoothing = readable(smoothing, {rows}, type, "smoothing");
  args.final = final;
  args.scores = wanted(scores, {rows, count}, type, "scores");
  args.value = static_cast<double*>(wanted(value, {rows}, ScalarType::Double, "value"));
  args.grad_query = wanted(grad_query, {rows, dim}, type, "grad_query");
  args.grad_negatives = index ? wanted(grad_negatives, {rows, count}, type, "grad_negatives")
                              : wanted(grad_negatives, {rows, count, dim}, element, "grad_negatives");
  args.grad_scale = wanted(grad_scale, {rows}, type, "grad_scale");
  args.grad_bias = wanted(grad_bias, {rows}, type, "grad_bias");
  STD_TORCH_CHECK(rows == 0 || args.value != nullptr, "sslkernels: query_negatives always writes value");
  STD_TORCH_CHECK(rows == 0 || args.coefficient == nullptr || (args.grad_scale != nullptr && args.grad_bias != nullptr),
                  "sslkernels: a coefficient needs grad_scale and grad_bias");
  return args;
}

}  // namespace sslkernels
