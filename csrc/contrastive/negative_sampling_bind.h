#pragma once

#include "contrastive/negative_sampling.h"
#include "core/bind.h"

namespace sslkernels {

inline NegativeSampling parse_negative_sampling_fwd(const Tensor& center, const Tensor& context,
                                                    const Tensor& negatives, const Tensor& center_weight,
                                                    const Tensor& context_weight, const Tensor& loss,
                                                    const OptionalTensor& slopes, const OptionalTensor& direction,
                                                    bool exclude_positive) {
  STD_TORCH_CHECK(center_weight.dim() == 2 && context_weight.dim() == 2 && negatives.dim() == 2,
                  "sslkernels: the tables and negatives must have 2 dimensions");
  NegativeSampling pairs{};
  pairs.count = negatives.size(0);
  pairs.negative_count = negatives.size(1);
  pairs.dim = center_weight.size(1);
  pairs.center_rows = center_weight.size(0);
  pairs.context_rows = context_weight.size(0);
  pairs.wide_index = is_wide(center, "center");
  pairs.element = element_of(center_weight);
  const auto element = center_weight.scalar_type(), index = center.scalar_type();
  const auto type = accumulation_type(center_weight);
  pairs.center_weight = readable(center_weight, {pairs.center_rows, pairs.dim}, element, "center_weight");
  pairs.context_weight = readable(context_weight, {pairs.context_rows, pairs.dim}, element, "context_weight");
  pairs.center = readable(center, {pairs.count}, index, "center");
  pairs.context = readable(context, {pairs.count}, index, "context");
  pairs.negatives = readable(negatives, {pairs.count, pairs.negative_count}, index, "negatives");
  check_indices(center, pairs.count, pairs.center_rows, "center");
  check_indices(context, pairs.count, pairs.context_rows, "context");
  check_optional_indices(negatives, negatives.numel(), pairs.context_rows, "negatives");
  pairs.exclude_positive = exclude_positive;
  pairs.loss = writable(loss, {pairs.count}, type, "loss");
  pairs.slopes = writable(slopes, {pairs.count, pairs.negative_count + 1}, type, "slopes");
  pairs.direction = writable(direction, {pairs.count, pairs.dim}, type, "direction");
  return pairs;
}

}  // namespace sslkernels
