// The squared errors of K predictions, their free energy, and its gradients, on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/prediction_energy.h"

namespace sslkernels {

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
