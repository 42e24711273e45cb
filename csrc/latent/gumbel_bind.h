#pragma once

#include "latent/gumbel.h"
#include "random/random_stream_bind.h"

namespace sslkernels {

inline GumbelState parse_gumbel_state(const OptionalTensor& max, const OptionalTensor& sum, int64_t rows,
                                      ScalarType type) {
  STD_TORCH_CHECK(max.has_value() == sum.has_value(), "sslkernels: max and sum go together");
  return {writable(max, {rows}, type, "max"), writable(sum, {rows}, type, "sum")};
}

// The arguments that the three operators share.
inline GumbelRows parse_gumbel_rows(const Tensor& logits, const OptionalTensor& seed, const OptionalTensor& row_ids,
                                    int64_t first_row, const OptionalTensor& inverse_tau, const OptionalTensor& max,
                                    const OptionalTensor& sum, const OptionalTensor& softmax_max,
                                    const OptionalTensor& softmax_sum) {
  check_matrix(logits, "logits");
  GumbelRows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = logits.stride(0);
  rows.rows = logits.size(0);
  rows.columns = logits.size(1);
  rows.seed = seed ? parse_seed(*seed) : nullptr;
  rows.row_ids = parse_row_ids(row_ids, rows.rows);
  rows.first_row = first_row;
  if (inverse_tau) {
    STD_TORCH_CHECK(inverse_tau->numel() == 1 && inverse_tau->scalar_type() == ScalarType::Double,
                    "sslkernels: inverse_tau must be one float64");
    rows.inverse_tau = inverse_tau->const_data_ptr<double>();
  }
  rows.state = parse_gumbel_state(max, sum, rows.rows, accumulation_type(logits));
  rows.softmax_state = parse_gumbel_state(softmax_max, softmax_sum, rows.rows, accumulation_type(logits));
  return rows;
}

// `output` is a value of the enumeration GumbelOutput.
inline GumbelForward parse_gumbel_rows_fwd(const Tensor& logits, const OptionalTensor& seed,
                                           const OptionalTensor& row_ids, int64_t first_row,
                                           const OptionalTensor& inverse_tau, int64_t output, const OptionalTensor& y,
                                           const OptionalTensor& index, const Tensor& max, const Tensor& sum,
                                           const OptionalTensor& argmax, const OptionalTensor& softmax_max,
                                           const OptionalTensor& softmax_sum) {
  GumbelForward forward{};
  forward.rows = parse_gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, softmax_max, softmax_sum);
  const GumbelRows& rows = forward.rows;
  forward.output = GumbelOutput(output);
  STD_TORCH_CHECK(y.has_value() == (forward.output != GumbelOutput::kNone), "sslkernels: y goes with an output");
  STD_TORCH_CHECK(argmax.has_value() == (rows.softmax_state.max != nullptr),
                  "sslkernels: argmax and the softmax state go together");
  forward.y = writable(y, {rows.rows, rows.columns}, logits.scalar_type(), "y");
  forward.index = writable<int64_t>(index, {rows.rows}, ScalarType::Long, "index");
  forward.argmax = writable<int64_t>(argmax, {rows.rows}, ScalarType::Long, "argmax");
  return forward;
}

inline GumbelBackward parse_gumbel_rows_bwd(const OptionalTensor& grad, const OptionalTensor& grad_usage,
                                            const OptionalTensor& mask, const Tensor& logits,
                                            const OptionalTensor& seed, const OptionalTensor& row_ids,
                                            int64_t first_row, const OptionalTensor& inverse_tau,
                                            const OptionalTensor& max, const OptionalTensor& sum,
                                            const OptionalTensor& softmax_max, const OptionalTensor& softmax_sum,
                                            const Tensor& grad_logits) {
  GumbelBackward backward{};
  backward.rows = parse_gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, softmax_max, softmax_sum);
  const GumbelRows& rows = backward.rows;
  const auto type = accumulation_type(logits);
  backward.groups = 1;
  if (grad) {
    STD_TORCH_CHECK(rows.state.max != nullptr, "sslkernels: a gradient of y needs the state");
    backward.wide_grad = grad->scalar_type() != logits.scalar_type();
    check_shape(*grad, {rows.rows, rows.columns}, backward.wide_grad ? type : logits.scalar_type(), "grad");
    check_unit_stride(*grad, "grad");
    backward.grad = grad->const_data_ptr();
    backward.grad_stride = grad->stride(0);
  }
  if (grad_usage) {
    STD_TORCH_CHECK(grad_usage->dim() == 2 && grad_usage->size(0) > 0, "sslkernels: grad_usage must have rows");
    STD_TORCH_CHECK(rows.softmax_state.max != nullptr, "sslkernels: grad_usage needs the softmax state");
    backward.groups = grad_usage->size(0);
    backward.grad_usage = readable(*grad_usage, {backward.groups, rows.columns}, type, "grad_usage");
  }
  backward.mask = readable<uint8_t>(mask, {rows.rows}, ScalarType::Bool, "mask");
  backward.grad_logits = writable(grad_logits, {rows.rows, rows.columns}, logits.scalar_type(), "grad_logits");
  return backward;
}

inline ProbabilitySums parse_probability_sums(const Tensor& logits, const Tensor& softmax_max,
                                              const Tensor& softmax_sum, const OptionalTensor& mask,
                                              const Tensor& partial, int64_t chunk_rows) {
  STD_TORCH_CHECK(partial.dim() == 3 && partial.size(1) > 0, "sslkernels: partial must be (chunks, groups, columns)");
  ProbabilitySums sums{};
  sums.rows = parse_gumbel_rows(logits, {}, {}, 0, {}, {}, {}, softmax_max, softmax_sum);
  sums.mask = readable<uint8_t>(mask, {sums.rows.rows}, ScalarType::Bool, "mask");
  sums.chunks = partial.size(0);
  sums.groups = partial.size(1);
  sums.chunk_rows = chunk_rows;
  sums.partial = writable(partial, {sums.chunks, sums.groups, sums.rows.columns}, accumulation_type(logits), "partial");
  STD_TORCH_CHECK(chunk_rows > 0 && sums.chunks * chunk_rows * sums.groups >= sums.rows.rows,
                  "sslkernels: too few chunks");
  return sums;
}

}  // namespace sslkernels
