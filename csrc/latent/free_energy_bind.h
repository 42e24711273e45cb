#pragma once

#include "core/bind.h"
#include "latent/free_energy.h"

namespace sslkernels {

inline FreeEnergy parse_free_energy_fwd(const Tensor& energy, const Tensor& value, const OptionalTensor& lowest,
                                        const OptionalTensor& total, const OptionalTensor& winner, double beta,
                                        bool minimum) {
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
  const Shape shape{energies.outer, energies.inner};
  energies.value = writable(value, shape, type, "value");
  energies.lowest = writable(lowest, shape, type, "lowest");
  energies.total = writable(total, shape, type, "total");
  energies.winner = writable<int64_t>(winner, shape, ScalarType::Long, "winner");
  return energies;
}

// The gradient of the minimum needs no energies, so their absence selects it.
inline FreeEnergyGradient parse_free_energy_bwd(const Tensor& grad_value, const OptionalTensor& energy,
                                                const OptionalTensor& lowest, const OptionalTensor& total,
                                                const OptionalTensor& winner, const Tensor& grad, double beta) {
  STD_TORCH_CHECK(energy ? lowest && total : winner.has_value(), "sslkernels: free_energy_bwd lacks what forward kept");
  FreeEnergyGradient gradient{};
  gradient.energies = parse_free_energy_fwd(energy ? *energy : grad, grad_value, lowest, total, winner, beta, !energy);
  FreeEnergy& energies = gradient.energies;
  if (energy) {
    check_shape(grad, {energies.outer, energies.count, energies.inner}, energy->scalar_type(), "grad");
  } else {
    energies.energy = nullptr;
  }
  gradient.grad = grad.mutable_data_ptr();
  gradient.outer_stride = grad.stride(0);
  gradient.count_stride = grad.stride(1);
  gradient.inner_stride = grad.stride(2);
  return gradient;
}

}  // namespace sslkernels
