// From tensors to the arguments of the kernels of negative_sampling_loss, as bind.h.
#pragma once

#include "contrastive/negative_sampling.h"
#include "core/bind.h"
#include "core/segment_sums.h"

namespace sslkernels {

inline void check_table(const torch::stable::Tensor& tensor, int64_t rows, int64_t columns,
                        torch::headeronly::ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(),
                  "sslkernels: ", name, " must be contiguous of shape (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "sslkernels: wrong dtype of ", name);
}

inline NegativeSampling negative_sampling_arguments(const torch::stable::Tensor& center,
                                                    const torch::stable::Tensor& context,
                                                    const torch::stable::Tensor& negatives,
                                                    const torch::stable::Tensor& center_weight,
                                                    const torch::stable::Tensor& context_weight,
                                                    const torch::stable::Tensor& loss, const OptionalTensor& slopes,
                                                    const OptionalTensor& direction, bool exclude_positive) {
  STD_TORCH_CHECK(center_weight.dim() == 2 && context_weight.dim() == 2 && negatives.dim() == 2,
                  "sslkernels: the tables and negatives must have 2 dimensions");
  NegativeSampling pairs{};
  pairs.count = negatives.size(0);
  pairs.negative_count = negatives.size(1);
  pairs.dim = center_weight.size(1);
  pairs.center_rows = center_weight.size(0);
  pairs.context_rows = context_weight.size(0);
  pairs.wide_index = is_wide(center, "center");
  const auto type = accumulation_type(center_weight);
  check_vector(center, pairs.count, center.scalar_type(), "center");
  check_vector(context, pairs.count, center.scalar_type(), "context");
  check_table(negatives, pairs.count, pairs.negative_count, center.scalar_type(), "negatives");
  check_table(center_weight, pairs.center_rows, pairs.dim, center_weight.scalar_type(), "center_weight");
  check_table(context_weight, pairs.context_rows, pairs.dim, center_weight.scalar_type(), "context_weight");
  check_vector(loss, pairs.count, type, "loss");
  if (slopes) check_table(*slopes, pairs.count, pairs.negative_count + 1, type, "slopes");
  if (direction) check_table(*direction, pairs.count, pairs.dim, type, "direction");
  pairs.element = element_of(center_weight);
  pairs.center_weight = center_weight.const_data_ptr();
  pairs.context_weight = context_weight.const_data_ptr();
  pairs.center = center.const_data_ptr();
  pairs.context = context.const_data_ptr();
  pairs.negatives = negatives.const_data_ptr();
  pairs.exclude_positive = exclude_positive;
  pairs.loss = loss.mutable_data_ptr();
  pairs.slopes = slopes ? slopes->mutable_data_ptr() : nullptr;
  pairs.direction = direction ? direction->mutable_data_ptr() : nullptr;
  return pairs;
}

inline WeightedRowSums row_sums_arguments(const torch::stable::Tensor& starts, const torch::stable::Tensor& order,
                                          const torch::stable::Tensor& coefficient, const torch::stable::Tensor& source,
                                          const OptionalTensor& source_index, const torch::stable::Tensor& out,
                                          int64_t entries_of_source) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(out.dim() == 2 && source.dim() == 2 && entries_of_source > 0,
                  "sslkernels: source and out must have 2 dimensions");
  WeightedRowSums sums{};
  sums.rows = out.size(0);
  sums.dim = out.size(1);
  sums.entries = order.numel();
  sums.source_rows = source.size(0);
  sums.entries_of_source = entries_of_source;
  const auto type = accumulation_type(out);
  check_vector(starts, sums.rows + 1, ScalarType::Long, "starts");
  check_vector(order, sums.entries, ScalarType::Long, "order");
  check_vector(coefficient, sums.entries, type, "coefficient");
  check_table(out, sums.rows, sums.dim, out.scalar_type(), "out");
  check_table(source, sums.source_rows, sums.dim, source.scalar_type(), "source");
  STD_TORCH_CHECK(source.scalar_type() == out.scalar_type() || source.scalar_type() == type,
                  "sslkernels: source must have the dtype of out or the one that it is accumulated in");
  if (source_index) {
    sums.wide_index = is_wide(*source_index, "source_index");
    check_vector(*source_index, sums.entries / entries_of_source, source_index->scalar_type(), "source_index");
  } else {
    STD_TORCH_CHECK(sums.entries == sums.source_rows * entries_of_source, "sslkernels: wrong size of source");
  }
  sums.source_element = element_of(source);
  sums.out_element = element_of(out);
  sums.starts = starts.const_data_ptr<int64_t>();
  sums.order = order.const_data_ptr<int64_t>();
  sums.coefficient = coefficient.const_data_ptr();
  sums.source = source.const_data_ptr();
  sums.source_index = pointer(source_index);
  sums.out = out.mutable_data_ptr();
  return sums;
}

}  // namespace sslkernels
