#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "core/bind.h"
#include "vocabulary/cross_entropy.h"

namespace sslkernels {

// All options but ignore_index arrive as a list in the order of the struct, so that one more option is one field here
// and one in Python.
inline RowOptions row_options(int64_t ignore_index, const std::vector<double>& numbers) {
  RowOptions options{ignore_index};
  const size_t bytes = sizeof(RowOptions) - offsetof(RowOptions, label_smoothing);
  STD_TORCH_CHECK(numbers.size() * sizeof(double) == bytes, "sslkernels: wrong number of options");
  std::memcpy(&options.label_smoothing, numbers.data(), bytes);
  return options;
}

// The arguments that forward and backward share.
inline CrossEntropyRows parse_cross_entropy_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& bias,
                                                 const OptionalTensor& weight, const OptionalTensor& weight_sum,
                                                 const OptionalTensor& coefficient, const Tensor& row_max,
                                                 const Tensor& sum_exp, const Tensor& logprob,
                                                 const OptionalTensor& grad, const RowOptions& options) {
  check_matrix(logits, "logits");
  STD_TORCH_CHECK(weight.has_value() == weight_sum.has_value(), "sslkernels: weight and weight_sum go together");
  const auto type = accumulation_type(logits);
  CrossEntropyRows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = logits.stride(0);
  rows.count = logits.size(0);
  rows.vocab = logits.size(1);
  rows.wide_target = is_wide(target, "target");
  rows.target = readable(target, {rows.count}, target.scalar_type(), "target");
  rows.bias = readable(bias, {rows.vocab}, type, "bias");
  rows.weight = readable(weight, {rows.vocab}, type, "weight");
  rows.weight_sum = readable(weight_sum, {1}, type, "weight_sum");
  rows.coefficient = readable(coefficient, {rows.count}, type, "coefficient");
  rows.row_max = writable(row_max, {rows.count}, type, "row_max");
  rows.sum_exp = writable(sum_exp, {rows.count}, type, "sum_exp");
  rows.logprob = writable(logprob, {rows.count}, type, "logprob");
  if (grad) {
    STD_TORCH_CHECK(coefficient.has_value(), "sslkernels: a gradient needs coefficients");
    check_shape(*grad, {rows.count, rows.vocab}, logits.scalar_type(), "grad");
    check_unit_stride(*grad, "grad");
    rows.grad = grad->mutable_data_ptr();
    rows.grad_stride = grad->stride(0);
  }
  rows.options = options;
  return rows;
}

inline CrossEntropyRows parse_cross_entropy_rows_fwd(
    const Tensor& logits, const Tensor& target, const OptionalTensor& bias, const OptionalTensor& weight,
    const OptionalTensor& weight_sum, const OptionalTensor& coefficient, const Tensor& loss, const Tensor& row_max,
    const Tensor& sum_exp, const Tensor& logprob, const Tensor& prediction, const Tensor& entropy,
    const OptionalTensor& grad, int64_t ignore_index, const std::vector<double>& numbers, bool stats) {
  CrossEntropyRows rows = parse_cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max,
                                                   sum_exp, logprob, grad, row_options(ignore_index, numbers));
  rows.loss = writable(loss, {rows.count}, accumulation_type(logits), "loss");
  if (stats) {
    rows.prediction = writable<int64_t>(prediction, {rows.count}, ScalarType::Long, "prediction");
    rows.entropy = writable(entropy, {rows.count}, accumulation_type(logits), "entropy");
  }
  return rows;
}

inline CrossEntropyRows parse_cross_entropy_rows_bwd(const Tensor& logits, const Tensor& target,
                                                     const OptionalTensor& bias, const OptionalTensor& weight,
                                                     const OptionalTensor& weight_sum, const Tensor& coefficient,
                                                     const Tensor& row_max, const Tensor& sum_exp,
                                                     const Tensor& logprob, const Tensor& grad, int64_t ignore_index,
                                                     const std::vector<double>& numbers) {
  return parse_cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob,
                                  grad, row_options(ignore_index, numbers));
}

}  // namespace sslkernels
