// Squared errors of K predictions, their free energy, and its gradients.
//
// Forward: a team of lanes sums the errors of one prediction, or a part of them if there are few predictions with many
// features. A block that has all predictions of a target reduces their energies itself; otherwise a second kernel sums
// the parts and reduces them. Backward: a thread has one group of columns of a target and loops over its predictions,
// so that the gradient of the target needs no other thread. Predictions are read once, or not at all if their weight is
// 0. Every sum has a fixed order.
#include <algorithm>

#include "core/cuda/launch.h"
#include "core/cuda/words.h"
#include "latent/energy_sums_cuda.h"
#include "latent/prediction_energy.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
template <class T>
constexpr int kBatch = sizeof(T) == 2 ? 2 : 4;  // groups of predictions in flight per thread
constexpr int kEnergies = 1024;                 // per block, in shared memory
constexpr int kFinishThreads = 512;
constexpr int64_t kMostColumns = 1 << 16;  // per part: few enough for sums in float32

// Number of elements of the group at `column` that are within the first `columns`.
__device__ __forceinline__ int elements(int64_t column, int64_t columns, int size) {
  return column >= columns ? 0 : int(columns - column < size ? columns - column : size);
}

template <class T>
__device__ __forceinline__ const T* prediction_of(const PredictionEnergy& inputs, int64_t b, int64_t k) {
  return static_cast<const T*>(inputs.prediction) + b * inputs.batch_stride + k * inputs.count_stride;
}
template <class T>
__device__ __forceinline__ const T* target_of(const PredictionEnergy& inputs, int64_t b) {
  return static_cast<const T*>(inputs.target) + b * inputs.target_stride;
}

// The squared error of some columns of a prediction, by a team of lanes; returned to each of them.
template <class T>
__device__ __forceinline__ typename Accumulation<T>::type squared_error(const T* prediction, const T* target,
                                                                        int columns, int lane, int team) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize, kAtOnce = kBatch<T>;
  const int step = team * kSize;
  const bool wide = are_words(prediction, 1, 0), wide_target = are_words(target, 1, 0);
  A sums[kAtOnce] = {};
  for (int column = lane * kSize; column < columns; column += step * kAtOnce) {
    Words words[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = column + j * step;
      words[j] = read_group<true>(prediction + at, 1, elements(at, columns, kSize), wide);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = column + j * step;
      A p[kSize], y[kSize], sum = 0;
      unpack_group<T>(words[j], p);
      unpack_group<T>(read_group<false>(target + at, 1, elements(at, columns, kSize), wide_target), y);
#pragma unroll
      for (int c = 0; c < kSize; ++c) sum += (p[c] - y[c]) * (p[c] - y[c]);
      sums[j] += sum;
    }
  }
  A sum = sums[0];
#pragma unroll
  for (int j = 1; j < kAtOnce; ++j) sum += sums[j];
  for (int lanes = team / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  return sum;
}

// A warp reduces the energies of a target from shared memory.
template <class A, class Rule>
__device__ __forceinline__ void reduce_in_warp(const PredictionEnergy& inputs, const A* energies, int64_t b,
                                               const Rule& rule) {
  const int lane = int(threadIdx.x) % kWarpSize, count = int(inputs.count);
  typename Rule::State state = rule.identity();
  for (int k = lane; k < count; k += kWarpSize) {
    const A energy[1] = {energies[k]};
    rule.add(state, energy, 1, k);
  }
  state = combine_lanes(rule, state, kWarpSize);
  if (lane == 0) static_cast<A*>(inputs.value)[b] = rule.value(state);
  if (inputs.energies != nullptr) {
    A* kept = static_cast<A*>(inputs.energies) + b * count;
    for (int k = lane; k < count; k += kWarpSize) kept[k] = energies[k];
  }
  if (inputs.weights == nullptr) return;
  A* weights = static_cast<A*>(inputs.weights) + b * inputs.count;
  for (int k = lane; k < count; k += kWarpSize) weights[k] = rule.weight(state, energies[k], k);
}

// Grid: plan.batch_rows targets per block.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    prediction_energy_fwd_kernel(const __grid_constant__ PredictionEnergy inputs,
                                 const __grid_constant__ PredictionEnergyPlan plan) {
  using A = typename Accumulation<T>::type;
  A* energies = reinterpret_cast<A*>(shared_memory());
  const int64_t first = int64_t(blockIdx.x) * plan.batch_rows;
  const int64_t left = inputs.batch - first;
  const int targets = int(left < plan.batch_rows ? left : plan.batch_rows), count = int(inputs.count);
  const int lane = int(threadIdx.x) % plan.team, teams = kThreads / plan.team;
  const int rows = targets * count;
  // All threads of a warp take the same number of turns.
  for (int start = 0; start < rows; start += teams) {
    const int row = start + int(threadIdx.x) / plan.team;
    const bool there = row < rows;
    const int64_t b = first + (there ? row / count : 0);
    const A energy = squared_error(prediction_of<T>(inputs, b, there ? row % count : 0), target_of<T>(inputs, b),
                                   there ? int(inputs.dim) : 0, lane, plan.team);
    if (lane == 0 && there) energies[row] = energy;
  }
  __syncthreads();
  for (int t = int(threadIdx.x) / kWarpSize; t < targets; t += kThreads / kWarpSize) {
    if (inputs.minimum) {
      reduce_in_warp(inputs, energies + t * count, first + t, HardMinimum<A>{});
    } else {
      reduce_in_warp(inputs, energies + t * count, first + t, SoftMinimum<A>{beta_of<A>(inputs.beta)});
    }
  }
}

// Grid: kThreads / plan.team parts per block, of (batch, plan.parts, count).
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    prediction_energy_parts_kernel(const __grid_constant__ PredictionEnergy inputs,
                                   const __grid_constant__ PredictionEnergyPlan plan,
                                   typename Accumulation<T>::type* parts) {
  using A = typename Accumulation<T>::type;
  const int lane = int(threadIdx.x) % plan.team;
  const int64_t unit = int64_t(blockIdx.x) * (kThreads / plan.team) + int(threadIdx.x) / plan.team;
  const bool there = unit < inputs.batch * plan.parts * inputs.count;
  const int64_t row = there ? unit / inputs.count : 0, b = row / plan.parts;
  const int64_t begin = row % plan.parts * plan.columns;
  const int64_t columns = plan.columns < inputs.dim - begin ? plan.columns : inputs.dim - begin;
  const A sum = squared_error(prediction_of<T>(inputs, b, there ? unit % inputs.count : 0) + begin,
                              target_of<T>(inputs, b) + begin, there ? int(columns) : 0, lane, plan.team);
  if (lane == 0 && there) parts[unit] = sum;
}

template <class A, class Rule>
__device__ __forceinline__ void finish_row(const PredictionEnergy& inputs, int64_t number, A* parts, const Rule& rule) {
  using State = typename Rule::State;
  const int64_t b = blockIdx.x;
  const int count = int(inputs.count);
  A* own = parts + b * number * count;  // the sums overwrite the first part
  State state = rule.identity();
  for (int k = int(threadIdx.x); k < count; k += int(blockDim.x)) {
    A energy[1] = {A(0)};
    for (int64_t part = 0; part < number; ++part) energy[0] += own[part * count + k];
    own[k] = energy[0];
    if (inputs.energies != nullptr) static_cast<A*>(inputs.energies)[b * count + k] = energy[0];
    rule.add(state, energy, 1, k);
  }
  state = combine_lanes(rule, state, kWarpSize);
  State* of_warps = reinterpret_cast<State*>(shared_memory());
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = state;
  __syncthreads();
  state = of_warps[0];
  for (int w = 1; w < int(blockDim.x) / kWarpSize; ++w) state = rule.combine(state, of_warps[w]);
  if (threadIdx.x == 0) static_cast<A*>(inputs.value)[b] = rule.value(state);
  if (inputs.weights == nullptr) return;
  A* weights = static_cast<A*>(inputs.weights) + b * count;
  for (int k = int(threadIdx.x); k < count; k += int(blockDim.x)) weights[k] = rule.weight(state, own[k], k);
}

// Grid: one block per target.
template <class A>
__global__ void __launch_bounds__(kFinishThreads, 2)
    prediction_energy_finish_kernel(const __grid_constant__ PredictionEnergy inputs, int64_t number, A* parts) {
  if (inputs.minimum) {
    finish_row(inputs, number, parts, HardMinimum<A>{});
  } else {
    finish_row(inputs, number, parts, SoftMinimum<A>{beta_of<A>(inputs.beta)});
  }
}

// Grid: plan.parts x one thread per group of columns of the targets. `parts`: partial gradients of the target,
// (plan.parts, batch, dim), or null if there is one part.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    prediction_energy_bwd_kernel(const __grid_constant__ PredictionEnergyGradient gradient,
                                 const __grid_constant__ PredictionEnergyGradientPlan plan, int64_t groups,
                                 int64_t blocks, typename Accumulation<T>::type* parts) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize, kAtOnce = kBatch<T>;
  const PredictionEnergy& inputs = gradient.inputs;
  const int64_t part = blockIdx.x / blocks;
  const int64_t unit = int64_t(blockIdx.x) % blocks * kThreads + threadIdx.x;
  const int64_t b = unit / groups, column = unit % groups * kSize, dim = inputs.dim;
  if (b >= inputs.batch) return;
  const int n = elements(column, dim, kSize);
  const T* prediction = prediction_of<T>(inputs, b, 0) + column;
  T* grad = static_cast<T*>(gradient.grad_prediction);
  if (grad != nullptr) grad += b * gradient.batch_stride + column;
  const A* weights = static_cast<const A*>(inputs.weights) + b * inputs.count;
  const A upstream = A(2) * static_cast<const A*>(inputs.value)[b];
  A y[kSize], sum[kSize] = {};
  const T* target = target_of<T>(inputs, b) + column;
  unpack_group<T>(read_group<false>(target, 1, n, are_words(target, 1, 0)), y);
  const bool wide = are_words(prediction, 1, inputs.count_stride),
             wide_grad = are_words(grad, 1, gradient.count_stride);

  const int begin = int(part * plan.candidates), left = int(inputs.count) - begin;
  const int end = begin + (plan.candidates < left ? int(plan.candidates) : left);
  for (int k = begin; k < end; k += kAtOnce) {
    A factor[kAtOnce] = {};
    Words words[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (k + j < end) factor[j] = upstream * weights[k + j];
      if (factor[j] != A(0)) {
        words[j] = read_group<true>(prediction + (k + j) * inputs.count_stride, 1, n, wide);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      A p[kSize];
      unpack_group<T>(words[j], p);
#pragma unroll
      for (int c = 0; c < kSize; ++c) {
        p[c] = factor[j] != A(0) ? factor[j] * (p[c] - y[c]) : A(0);
        sum[c] -= p[c];
      }
      if (grad != nullptr && k + j < end) {
        write_group(p, n, grad + (k + j) * gradient.count_stride, 1, wide_grad);
      }
    }
  }
  if (parts != nullptr) {
    A* out = parts + (part * inputs.batch + b) * dim;
#pragma unroll
    for (int c = 0; c < kSize; ++c) {
      if (c < n) out[column + c] = sum[c];
    }
  } else if (gradient.grad_target != nullptr) {
    T* to = static_cast<T*>(gradient.grad_target) + (b * dim + column);
    write_group(sum, n, to, 1, are_words(to, 1, 0));
  }
}

// Grid: one thread per element of the gradient of the targets.
template <class T>
__global__ void __launch_bounds__(kThreads) prediction_energy_target_kernel(const typename Accumulation<T>::type* parts,
                                                                            int64_t number, int64_t elements, T* grad) {
  using A = typename Accumulation<T>::type;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= elements) return;
  A sum = 0;
  for (int64_t part = 0; part < number; ++part) sum += parts[part * elements + at];
  from_float(sum, grad + at);
}

int64_t group_size(Element element) { return element == Element::kDouble ? 2 : element == Element::kFloat ? 4 : 8; }

template <class T>
void launch_fwd(const PredictionEnergy& inputs, const PredictionEnergyPlan& plan, void* workspace, void* stream) {
  using A = typename Accumulation<T>::type;
  if (plan.batch_rows > 0) {
    const LaunchShape shape{ceil_div(inputs.batch, plan.batch_rows), kThreads,
                            plan.batch_rows * inputs.count * int64_t(sizeof(A)), 1};
    return launch("prediction_energy_fwd_kernel", prediction_energy_fwd_kernel<T>, shape, stream, inputs, plan);
  }
  A* parts = static_cast<A*>(workspace);
  const int64_t units = inputs.batch * plan.parts * inputs.count;
  launch("prediction_energy_parts_kernel", prediction_energy_parts_kernel<T>,
         LaunchShape{ceil_div(units, kThreads / plan.team), kThreads, 0, 1}, stream, inputs, plan, parts);
  constexpr int64_t kState = std::max(sizeof(EnergySums<EnergyMath, A>), sizeof(LowestEnergy<A>));
  const int warps = int(std::min<int64_t>(ceil_div(inputs.count, kWarpSize), kFinishThreads / kWarpSize));
  launch("prediction_energy_finish_kernel", prediction_energy_finish_kernel<A>,
         LaunchShape{inputs.batch, warps * kWarpSize, warps * kState, 1}, stream, inputs, plan.parts, parts);
}

template <class T>
void launch_bwd(const PredictionEnergyGradient& gradient, const PredictionEnergyGradientPlan& plan, void* workspace,
                void* stream) {
  using A = typename Accumulation<T>::type;
  const PredictionEnergy& inputs = gradient.inputs;
  const int64_t groups = ceil_div(inputs.dim, Groups<T>::kSize), blocks = ceil_div(inputs.batch * groups, kThreads);
  A* parts = workspace_of(gradient, plan) > 0 ? static_cast<A*>(workspace) : nullptr;
  launch("prediction_energy_bwd_kernel", prediction_energy_bwd_kernel<T>,
         LaunchShape{blocks * plan.parts, kThreads, 0, 1}, stream, gradient, plan, groups, blocks, parts);
  if (parts == nullptr) return;
  const int64_t elements = inputs.batch * inputs.dim;
  launch("prediction_energy_target_kernel", prediction_energy_target_kernel<T>,
         LaunchShape{ceil_div(elements, kThreads), kThreads, 0, 1}, stream, parts, plan.parts, elements,
         static_cast<T*>(gradient.grad_target));
}

}  // namespace

PredictionEnergyPlan plan_prediction_energy(const PredictionEnergy& inputs) {
  constexpr int64_t kLine = 64 / 16;  // minimum groups per team, if a row has as many
  constexpr int64_t kInTurn = 4;      // groups per lane
  const int64_t size = group_size(inputs.element), groups = std::max<int64_t>(ceil_div(inputs.dim, size), 1);
  const int64_t processors = device_limits().processors;
  PredictionEnergyPlan plan{};
  plan.team = 1;
  while (plan.team < kWarpSize && plan.team < std::max(ceil_div(groups, kInTurn), std::min(groups, kLine))) {
    plan.team *= 2;
  }
  const int64_t rows = inputs.batch * inputs.count;
  const int64_t wanted = processors * 2048 / plan.team;  // teams that fill the device
  const int64_t most = ceil_div(groups, plan.team * kInTurn);
  plan.parts = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(rows, 1)), 1, most);
  plan.parts = std::max(plan.parts, ceil_div(inputs.dim, kMostColumns));
  plan.columns = ceil_div(ceil_div(groups, plan.parts), plan.team) * plan.team * size;
  plan.parts = std::max<int64_t>(ceil_div(inputs.dim, plan.columns), 1);
  if (plan.parts > 1 || inputs.count > kEnergies || inputs.batch < processors) return plan;
  // Four rows per team, as long as that leaves several blocks per multiprocessor.
  const int64_t of_block = std::min<int64_t>(4 * (kThreads / plan.team), kEnergies);
  const int64_t targets = std::min(of_block / inputs.count, inputs.batch / (8 * processors));
  plan.batch_rows = int(std::max<int64_t>(targets, 1));
  return plan;
}

PredictionEnergyGradientPlan plan_prediction_energy_bwd(const PredictionEnergyGradient& gradient) {
  constexpr int64_t kLeast = 16;  // candidates per part
  const PredictionEnergy& inputs = gradient.inputs;
  const int64_t groups = std::max<int64_t>(inputs.batch * ceil_div(inputs.dim, group_size(inputs.element)), 1);
  const int64_t wanted = ceil_div(int64_t(device_limits().processors) * 1024, groups);
  PredictionEnergyGradientPlan plan{};
  plan.parts = std::clamp<int64_t>(wanted, 1, ceil_div(inputs.count, kLeast));
  plan.candidates = ceil_div(inputs.count, plan.parts);
  plan.parts = ceil_div(inputs.count, plan.candidates);
  return plan;
}

void launch_prediction_energy_fwd(const PredictionEnergy& inputs, const PredictionEnergyPlan& plan, void* workspace,
                                  void* stream) {
  check_count(inputs.count);
  with_element(inputs.element, [&](auto zero) { launch_fwd<decltype(zero)>(inputs, plan, workspace, stream); });
}

void launch_prediction_energy_bwd(const PredictionEnergyGradient& gradient, const PredictionEnergyGradientPlan& plan,
                                  void* workspace, void* stream) {
  check_count(gradient.inputs.count);
  with_element(gradient.inputs.element,
               [&](auto zero) { launch_bwd<decltype(zero)>(gradient, plan, workspace, stream); });
}

}  // namespace sslkernels
