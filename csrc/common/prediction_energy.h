// The arguments of the kernels of prediction_energy: the squared errors of K predictions of one target, and their free
// energy (free_energy.h).
#pragma once

#include <cstdint>

#include "free_energy.h"

namespace sslkernels {

// A is the accumulation type. The features of a row lie side by side. Null: not asked for.
struct PredictionEnergy {
  Element element;         // of prediction and target
  const void* prediction;  // (batch, count, dim)
  int64_t batch_stride;
  int64_t count_stride;
  const void* target;  // (batch, dim)
  int64_t target_stride;
  int64_t batch;
  int64_t count;
  int64_t dim;
  bool minimum;  // else soft
  double beta;
  void* value;    // A (batch)
  void* weights;  // A (batch, count): the derivatives of value in the energies
};

struct PredictionEnergyGradient {
  PredictionEnergy inputs;  // value and weights are read: the derivative with respect to value, and the weights
  void* grad_prediction;    // (batch, count, dim); exact zeros where the derivative in the energy is 0
  int64_t batch_stride;
  int64_t count_stride;
  void* grad_target;  // (batch, dim), contiguous
};

}  // namespace sslkernels
