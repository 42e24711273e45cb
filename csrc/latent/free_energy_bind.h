// From tensors to the arguments of free_energy and prediction_energy, as bind.h.
#pragma once

#include "core/bind.h"
#include "latent/free_energy.h"
#include "latent/prediction_energy.h"

namespace sslkernels {

inline void* output(const OptionalTensor& tensor, int64_t rows, int64_t columns, torch::headeronly::ScalarType dtype,
                    const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == rows && tensor->size(1) == columns &&
                      tensor->is_contiguous() && tensor->scalar_type() == dtype,
                  "sslkernels: wrong shape or dtype of ", name);
  return tensor->mutable_data_ptr();
}

inline FreeEnergy free_energy_arguments(const torch::stable::Tensor& energy, const torch::stable::Tensor& value,
                                        const OptionalTensor& lowest, const OptionalTensor& total,
                                        const OptionalTensor& winner, double beta, bool minimum) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(energy.dim() == 3 && energy.size(1) > 0, "sslkernels: energy must be (outer, K, inner), K > 0");
  const auto type = accumulation_type(energy);
  FreeEnergy energies{};
  energies.element = element_of(energy);
  energies.energy = energy.const_data_ptr();
  energies.outer = energy.size(0);
  energies.count = energy.size(1);
  energies.inner = energy.size(2);
  energies.outer_stride = energy.stride(0);
  energies.count_stride = energy.stride(1);
  energies.inner_stride = energy.stride(2);
  energies.minimum = minimum;
  energies.beta = beta;
  energies.value = output(value, energies.outer, energies.inner, type, "value");
  energies.lowest = output(lowest, energies.outer, energies.inner, type, "lowest");
  energies.total = output(total, energies.outer, energies.inner, type, "total");
  energies.winner = static_cast<int64_t*>(output(winner, energies.outer, energies.inner, ScalarType::Long, "winner"));
  return energies;
}

// Without energies: of the minimum.
inline FreeEnergyGradient free_energy_gradient(const torch::stable::Tensor& grad_value, const OptionalTensor& energy,
                                               const OptionalTensor& lowest, const OptionalTensor& total,
                                               const OptionalTensor& winner, const torch::stable::Tensor& grad,
                                               double beta) {
  STD_TORCH_CHECK(energy ? lowest && total : winner.has_value(), "sslkernels: free_energy_bwd lacks what forward kept");
  FreeEnergyGradient gradient{};
  gradient.energies = free_energy_arguments(energy ? *energy : grad, grad_value, lowest, total, winner, beta, !energy);
  if (energy) {
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == energy->size(0) && grad.size(1) == energy->size(1) &&
                        grad.size(2) == energy->size(2) && grad.scalar_type() == energy->scalar_type(),
                    "sslkernels: grad must have the shape and dtype of energy");
  } else {
    gradient.energies.energy = nullptr;
  }
  gradient.grad = grad.mutable_data_ptr();
  gradient.outer_stride = grad.stride(0);
  gradient.count_stride = grad.stride(1);
  gradient.inner_stride = grad.stride(2);
  return gradient;
}

inline void check_features(const torch::stable::Tensor& tensor, int64_t batch, int64_t dim,
                           torch::headeronly::ScalarType dtype, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(0) == batch && tensor.size(last) == dim && tensor.scalar_type() == dtype,
                  "sslkernels: wrong shape or dtype of ", name);
  STD_TORCH_CHECK(tensor.stride(last) == 1 || dim <= 1 || tensor.numel() == 0, "sslkernels: ", name,
                  " must have unit stride in its last dimension");
}

inline PredictionEnergy prediction_energy_arguments(const torch::stable::Tensor& prediction,
                                                    const torch::stable::Tensor& target,
                                                    const torch::stable::Tensor& value, const OptionalTensor& weights,
                                                    double beta, bool minimum) {
  STD_TORCH_CHECK(prediction.dim() == 3 && target.dim() == 2 && prediction.size(1) > 0,
                  "sslkernels: prediction must be (B, K, D), K > 0, and target (B, D)");
  const auto type = accumulation_type(prediction);
  PredictionEnergy inputs{};
  inputs.batch = prediction.size(0);
  inputs.count = prediction.size(1);
  inputs.dim = prediction.size(2);
  check_features(prediction, inputs.batch, inputs.dim, prediction.scalar_type(), "prediction");
  check_features(target, inputs.batch, inputs.dim, prediction.scalar_type(), "target");
  check_vector(value, inputs.batch, type, "value");
  inputs.element = element_of(prediction);
  inputs.prediction = prediction.const_data_ptr();
  inputs.batch_stride = prediction.stride(0);
  inputs.count_stride = prediction.stride(1);
  inputs.target = target.const_data_ptr();
  inputs.target_stride = target.stride(0);
  inputs.minimum = minimum;
  inputs.beta = beta;
  inputs.value = value.mutable_data_ptr();
  inputs.weights = output(weights, inputs.batch, inputs.count, type, "weights");
  return inputs;
}

inline PredictionEnergyGradient prediction_energy_gradient(const torch::stable::Tensor& grad_value,
                                                           const torch::stable::Tensor& prediction,
                                                           const torch::stable::Tensor& target,
                                                           const torch::stable::Tensor& weights,
                                                           const OptionalTensor& grad_prediction,
                                                           const OptionalTensor& grad_target) {
  PredictionEnergyGradient gradient{};
  gradient.inputs = prediction_energy_arguments(prediction, target, grad_value, weights, 1, false);
  const PredictionEnergy& inputs = gradient.inputs;
  if (grad_prediction) {
    STD_TORCH_CHECK(grad_prediction->dim() == 3 && grad_prediction->size(1) == inputs.count,
                    "sslkernels: wrong shape of grad_prediction");
    check_features(*grad_prediction, inputs.batch, inputs.dim, prediction.scalar_type(), "grad_prediction");
    gradient.grad_prediction = grad_prediction->mutable_data_ptr();
    gradient.batch_stride = grad_prediction->stride(0);
    gradient.count_stride = grad_prediction->stride(1);
  }
  gradient.grad_target = output(grad_target, inputs.batch, inputs.dim, prediction.scalar_type(), "grad_target");
  return gradient;
}

}  // namespace sslkernels
