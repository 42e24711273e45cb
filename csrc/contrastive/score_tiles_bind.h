#pragma once

#include "contrastive/score_tiles.h"
#include "core/bind.h"

namespace sslkernels {

inline PairLabels pair_labels(const OptionalTensor& row, const OptionalTensor& column, const ScoreTile& tile,
                              const char* name) {
  STD_TORCH_CHECK(row.has_value() == column.has_value(), "sslkernels: labels of rows and columns go together: ", name);
  return {readable<int32_t>(row, {tile.rows}, ScalarType::Int, name),
          readable<int32_t>(column, {tile.columns}, ScalarType::Int, name)};
}

// A mask of pairs has any strides: it is the caller's tensor, or a part of it.
inline void parse_masks(const OptionalTensor& pair_mask, const OptionalTensor& mask_index,
                        const OptionalTensor& column_mask, ScoreTile& tile) {
  tile.column_mask = readable<uint8_t>(column_mask, {tile.columns}, ScalarType::Bool, "column_mask");
  STD_TORCH_CHECK(pair_mask || !mask_index, "sslkernels: mask_index needs pair_mask");
  if (!pair_mask) return;
  const int64_t width = mask_index ? pair_mask->size(1) : tile.columns;
  check_shape(*pair_mask, {tile.rows, width}, ScalarType::Bool, "pair_mask");
  tile.pair_mask = static_cast<const uint8_t*>(pair_mask->const_data_ptr());
  tile.pair_mask_row = pair_mask->stride(0);
  tile.pair_mask_column = pair_mask->stride(1);
  if (!mask_index) return;
  tile.mask_index = readable<int64_t>(*mask_index, {tile.columns}, ScalarType::Long, "mask_index");
  check_indices(*mask_index, tile.columns, width, "mask_index");
}

// The arguments that the operators share.
inline ScoreTile parse_score_tile(const Tensor& products, const OptionalTensor& row_norm,
                                  const OptionalTensor& column_norm, const Tensor& scale, const OptionalTensor& bias,
                                  int64_t energy, const OptionalTensor& row_positive,
                                  const OptionalTensor& column_positive, const OptionalTensor& row_self,
                                  const OptionalTensor& column_self, const OptionalTensor& row_id,
                                  const OptionalTensor& column_id, bool ids_positive, const OptionalTensor& pair_mask,
                                  const OptionalTensor& mask_index, const OptionalTensor& column_mask) {
  check_matrix(products, "products");
  STD_TORCH_CHECK(row_norm.has_value() == column_norm.has_value(), "sslkernels: norms go together");
  STD_TORCH_CHECK(energy >= 0 && energy <= 2, "sslkernels: unknown energy ", energy);
  const auto type = accumulation_type(products);
  ScoreTile tile{};
  tile.element = element_of(products);
  tile.products = products.mutable_data_ptr();
  tile.stride = products.stride(0);
  tile.rows = products.size(0);
  tile.columns = products.size(1);
  tile.row_norm = readable(row_norm, {tile.rows}, type, "row_norm");
  tile.column_norm = readable(column_norm, {tile.columns}, type, "column_norm");
  tile.scale = readable(scale, {1}, type, "scale");
  tile.bias = readable(bias, {1}, type, "bias");
  tile.energy = Energy(energy);
  tile.positive = pair_labels(row_positive, column_positive, tile, "positive");
  tile.self = pair_labels(row_self, column_self, tile, "self");
  tile.id = pair_labels(row_id, column_id, tile, "id");
  tile.ids_positive = ids_positive;
  parse_masks(pair_mask, mask_index, column_mask, tile);
  return tile;
}

inline PairPositives parse_pair_positives(
    const Tensor& products, const OptionalTensor& row_norm, const OptionalTensor& column_norm, const Tensor& scale,
    const OptionalTensor& bias, int64_t energy, const OptionalTensor& row_positive,
    const OptionalTensor& column_positive, const OptionalTensor& row_self, const OptionalTensor& column_self,
    const OptionalTensor& row_id, const OptionalTensor& column_id, bool ids_positive, const OptionalTensor& pair_mask,
    const OptionalTensor& mask_index, const OptionalTensor& column_mask, const Tensor& column, const Tensor& score) {
  PairPositives positives{};
  positives.tile =
      parse_score_tile(products, row_norm, column_norm, scale, bias, energy, row_positive, column_positive, row_self,
                       column_self, row_id, column_id, ids_positive, pair_mask, mask_index, column_mask);
  const int64_t rows = positives.tile.rows;
  positives.column = readable<int64_t>(column, {rows}, ScalarType::Long, "column");
  positives.score = writable(score, {rows}, accumulation_type(products), "score");
  return positives;
}

inline void check_sums(Energy energy, const OptionalTensor& max, const OptionalTensor& threshold) {
  STD_TORCH_CHECK(max.has_value() == (energy == Energy::kSoftmax), "sslkernels: softmax has maxima");
  STD_TORCH_CHECK(threshold.has_value() == (energy == Energy::kHinge), "sslkernels: hinge has thresholds");
}

inline PairRowSums parse_pair_row_sums(
    const Tensor& products, const OptionalTensor& row_norm, const OptionalTensor& column_norm, const Tensor& scale,
    const OptionalTensor& bias, int64_t energy, const OptionalTensor& row_positive,
    const OptionalTensor& column_positive, const OptionalTensor& row_self, const OptionalTensor& column_self,
    const OptionalTensor& row_id, const OptionalTensor& column_id, bool ids_positive, const OptionalTensor& pair_mask,
    const OptionalTensor& mask_index, const OptionalTensor& column_mask, const OptionalTensor& threshold,
    const OptionalTensor& positive_score, const OptionalTensor& cosine_row_norm,
    const OptionalTensor& cosine_column_norm, const OptionalTensor& max, const Tensor& sum,
    const OptionalTensor& active, const OptionalTensor& score_sum, const OptionalTensor& positive_sum,
    const OptionalTensor& uniformity_sum, const OptionalTensor& num_above_positive,
    const OptionalTensor& num_equal_positive) {
  PairRowSums sums{};
  sums.tile =
      parse_score_tile(products, row_norm, column_norm, scale, bias, energy, row_positive, column_positive, row_self,
                       column_self, row_id, column_id, ids_positive, pair_mask, mask_index, column_mask);
  const int64_t rows = sums.tile.rows;
  const auto type = accumulation_type(products);
  check_sums(sums.tile.energy, max, threshold);
  STD_TORCH_CHECK(!num_above_positive || (positive_score && num_equal_positive),
                  "sslkernels: num_above_positive needs positive_score and num_equal_positive");
  STD_TORCH_CHECK(!uniformity_sum || (cosine_row_norm && cosine_column_norm), "sslkernels: uniformity_sum needs norms");
  sums.max = writable(max, {rows}, type, "max");
  sums.sum = writable<double>(sum, {rows}, ScalarType::Double, "sum");
  sums.active = writable<double>(active, {rows}, ScalarType::Double, "active");
  sums.score_sum = writable<double>(score_sum, {rows}, ScalarType::Double, "score_sum");
  sums.positive_sum = writable<double>(positive_sum, {rows}, ScalarType::Double, "positive_sum");
  sums.uniformity_sum = writable<double>(uniformity_sum, {rows}, ScalarType::Double, "uniformity_sum");
  sums.num_above_positive = writable<int64_t>(num_above_positive, {rows}, ScalarType::Long, "num_above_positive");
  sums.num_equal_positive = writable<int64_t>(num_equal_positive, {rows}, ScalarType::Long, "num_equal_positive");
  sums.threshold = readable(threshold, {rows}, type, "threshold");
  sums.positive_score = readable(positive_score, {rows}, type, "positive_score");
  sums.cosine_row_norm = readable(cosine_row_norm, {rows}, type, "cosine_row_norm");
  sums.cosine_column_norm = readable(cosine_column_norm, {sums.tile.columns}, type, "cosine_column_norm");
  return sums;
}

inline PairColumnSums parse_pair_column_sums(
    const Tensor& products, const OptionalTensor& row_norm, const OptionalTensor& column_norm, const Tensor& scale,
    const OptionalTensor& bias, int64_t energy, const OptionalTensor& row_positive,
    const OptionalTensor& column_positive, const OptionalTensor& row_self, const OptionalTensor& column_self,
    const OptionalTensor& row_id, const OptionalTensor& column_id, bool ids_positive, const OptionalTensor& pair_mask,
    const OptionalTensor& mask_index, const OptionalTensor& column_mask, const OptionalTensor& threshold,
    const OptionalTensor& max, const Tensor& sum, const OptionalTensor& active, const OptionalTensor& score_sum,
    const OptionalTensor& positive_sum) {
  PairColumnSums sums{};
  sums.tile =
      parse_score_tile(products, row_norm, column_norm, scale, bias, energy, row_positive, column_positive, row_self,
                       column_self, row_id, column_id, ids_positive, pair_mask, mask_index, column_mask);
  const int64_t columns = sums.tile.columns;
  const auto type = accumulation_type(products);
  check_sums(sums.tile.energy, max, threshold);
  STD_TORCH_CHECK(active.has_value() || !threshold, "sslkernels: a threshold needs active");
  sums.max = writable(max, {columns}, type, "max");
  sums.sum = writable<double>(sum, {columns}, ScalarType::Double, "sum");
  sums.active = writable<double>(active, {columns}, ScalarType::Double, "active");
  sums.score_sum = writable<double>(score_sum, {columns}, ScalarType::Double, "score_sum");
  sums.positive_sum = writable<double>(positive_sum, {columns}, ScalarType::Double, "positive_sum");
  sums.threshold = readable(threshold, {columns}, type, "threshold");
  return sums;
}

inline PairSide parse_pair_side(const OptionalTensor& weight, const OptionalTensor& reference,
                                const OptionalTensor& share, const OptionalTensor& smoothing, int64_t size,
                                const ScoreTile& tile) {
  STD_TORCH_CHECK(!weight || tile.energy == Energy::kSigmoid || reference, "sslkernels: weights need references");
  const auto type = accumulation_type(tile.element);
  return {readable(weight, {size}, type, "weight"), readable(reference, {size}, type, "reference"),
          readable(share, {size}, type, "share"), readable(smoothing, {size}, type, "smoothing")};
}

// Without the memory of the parts.
inline PairSoftmaxSums parse_pair_softmax_sums(
    const Tensor& products, const OptionalTensor& row_norm, const OptionalTensor& column_norm, const Tensor& scale,
    const OptionalTensor& bias, int64_t energy, const OptionalTensor& row_positive,
    const OptionalTensor& column_positive, const OptionalTensor& row_self, const OptionalTensor& column_self,
    const OptionalTensor& row_id, const OptionalTensor& column_id, bool ids_positive, const OptionalTensor& pair_mask,
    const OptionalTensor& mask_index, const OptionalTensor& column_mask, const Tensor& row_max, const Tensor& row_sum,
    const Tensor& column_max, const Tensor& column_sum) {
  PairSoftmaxSums sums{};
  sums.tile =
      parse_score_tile(products, row_norm, column_norm, scale, bias, energy, row_positive, column_positive, row_self,
                       column_self, row_id, column_id, ids_positive, pair_mask, mask_index, column_mask);
  STD_TORCH_CHECK(sums.tile.energy == Energy::kSoftmax && !ids_positive,
                  "sslkernels: pair_softmax_sums is for a softmax without extra positives");
  const auto type = accumulation_type(products);
  sums.row_max = writable(row_max, {sums.tile.rows}, type, "row_max");
  sums.row_sum = writable<double>(row_sum, {sums.tile.rows}, ScalarType::Double, "row_sum");
  sums.column_max = writable(column_max, {sums.tile.columns}, type, "column_max");
  sums.column_sum = writable<double>(column_sum, {sums.tile.columns}, ScalarType::Double, "column_sum");
  return sums;
}

inline PairGradient parse_pair_gradient(
    const Tensor& products, const OptionalTensor& row_norm, const OptionalTensor& column_norm, const Tensor& scale,
    const OptionalTensor& bias, int64_t energy, const OptionalTensor& row_positive,
    const OptionalTensor& column_positive, const OptionalTensor& row_self, const OptionalTensor& column_self,
    const OptionalTensor& row_id, const OptionalTensor& column_id, bool ids_positive, const OptionalTensor& pair_mask,
    const OptionalTensor& mask_index, const OptionalTensor& column_mask, const OptionalTensor& row_weight,
    const OptionalTensor& row_reference, const OptionalTensor& row_share, const OptionalTensor& row_smoothing,
    const OptionalTensor& column_weight, const OptionalTensor& column_reference, const OptionalTensor& column_share,
    const OptionalTensor& column_smoothing, const Tensor& dot, const Tensor& total, const OptionalTensor& cost) {
  PairGradient gradient{};
  gradient.tile =
      parse_score_tile(products, row_norm, column_norm, scale, bias, energy, row_positive, column_positive, row_self,
                       column_self, row_id, column_id, ids_positive, pair_mask, mask_index, column_mask);
  const ScoreTile& tile = gradient.tile;
  STD_TORCH_CHECK(tile.energy != Energy::kSigmoid || !column_weight, "sslkernels: sigmoid has no column side");
  gradient.row = parse_pair_side(row_weight, row_reference, row_share, row_smoothing, tile.rows, tile);
  gradient.column =
      parse_pair_side(column_weight, column_reference, column_share, column_smoothing, tile.columns, tile);
  gradient.dot = writable<double>(dot, {tile.rows}, ScalarType::Double, "dot");
  gradient.total = writable<double>(total, {tile.rows}, ScalarType::Double, "total");
  STD_TORCH_CHECK(!cost || tile.energy == Energy::kSigmoid, "sslkernels: cost is for the sigmoid energy");
  gradient.cost = writable<double>(cost, {tile.rows}, ScalarType::Double, "cost");
  return gradient;
}

}  // namespace sslkernels
