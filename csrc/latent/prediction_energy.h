// The arguments of the kernels of prediction_energy: the squared errors of K predictions of one target, and their free
// energy (free_energy.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/isa.h"
#include "latent/free_energy.h"

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
SSLKERNELS_CPU_KERNELS(
    void prediction_energy_parts(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end);
    void prediction_energy_finish(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end);
    void prediction_energy_bwd(const PredictionEnergyGradient& gradient, int64_t begin, int64_t end);)

// How a forward is cut up. A team of lanes adds up a part of a row, one prediction's features.
struct PredictionEnergyPlan {
  int team;         // a power of two, at most a warp
  int batch_rows;   // of a block, whose energies it reduces itself; 0: every part goes to memory, another kernel
                    // finishes
  int64_t parts;    // of a row
  int64_t columns;  // of a part
};

// Backward: candidates are split where there are few targets and features.
struct PredictionEnergyGradientPlan {
  int64_t parts;       // of the candidates
  int64_t candidates;  // of a part
};

PredictionEnergyPlan plan_prediction_energy(const PredictionEnergy& inputs);
PredictionEnergyGradientPlan plan_prediction_energy_bwd(const PredictionEnergyGradient& gradient);

// In elements of the accumulation type: what the launchers need for parts.
inline int64_t workspace_of(const PredictionEnergy& inputs, const PredictionEnergyPlan& plan) {
  return plan.batch_rows > 0 ? 0 : inputs.batch * plan.parts * inputs.count;
}
inline int64_t workspace_of(const PredictionEnergyGradient& gradient, const PredictionEnergyGradientPlan& plan) {
  const bool split = plan.parts > 1 && gradient.grad_target != nullptr;
  return split ? plan.parts * gradient.inputs.batch * gradient.inputs.dim : 0;
}

void launch_prediction_energy_fwd(const PredictionEnergy& inputs, const PredictionEnergyPlan& plan, void* workspace,
                                  void* stream);
void launch_prediction_energy_bwd(const PredictionEnergyGradient& gradient, const PredictionEnergyGradientPlan& plan,
                                  void* workspace, void* stream);

}  // namespace sslkernels
