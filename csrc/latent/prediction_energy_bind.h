#pragma once

#include "core/bind.h"
#include "latent/prediction_energy.h"

namespace sslkernels {

inline PredictionEnergy parse_prediction_energy_fwd(const Tensor& prediction, const Tensor& target, const Tensor& value,
                                                    const OptionalTensor& weights, const OptionalTensor& energies,
                                                    double beta, bool minimum) {
  STD_TORCH_CHECK(prediction.dim() == 3 && target.dim() == 2 && prediction.size(1) > 0,
                  "sslkernels: prediction must be (B, K, D), K > 0, and target (B, D)");
  const auto type = accumulation_type(prediction);
  PredictionEnergy inputs{};
  inputs.element = element_of(prediction);
  inputs.batch = prediction.size(0);
  inputs.count = prediction.size(1);
  inputs.dim = prediction.size(2);
  check_unit_stride(prediction, "prediction");
  check_shape(target, {inputs.batch, inputs.dim}, prediction.scalar_type(), "target");
  check_unit_stride(target, "target");
  inputs.prediction = prediction.const_data_ptr();
  inputs.batch_stride = prediction.stride(0);
  inputs.count_stride = prediction.stride(1);
  inputs.target = target.const_data_ptr();
  inputs.target_stride = target.stride(0);
  inputs.minimum = minimum;
  inputs.beta = beta;
  inputs.value = writable(value, {inputs.batch}, type, "value");
  inputs.weights = writable(weights, {inputs.batch, inputs.count}, type, "weights");
  inputs.energies = writable(energies, {inputs.batch, inputs.count}, type, "energies");
  return inputs;
}

inline PredictionEnergyGradient parse_prediction_energy_bwd(const Tensor& grad_value, const Tensor& prediction,
                                                            const Tensor& target, const Tensor& weights,
                                                            const OptionalTensor& grad_prediction,
                                                            const OptionalTensor& grad_target) {
  PredictionEnergyGradient gradient{};
  gradient.inputs = parse_prediction_energy_fwd(prediction, target, grad_value, weights, {}, 1, false);
  const PredictionEnergy& inputs = gradient.inputs;
  if (grad_prediction) {
    check_shape(*grad_prediction, {inputs.batch, inputs.count, inputs.dim}, prediction.scalar_type(),
                "grad_prediction");
    check_unit_stride(*grad_prediction, "grad_prediction");
    gradient.grad_prediction = grad_prediction->mutable_data_ptr();
    gradient.batch_stride = grad_prediction->stride(0);
    gradient.count_stride = grad_prediction->stride(1);
  }
  gradient.grad_target = writable(grad_target, {inputs.batch, inputs.dim}, prediction.scalar_type(), "grad_target");
  return gradient;
}

}  // namespace sslkernels
