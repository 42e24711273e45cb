#pragma once

#include "latent/gaussian.h"
#include "random/random_stream_bind.h"

namespace sslkernels {

// A prior may have one row for all.
inline GaussianRows parse_gaussian_rows(const Tensor& tensor, const Tensor& mean, bool prior, const char* name) {
  const bool shared = prior && tensor.dim() == 2 && tensor.size(0) == 1;
  check_shape(tensor, {shared ? 1 : mean.size(0), mean.size(1)}, mean.scalar_type(), name);
  check_unit_stride(tensor, name);
  return {tensor.const_data_ptr(), shared ? 0 : tensor.stride(0), shared};
}

// The arguments that forward and backward share.
inline Gaussian parse_gaussian(const Tensor& mean, const Tensor& logvar, const OptionalTensor& prior_mean,
                               const OptionalTensor& prior_logvar, const OptionalTensor& row_ids,
                               const OptionalTensor& seed, double free_bits, double low, double high) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.numel() > 0, "sslkernels: mean must be a matrix with elements");
  STD_TORCH_CHECK(prior_mean.has_value() == prior_logvar.has_value(), "sslkernels: a prior has mean and logvar");
  Gaussian inputs{};
  inputs.element = element_of(mean);
  inputs.rows = mean.size(0);
  inputs.columns = mean.size(1);
  inputs.mean = parse_gaussian_rows(mean, mean, false, "mean");
  inputs.logvar = parse_gaussian_rows(logvar, mean, false, "logvar");
  if (prior_mean) inputs.prior_mean = parse_gaussian_rows(*prior_mean, mean, true, "prior_mean");
  if (prior_logvar) inputs.prior_logvar = parse_gaussian_rows(*prior_logvar, mean, true, "prior_logvar");
  inputs.row_ids = parse_row_ids(row_ids, inputs.rows);
  inputs.seed = seed ? parse_seed(*seed) : nullptr;
  inputs.free_bits = free_bits;
  inputs.low = low;
  inputs.high = high;
  return inputs;
}

// z or its gradient: (rows, samples, columns) with the samples or the rows outermost in memory.
inline GaussianSamples parse_gaussian_samples(const Tensor& z, Gaussian& inputs, ScalarType dtype) {
  STD_TORCH_CHECK(inputs.seed != nullptr && z.dim() == 3, "sslkernels: z needs a seed and 3 dimensions");
  inputs.samples = z.size(1);
  check_shape(z, {inputs.rows, inputs.samples, inputs.columns}, dtype, "z");
  check_unit_stride(z, "z");
  return {z.stride(0), z.stride(1)};
}

inline GaussianForward parse_gaussian_fwd(const Tensor& mean, const Tensor& logvar, const OptionalTensor& prior_mean,
                                          const OptionalTensor& prior_logvar, const OptionalTensor& row_ids,
                                          const OptionalTensor& seed, double free_bits, double low, double high,
                                          const OptionalTensor& z, const OptionalTensor& kl, bool by_row,
                                          const OptionalTensor& statistics) {
  GaussianForward forward{};
  forward.inputs = parse_gaussian(mean, logvar, prior_mean, prior_logvar, row_ids, seed, free_bits, low, high);
  const Gaussian& inputs = forward.inputs;
  const auto type = accumulation_type(mean);
  if (z) {
    forward.z_strides = parse_gaussian_samples(*z, forward.inputs, mean.scalar_type());
    forward.z = z->mutable_data_ptr();
  }
  const int64_t summed = mean.is_cuda() ? gaussian_columns_per_sum_cuda(inputs.element) : kGaussianChunk;
  forward.by_row = by_row;
  forward.kl_parts = (inputs.columns + summed - 1) / summed;
  forward.kl = writable(kl, {inputs.rows, by_row ? forward.kl_parts : inputs.columns}, type, "kl");
  forward.statistics = writable(statistics, {gaussian_blocks(inputs), 3, inputs.columns}, type, "statistics");
  return forward;
}

inline GaussianBackward parse_gaussian_bwd(const Tensor& mean, const Tensor& logvar, const OptionalTensor& prior_mean,
                                           const OptionalTensor& prior_logvar, const OptionalTensor& row_ids,
                                           const OptionalTensor& seed, double free_bits, double low, double high,
                                           const OptionalTensor& grad_z, const OptionalTensor& grad_kl, bool by_row,
                                           const OptionalTensor& grad_mean, const OptionalTensor& grad_logvar,
                                           const OptionalTensor& grad_prior_mean,
                                           const OptionalTensor& grad_prior_logvar) {
  GaussianBackward backward{};
  backward.inputs = parse_gaussian(mean, logvar, prior_mean, prior_logvar, row_ids, seed, free_bits, low, high);
  const Gaussian& inputs = backward.inputs;
  const auto type = accumulation_type(mean);
  if (grad_z) {
    backward.z_strides = parse_gaussian_samples(*grad_z, backward.inputs, mean.scalar_type());
    backward.grad_z = grad_z->const_data_ptr();
  }
  backward.by_row = by_row;
  if (grad_kl) {
    if (by_row) {
      check_shape(*grad_kl, {inputs.rows}, type, "grad_kl");
    } else {
      check_shape(*grad_kl, {inputs.rows, inputs.columns}, type, "grad_kl");
      check_unit_stride(*grad_kl, "grad_kl");
    }
    backward.grad_kl = grad_kl->const_data_ptr();
    backward.kl_stride = grad_kl->stride(0);
  }
  STD_TORCH_CHECK((!grad_prior_mean && !grad_prior_logvar) || (grad_kl && inputs.prior_mean.data != nullptr),
                  "sslkernels: the gradient of a prior needs one, and that of kl");
  const auto gradient = [&](const OptionalTensor& tensor, bool shared, const char* name) {
    return writable(tensor, {shared ? gaussian_blocks(inputs) : inputs.rows, inputs.columns},
                    shared ? type : mean.scalar_type(), name);
  };
  backward.grad_mean = gradient(grad_mean, false, "grad_mean");
  backward.grad_logvar = gradient(grad_logvar, false, "grad_logvar");
  backward.grad_prior_mean = gradient(grad_prior_mean, inputs.prior_mean.shared, "grad_prior_mean");
  backward.grad_prior_logvar = gradient(grad_prior_logvar, inputs.prior_logvar.shared, "grad_prior_logvar");
  return backward;
}

}  // namespace sslkernels
