#pragma once

#include "contrastive/glove.h"
#include "core/bind.h"

namespace sslkernels {

inline Glove parse_glove_fwd(const Tensor& center, const Tensor& context, const Tensor& center_weight,
                             const Tensor& context_weight, const Tensor& center_bias, const Tensor& context_bias,
                             const Tensor& target, const Tensor& weight, const Tensor& loss,
                             const OptionalTensor& slope) {
  STD_TORCH_CHECK(center_weight.dim() == 2 && context_weight.dim() == 2, "sslkernels: a table must have 2 dimensions");
  Glove pairs{};
  pairs.count = center.numel();
  pairs.dim = center_weight.size(1);
  pairs.center_rows = center_weight.size(0);
  pairs.context_rows = context_weight.size(0);
  STD_TORCH_CHECK(pairs.center_rows > 0 && pairs.context_rows > 0, "sslkernels: a table must have a row");
  pairs.wide_index = is_wide(center, "center");
  pairs.element = element_of(center_weight);
  const auto element = center_weight.scalar_type(), index = center.scalar_type();
  const auto type = accumulation_type(center_weight);
  pairs.center_weight = readable(center_weight, {pairs.center_rows, pairs.dim}, element, "center_weight");
  pairs.context_weight = readable(context_weight, {pairs.context_rows, pairs.dim}, element, "context_weight");
  pairs.center_bias = readable(center_bias, {pairs.center_rows}, element, "center_bias");
  pairs.context_bias = readable(context_bias, {pairs.context_rows}, element, "context_bias");
  pairs.center = readable(center, {pairs.count}, index, "center");
  pairs.context = readable(context, {pairs.count}, index, "context");
  check_indices(center, pairs.count, pairs.center_rows, "center");
  check_indices(context, pairs.count, pairs.context_rows, "context");
  pairs.target = readable(target, {pairs.count}, type, "target");
  pairs.weight = readable(weight, {pairs.count}, type, "weight");
  pairs.loss = writable(loss, {pairs.count}, type, "loss");
  pairs.slope = writable(slope, {pairs.count}, type, "slope");
  return pairs;
}

}  // namespace sslkernels
