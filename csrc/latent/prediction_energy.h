// prediction_energy: the squared errors of K predictions of one target, and their free energy (free_energy.h).
// Arguments of its kernels and launchers; `stream` is a cudaStream_t.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/isa.h"
#include "latent/free_energy.h"

namespace sslkernels {

// A is the accumulation type. The features of a row are contiguous. Null: not wanted.
struct PredictionEnergy {
  Element element;         // type of prediction and target
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
  void* value;     // A (batch)
  void* weights;   // A (batch, count): derivatives of value with respect to the energies
  void* energies;  // A (batch, count)
};

struct PredictionEnergyGradient {
  PredictionEnergy inputs;  // inputs: value, the upstream derivative, and weights
  void* grad_prediction;    // (batch, count, dim); exact zeros where the weight is 0
  int64_t batch_stride;
  int64_t count_stride;
  void* grad_target;  // (batch, dim), contiguous
};

constexpr int64_t kFeaturePart = 4096;  // features of a row that are summed together
constexpr int64_t kCandidatePart = 64;  // predictions of a row per unit of work

namespace {  // one copy for each instruction set of the CPU

inline int64_t feature_parts(const PredictionEnergy& inputs) {
  return std::max<int64_t>((inputs.dim + kFeaturePart - 1) / kFeaturePart, 1);
}
inline int64_t candidate_parts(const PredictionEnergy& inputs) {
  return (inputs.count + kCandidatePart - 1) / kCandidatePart;
}

}  // namespace

// parts: A (batch, feature parts, count). Units [begin, end) are of (batch, feature parts, candidate parts) to fill the
// parts, of the batch to reduce them, and of (batch, feature parts) in backward.
SSLKERNELS_CPU_KERNELS(
    void prediction_energy_parts(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end);
    void prediction_energy_finish(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end);
    void prediction_energy_bwd(const PredictionEnergyGradient& gradient, int64_t begin, int64_t end);)

// How the forward is divided. A team of lanes sums a part of a row, the features of one prediction.
struct PredictionEnergyPlan {
  int team;         // a power of two, at most a warp
  int batch_rows;   // rows whose energies a block reduces itself; 0: parts go to memory and a second kernel finishes
  int64_t parts;    // per row
  int64_t columns;  // per part
};

// Backward: candidates are split if there are few targets and features.
struct PredictionEnergyGradientPlan {
  int64_t parts;       // parts of the candidates
  int64_t candidates;  // per part
};

PredictionEnergyPlan plan_prediction_energy(const PredictionEnergy& inputs);
PredictionEnergyGradientPlan plan_prediction_energy_bwd(const PredictionEnergyGradient& gradient);

// Workspace for parts, in elements of the accumulation type.
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
