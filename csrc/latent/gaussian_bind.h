// From tensors to the arguments of the kernels of gaussian_rsample and gaussian_kl, as bind.h.
#pragma once

#include "latent/gaussian.h"
#include "random/random_stream_bind.h"

namespace sslkernels {

inline void check_output(const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape,
                         torch::headeronly::ScalarType dtype, const char* name) {
  bool same = tensor.dim() == int64_t(shape.size()) && tensor.is_contiguous() && tensor.scalar_type() == dtype;
  int64_t dim = 0;
  for (const int64_t size : shape) same = same && tensor.size(dim++) == size;
  STD_TORCH_CHECK(same, "sslkernels: wrong shape, layout or dtype of ", name);
}

// prior: it may have one row for all.
inline GaussianRows gaussian_rows(const torch::stable::Tensor& tensor, const torch::stable::Tensor& mean, bool prior,
                                  const char* name) {
  const bool shared = prior && tensor.dim() == 2 && tensor.size(0) == 1;
  STD_TORCH_CHECK(tensor.dim() == 2 && (shared || tensor.size(0) == mean.size(0)) && tensor.size(1) == mean.size(1) &&
                      tensor.scalar_type() == mean.scalar_type(),
                  "sslkernels: ", name, " must have the shape and dtype of mean");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) == 1, "sslkernels: the columns of ", name,
                  " must lie behind one another");
  return {tensor.const_data_ptr(), shared ? 0 : tensor.stride(0), shared};
}

inline Gaussian gaussian_arguments(const torch::stable::Tensor& mean, const torch::stable::Tensor& logvar,
                                   const OptionalTensor& prior_mean, const OptionalTensor& prior_logvar,
                                   const OptionalTensor& row_ids, const OptionalTensor& seed, double free_bits,
                                   double low, double high) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.numel() > 0, "sslkernels: mean must be a matrix with elements");
  STD_TORCH_CHECK(prior_mean.has_value() == prior_logvar.has_value(), "sslkernels: a prior has mean and logvar");
  Gaussian inputs{};
  inputs.element = element_of(mean);
  inputs.rows = mean.size(0);
  inputs.columns = mean.size(1);
  inputs.mean = gaussian_rows(mean, mean, false, "mean");
  inputs.logvar = gaussian_rows(logvar, mean, false, "logvar");
  if (prior_mean) inputs.prior_mean = gaussian_rows(*prior_mean, mean, true, "prior_mean");
  if (prior_logvar) inputs.prior_logvar = gaussian_rows(*prior_logvar, mean, true, "prior_logvar");
  inputs.row_ids = row_ids_pointer(row_ids, inputs.rows);
  inputs.seed = seed ? seed_pointer(*seed) : nullptr;
  inputs.free_bits = free_bits;
  inputs.low = low;
  inputs.high = high;
  return inputs;
}

// z or its gradient, (rows, samples, columns) with the samples or the rows outermost in memory.
inline GaussianSamples gaussian_samples(const torch::stable::Tensor& z, Gaussian& inputs,
                                        torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(z.dim() == 3 && z.size(0) == inputs.rows && z.size(2) == inputs.columns && z.scalar_type() == dtype &&
                      (z.stride(2) == 1 || z.size(2) == 1),
                  "sslkernels: z must be (rows, samples, columns), of the dtype of mean");
  STD_TORCH_CHECK(inputs.seed != nullptr, "sslkernels: z needs a seed");
  inputs.samples = z.size(1);
  return {z.stride(0), z.stride(1)};
}

// columns_of_sum: that the kernel adds up to one number.
inline GaussianForward gaussian_forward(const Gaussian& inputs, const torch::stable::Tensor& mean,
                                        const OptionalTensor& z, const OptionalTensor& kl, bool by_row,
                                        const OptionalTensor& statistics, int64_t columns_of_sum) {
  GaussianForward forward{};
  forward.inputs = inputs;
  const auto type = accumulation_type(mean);
  if (z) {
    forward.z_at = gaussian_samples(*z, forward.inputs, mean.scalar_type());
    forward.z = z->mutable_data_ptr();
  }
  forward.by_row = by_row;
  forward.kl_parts = (inputs.columns + columns_of_sum - 1) / columns_of_sum;
  if (kl) {
    check_output(*kl, {inputs.rows, by_row ? forward.kl_parts : inputs.columns}, type, "kl");
    forward.kl = kl->mutable_data_ptr();
  }
  if (statistics) {
    const int64_t blocks = (inputs.rows + kGaussianRowsOfBlock - 1) / kGaussianRowsOfBlock;
    check_output(*statistics, {blocks, 3, inputs.columns}, type, "statistics");
    forward.statistics = statistics->mutable_data_ptr();
  }
  return forward;
}

inline GaussianBackward gaussian_backward(const Gaussian& inputs, const torch::stable::Tensor& mean,
                                          const OptionalTensor& grad_z, const OptionalTensor& grad_kl, bool by_row,
                                          const OptionalTensor& grad_mean, const OptionalTensor& grad_logvar,
                                          const OptionalTensor& grad_prior_mean,
                                          const OptionalTensor& grad_prior_logvar) {
  GaussianBackward backward{};
  backward.inputs = inputs;
  const auto type = accumulation_type(mean);
  if (grad_z) {
    backward.z_at = gaussian_samples(*grad_z, backward.inputs, mean.scalar_type());
    backward.grad_z = grad_z->const_data_ptr();
  }
  backward.by_row = by_row;
  if (grad_kl) {
    if (by_row) check_output(*grad_kl, {inputs.rows}, type, "grad_kl");
    if (!by_row) check_output(*grad_kl, {inputs.rows, inputs.columns}, type, "grad_kl");
    backward.grad_kl = grad_kl->const_data_ptr();
  }
  const auto gradient = [&](const OptionalTensor& tensor, bool shared, const char* name) -> void* {
    if (!tensor) return nullptr;
    const int64_t blocks = (inputs.rows + kGaussianRowsOfBlock - 1) / kGaussianRowsOfBlock;
    check_output(*tensor, {shared ? blocks : inputs.rows, inputs.columns}, shared ? type : mean.scalar_type(), name);
    return tensor->mutable_data_ptr();
  };
  STD_TORCH_CHECK((!grad_prior_mean && !grad_prior_logvar) || (grad_kl && inputs.prior_mean.data != nullptr),
                  "sslkernels: the gradient of a prior needs one, and that of kl");
  backward.grad_mean = gradient(grad_mean, false, "grad_mean");
  backward.grad_logvar = gradient(grad_logvar, false, "grad_logvar");
  backward.grad_prior_mean = gradient(grad_prior_mean, inputs.prior_mean.shared, "grad_prior_mean");
  backward.grad_prior_logvar = gradient(grad_prior_logvar, inputs.prior_logvar.shared, "grad_prior_logvar");
  return backward;
}

}  // namespace sslkernels
