// The squared errors of K predictions, their free energy, and its gradients, on the CPU.
#pragma once

#include <algorithm>

#include "../common/prediction_energy.h"
#include "isa.h"

namespace sslkernels {

constexpr int64_t kFeaturePart = 4096;  // features of a row that are added up before others
constexpr int64_t kCandidatePart = 64;  // predictions of a row that one thread takes in turn

inline int64_t feature_parts(const PredictionEnergy& inputs) {
  return std::max<int64_t>((inputs.dim + kFeaturePart - 1) / kFeaturePart, 1);
}
inline int64_t candidate_parts(const PredictionEnergy& inputs) {
  return (inputs.count + kCandidatePart - 1) / kCandidatePart;
}

// parts: A (batch, feature parts, count). The units [begin, end): of (batch, feature parts, candidate parts) where the
// parts are filled, of the batch where they are reduced, and of (batch, feature parts) in backward.
#define SSLKERNELS_DECLARE(isa)                                                                           \
  namespace isa {                                                                                         \
  void prediction_energy_parts(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end);  \
  void prediction_energy_finish(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end); \
  void prediction_energy_bwd(const PredictionEnergyGradient& gradient, int64_t begin, int64_t end);       \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
