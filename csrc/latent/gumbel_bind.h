// From tensors to the arguments of the kernels of Gumbel-softmax, as bind.h.
#pragma once

#include "core/bind.h"
#include "latent/gumbel.h"
#include "random/random_stream_bind.h"

namespace sslkernels {

inline GumbelState gumbel_state(const OptionalTensor& max, const OptionalTensor& sum, int64_t rows,
                                torch::headeronly::ScalarType type) {
  STD_TORCH_CHECK(max.has_value() == sum.has_value(), "sslkernels: max and sum go together");
  if (!max) return {nullptr, nullptr};
  check_vector(*max, rows, type, "max");
  check_vector(*sum, rows, type, "sum");
  return {max->mutable_data_ptr(), sum->mutable_data_ptr()};
}

inline GumbelRows gumbel_rows(const torch::stable::Tensor& logits, const OptionalTensor& seed,
                              const OptionalTensor& row_ids, int64_t first_row, const OptionalTensor& inverse_tau,
                              const OptionalTensor& max, const OptionalTensor& sum, const OptionalTensor& plain_max,
                              const OptionalTensor& plain_sum) {
  check_matrix(logits, "logits");
  GumbelRows rows{};
  rows.element = element_of(logits);
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = logits.stride(0);
  rows.rows = logits.size(0);
  rows.columns = logits.size(1);
  rows.seed = seed ? seed_pointer(*seed) : nullptr;
  rows.row_ids = row_ids_pointer(row_ids, rows.rows);
  rows.first_row = first_row;
  if (inverse_tau) {
    STD_TORCH_CHECK(inverse_tau->numel() == 1 && inverse_tau->scalar_type() == torch::headeronly::ScalarType::Double,
                    "sslkernels: inverse_tau must be one float64");
    rows.inverse_tau = inverse_tau->const_data_ptr<double>();
  }
  rows.state = gumbel_state(max, sum, rows.rows, accumulation_type(logits));
  rows.plain = gumbel_state(plain_max, plain_sum, rows.rows, accumulation_type(logits));
  return rows;
}

inline void check_rows(const torch::stable::Tensor& tensor, const GumbelRows& rows, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows.rows && tensor.size(1) == rows.columns,
                  "sslkernels: ", name, " must have the shape of logits");
}

inline const uint8_t* row_mask(const OptionalTensor& mask, int64_t rows) {
  if (!mask) return nullptr;
  check_vector(*mask, rows, torch::headeronly::ScalarType::Bool, "mask");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

// output: of the enumeration GumbelOutput.
inline GumbelForward gumbel_forward(const GumbelRows& rows, const torch::stable::Tensor& logits, int64_t output,
                                    const OptionalTensor& y, const OptionalTensor& index, const OptionalTensor& best) {
  using torch::headeronly::ScalarType;
  GumbelForward forward{};
  forward.rows = rows;
  forward.output = GumbelOutput(output);
  STD_TORCH_CHECK(y.has_value() == (forward.output != GumbelOutput::kNone), "sslkernels: y goes with an output");
  STD_TORCH_CHECK(rows.state.max != nullptr, "sslkernels: the state is an output");
  STD_TORCH_CHECK(best.has_value() == (rows.plain.max != nullptr), "sslkernels: best and the plain state go together");
  if (y) {
    check_rows(*y, rows, "y");
    STD_TORCH_CHECK(y->is_contiguous() && y->scalar_type() == logits.scalar_type(),
                    "sslkernels: y must be contiguous and of the dtype of logits");
    forward.y = y->mutable_data_ptr();
  }
  if (index) check_vector(*index, rows.rows, ScalarType::Long, "index");
  if (best) check_vector(*best, rows.rows, ScalarType::Long, "best");
  forward.index = index ? index->mutable_data_ptr<int64_t>() : nullptr;
  forward.best = best ? best->mutable_data_ptr<int64_t>() : nullptr;
  return forward;
}

inline GumbelBackward gumbel_backward(const GumbelRows& rows, const torch::stable::Tensor& logits,
                                      const OptionalTensor& grad, const OptionalTensor& uses,
                                      const OptionalTensor& mask, const torch::stable::Tensor& grad_logits) {
  GumbelBackward backward{};
  backward.rows = rows;
  backward.groups = 1;
  if (grad) {
    check_matrix(*grad, "grad");
    check_rows(*grad, rows, "grad");
    STD_TORCH_CHECK(rows.state.max != nullptr, "sslkernels: a gradient of y needs the state");
    backward.wide_grad = grad->scalar_type() != logits.scalar_type();
    STD_TORCH_CHECK(!backward.wide_grad || grad->scalar_type() == accumulation_type(logits),
                    "sslkernels: grad must have the dtype of logits or the one that it is accumulated in");
    backward.grad = grad->const_data_ptr();
    backward.grad_stride = grad->stride(0);
  }
  if (uses) {
    STD_TORCH_CHECK(uses->dim() == 2 && uses->size(0) > 0 && uses->size(1) == rows.columns && uses->is_contiguous() &&
                        uses->scalar_type() == accumulation_type(logits),
                    "sslkernels: uses must be contiguous rows of the columns of logits");
    STD_TORCH_CHECK(rows.plain.max != nullptr, "sslkernels: uses need the plain state");
    backward.uses = uses->const_data_ptr();
    backward.groups = uses->size(0);
  }
  backward.mask = row_mask(mask, rows.rows);
  check_rows(grad_logits, rows, "grad_logits");
  STD_TORCH_CHECK(grad_logits.is_contiguous() && grad_logits.scalar_type() == logits.scalar_type(),
                  "sslkernels: grad_logits must be contiguous and of the dtype of logits");
  backward.grad_logits = grad_logits.mutable_data_ptr();
  return backward;
}

inline ProbabilitySums probability_arguments(const GumbelRows& rows, const torch::stable::Tensor& logits,
                                             const OptionalTensor& mask, const torch::stable::Tensor& partial,
                                             int64_t chunk_rows) {
  STD_TORCH_CHECK(partial.dim() == 3 && partial.size(1) > 0 && partial.size(2) == rows.columns &&
                      partial.is_contiguous() && partial.scalar_type() == accumulation_type(logits),
                  "sslkernels: partial must be contiguous (chunks, groups, columns)");
  STD_TORCH_CHECK(rows.plain.max != nullptr, "sslkernels: probabilities need the plain state");
  STD_TORCH_CHECK(chunk_rows > 0 && partial.size(0) * chunk_rows * partial.size(1) >= rows.rows,
                  "sslkernels: too few chunks");
  return {rows, row_mask(mask, rows.rows), partial.size(1), chunk_rows, partial.size(0), partial.mutable_data_ptr()};
}

}  // namespace sslkernels
