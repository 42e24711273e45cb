// From tensors to the arguments of the pair score kernels.
#pragma once

#include "contrastive/score_tiles.h"
#include "core/bind.h"

namespace sslkernels {

inline void check_optional(const OptionalTensor& tensor, int64_t size, torch::headeronly::ScalarType dtype,
                           const char* name) {
  if (tensor) check_vector(*tensor, size, dtype, name);
}

inline PairLabels pair_labels(const OptionalTensor& row, const OptionalTensor& column, int64_t rows, int64_t columns,
                              const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(row.has_value() == column.has_value(), "sslkernels: labels of rows and columns go together: ", name);
  check_optional(row, rows, ScalarType::Int, name);
  check_optional(column, columns, ScalarType::Int, name);
  return {static_cast<const int32_t*>(pointer(row)), static_cast<const int32_t*>(pointer(column))};
}

inline PairScores pair_scores(const torch::stable::Tensor& products, const OptionalTensor& row_norm,
                              const OptionalTensor& column_norm, const torch::stable::Tensor& scale,
                              const OptionalTensor& bias, int64_t energy, const OptionalTensor& row_positive,
                              const OptionalTensor& column_positive, const OptionalTensor& row_self,
                              const OptionalTensor& column_self, const OptionalTensor& row_id,
                              const OptionalTensor& column_id, bool ids_positive) {
  check_matrix(products, "products");
  const int64_t rows = products.size(0), columns = products.size(1);
  const auto type = accumulation_type(products);
  STD_TORCH_CHECK(row_norm.has_value() == column_norm.has_value(), "sslkernels: norms go together");
  check_optional(row_norm, rows, type, "row_norm");
  check_optional(column_norm, columns, type, "column_norm");
  check_vector(scale, 1, type, "scale");
  check_optional(bias, 1, type, "bias");
  STD_TORCH_CHECK(energy >= 0 && energy <= 2, "sslkernels: unknown energy ", energy);
  PairScores scores{};
  scores.element = element_of(products);
  scores.products = products.mutable_data_ptr();
  scores.stride = products.stride(0);
  scores.rows = rows;
  scores.columns = columns;
  scores.row_norm = pointer(row_norm);
  scores.column_norm = pointer(column_norm);
  scores.scale = scale.const_data_ptr();
  scores.bias = pointer(bias);
  scores.energy = Energy(energy);
  scores.positive = pair_labels(row_positive, column_positive, rows, columns, "positive");
  scores.self = pair_labels(row_self, column_self, rows, columns, "self");
  scores.id = pair_labels(row_id, column_id, rows, columns, "id");
  scores.ids_positive = ids_positive;
  return scores;
}

inline double* sums_of(const OptionalTensor& tensor, int64_t size, const char* name) {
  check_optional(tensor, size, torch::headeronly::ScalarType::Double, name);
  return tensor ? static_cast<double*>(tensor->mutable_data_ptr()) : nullptr;
}

inline PairSide pair_side(const OptionalTensor& weight, const OptionalTensor& reference, const OptionalTensor& share,
                          const OptionalTensor& smoothing, int64_t size, torch::headeronly::ScalarType type,
                          const PairScores& scores) {
  check_optional(weight, size, type, "weight");
  check_optional(reference, size, type, "reference");
  check_optional(share, size, type, "share");
  check_optional(smoothing, size, type, "smoothing");
  STD_TORCH_CHECK(!weight || scores.energy == Energy::kSigmoid || reference, "sslkernels: weights need references");
  return {pointer(weight), pointer(reference), pointer(share), pointer(smoothing)};
}

}  // namespace sslkernels
