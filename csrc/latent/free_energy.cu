// The free energy of K candidates: energies are read once, by 16 bytes along the candidates or along the results,
// whichever are contiguous. A thread keeps the sums of the energies that it reads; the partial sums of a result are
// combined in a fixed order.
#include <algorithm>

#include "core/cuda/launch.h"
#include "core/cuda/words.h"
#include "latent/energy_sums_cuda.h"
#include "latent/free_energy.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 512;  // per block if the candidates are contiguous
constexpr int kBatch = 4;          // groups in flight per thread

// A block has `width` units by `depth` threads that share the candidates of one, both powers of two. A unit is one
// result, or a group of contiguous results: `units` per outer index.
struct Plan {
  int width;
  int depth;
  int64_t units;
};

template <class T, bool kAlongCandidates>
struct Place {
  static constexpr int kSize = Groups<T>::kSize;
  static constexpr int kResults = kAlongCandidates ? 1 : kSize;
  static constexpr int kCandidates = kAlongCandidates ? kSize : 1;

  int lane;  // among the threads that share the candidates
  int unit;  // in the block
  int64_t outer;
  int64_t inner;
  int results;  // 0: no work

  __device__ __forceinline__ Place(const FreeEnergy& energies, const Plan& plan) {
    const int t = int(threadIdx.x);
    lane = kAlongCandidates ? t % plan.depth : t / plan.width;
    unit = kAlongCandidates ? t / plan.depth : t % plan.width;
    const int64_t global = int64_t(blockIdx.x) * plan.width + unit;
    outer = global / plan.units;
    inner = global % plan.units * kResults;
    const int64_t left = outer < energies.outer ? energies.inner - inner : 0;
    results = int(left < kResults ? left : kResults);
  }
  // Number of elements in the group from candidate k on.
  __device__ __forceinline__ int elements(int k, int count) const {
    if (results == 0 || k >= count) return 0;
    if constexpr (kAlongCandidates) return count - k < kSize ? count - k : kSize;
    return results;
  }
};

template <class A>
__device__ __forceinline__ void write_result(const FreeEnergy& energies, int64_t r, const SoftMinimum<A>& rule,
                                             const EnergySums<EnergyMath, A>& state) {
  static_cast<A*>(energies.value)[r] = rule.value(state);
  if (energies.lowest != nullptr) static_cast<A*>(energies.lowest)[r] = state.lowest;
  if (energies.total != nullptr) static_cast<A*>(energies.total)[r] = state.total;
}
template <class A>
__device__ __forceinline__ void write_result(const FreeEnergy& energies, int64_t r, const HardMinimum<A>& rule,
                                             const LowestEnergy<A>& state) {
  static_cast<A*>(energies.value)[r] = state.energy;
  if (energies.winner != nullptr) energies.winner[r] = state.index;
}

template <class T, bool kAlongCandidates, class Rule>
__device__ __forceinline__ void reduce(const FreeEnergy& energies, const Plan& plan, const Rule& rule) {
  using A = typename Accumulation<T>::type;
  using State = typename Rule::State;
  using Here = Place<T, kAlongCandidates>;
  constexpr int kSize = Here::kSize, kResults = Here::kResults;
  constexpr int kAtOnce = kAlongCandidates ? kBatch : sizeof(T) == 2 ? 1 : 2;
  const Here place(energies, plan);
  const T* from = static_cast<const T*>(energies.energy) + place.outer * energies.outer_stride +
                  place.inner * energies.inner_stride;
  const int64_t stride = kAlongCandidates ? energies.count_stride : 1;
  const int step = plan.depth * Here::kCandidates, count = place.results == 0 ? 0 : int(energies.count);
  const bool wide = are_words(from, stride, kAlongCandidates ? 0 : energies.count_stride);
  State states[kResults];
#pragma unroll
  for (int j = 0; j < kResults; ++j) states[j] = rule.identity();
  A seen = 0;
  for (int k = place.lane * Here::kCandidates; k < count; k += step * kAtOnce) {
    Words words[kAtOnce];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int first = k + b * step;
      words[b] = read_group<true>(from + first * energies.count_stride, stride, place.elements(first, count), wide);
    }
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int first = k + b * step;
      A values[kSize];
      unpack_group<T>(words[b], values);
      if constexpr (kAlongCandidates) {
        rule.add(states[0], values, place.elements(first, count), first);
      } else if (first < count) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const A one[1] = {values[j]};
          rule.set_count(states[j], seen);
          rule.add(states[j], one, 1, first);
        }
        seen += A(1);
      }
    }
  }
  if constexpr (!kAlongCandidates) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) rule.set_count(states[j], seen);
  }

  State* shared = reinterpret_cast<State*>(shared_memory());
  const int64_t r = place.outer * energies.inner + place.inner;
  if constexpr (kAlongCandidates) {
    State state = combine_lanes(rule, states[0], plan.depth < kWarpSize ? plan.depth : kWarpSize);
    if (plan.depth > kWarpSize) {
      if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = state;
      __syncthreads();
      const int warps = plan.depth / kWarpSize;
      state = rule.identity();
      for (int w = 0; w < warps; ++w) state = rule.combine(state, shared[place.unit * warps + w]);
    }
    if (place.lane == 0 && place.results > 0) write_result(energies, r, rule, state);
  } else {
    if (plan.depth > 1) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) shared[(j * plan.depth + place.lane) * plan.width + place.unit] = states[j];
      __syncthreads();
      if (place.lane > 0) return;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        for (int lane = 1; lane < plan.depth; ++lane) {
          states[j] = rule.combine(states[j], shared[(j * plan.depth + lane) * plan.width + place.unit]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (j < place.results) write_result(energies, r + j, rule, states[j]);
    }
  }
}

// Grid: plan.width units per block.
template <class T, bool kAlongCandidates>
__global__ void __launch_bounds__(kAlongCandidates ? kMostThreads : kThreads,
                                  (sizeof(T) == 8 ? 512 : 1024) / (kAlongCandidates ? kMostThreads : kThreads))
    free_energy_fwd_kernel(const __grid_constant__ FreeEnergy energies, const __grid_constant__ Plan plan) {
  using A = typename Accumulation<T>::type;
  if (energies.minimum) {
    reduce<T, kAlongCandidates>(energies, plan, HardMinimum<A>{});
  } else {
    reduce<T, kAlongCandidates>(energies, plan, SoftMinimum<A>{beta_of<A>(energies.beta)});
  }
}

// Grid: as in forward, by the strides of the gradient.
template <class T, bool kAlongCandidates>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    free_energy_bwd_kernel(const __grid_constant__ FreeEnergyGradient gradient, const __grid_constant__ Plan plan) {
  using A = typename Accumulation<T>::type;
  using Here = Place<T, kAlongCandidates>;
  constexpr int kSize = Here::kSize, kResults = Here::kResults;
  constexpr int kAtOnce = 2;
  const FreeEnergy& energies = gradient.energies;
  const Beta<A> beta = beta_of<A>(energies.beta);
  const Here place(energies, plan);
  if (place.results == 0) return;
  const int64_t offset = place.outer * energies.outer_stride + place.inner * energies.inner_stride;
  const T* from = static_cast<const T*>(energies.energy);  // null for the minimum
  T* to = static_cast<T*>(gradient.grad) + place.outer * gradient.outer_stride + place.inner * gradient.inner_stride;
  const int64_t from_stride = kAlongCandidates ? energies.count_stride : energies.inner_stride;
  const int64_t to_stride = kAlongCandidates ? gradient.count_stride : gradient.inner_stride;

  A lowest[kResults] = {}, scale[kResults] = {};
  int winner[kResults] = {};
#pragma unroll
  for (int j = 0; j < kResults; ++j) {
    if (j >= place.results) continue;
    const int64_t r = place.outer * energies.inner + place.inner + j;
    scale[j] = static_cast<const A*>(energies.value)[r];
    if (energies.minimum) {
      winner[j] = int(energies.winner[r]);
    } else {
      lowest[j] = static_cast<const A*>(energies.lowest)[r];
      scale[j] /= static_cast<const A*>(energies.total)[r];
    }
  }
  const int step = plan.depth * Here::kCandidates, count = int(energies.count);
  const bool wide_from =
      !energies.minimum && are_words(from + offset, from_stride, kAlongCandidates ? 0 : energies.count_stride);
  const bool wide_to = are_words(to, to_stride, kAlongCandidates ? 0 : gradient.count_stride);
  for (int k = place.lane * Here::kCandidates; k < count; k += step * kAtOnce) {
    Words words[kAtOnce] = {};
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      if (energies.minimum) break;
      const int first = k + b * step;
      words[b] = read_group<true>(from + (offset + first * energies.count_stride), from_stride,
                                  place.elements(first, count), wide_from);
    }
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int first = k + b * step;
      A values[kSize];
      unpack_group<T>(words[b], values);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int of = kAlongCandidates ? 0 : j;
        if (energies.minimum) {
          values[j] = first + (kAlongCandidates ? j : 0) == winner[of] ? scale[of] : A(0);
        } else {
          values[j] = energy_weight<EnergyMath>(values[j], lowest[of], A(1), beta) * scale[of];
        }
      }
      write_group(values, place.elements(first, count), to + first * gradient.count_stride, to_stride, wide_to);
    }
  }
}

int power_of_2(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

// Enough threads share the candidates to fill the device, and at least so many that they read whole cache lines.
template <class T>
Plan plan_for(const FreeEnergy& energies, bool along_candidates, int most) {
  constexpr int kSize = Groups<T>::kSize, kLine = 128 / 16;
  Plan plan{};
  plan.units = along_candidates ? energies.inner : ceil_div(energies.inner, kSize);
  const int64_t all = std::max<int64_t>(energies.outer * plan.units, 1);
  const int64_t wanted = ceil_div(int64_t(device_limits().processors) * 1024, all);
  if (along_candidates) {
    const int64_t groups = ceil_div(energies.count, kSize);
    const int64_t least = std::min<int64_t>(groups, std::max<int64_t>(kLine, ceil_div(groups, kBatch)));
    plan.depth = power_of_2(std::min(groups, std::max(wanted, least)), most);
    plan.width = std::max(kThreads / plan.depth, 1);
  } else {
    plan.depth = power_of_2(std::min(energies.count, wanted), kThreads / kLine);
    plan.width = kThreads / plan.depth;
  }
  return plan;
}

bool along_candidates(int64_t inner, int64_t inner_stride) { return inner == 1 || inner_stride != 1; }

template <class T>
void launch_fwd(const FreeEnergy& energies, void* stream) {
  using A = typename Accumulation<T>::type;
  constexpr int64_t kState = std::max(sizeof(EnergySums<EnergyMath, A>), sizeof(LowestEnergy<A>));
  const bool along = along_candidates(energies.inner, energies.inner_stride);
  check_count(energies.count);
  const Plan plan = plan_for<T>(energies, along, kMostThreads);
  const int threads = plan.width * plan.depth;
  const int64_t states = along ? (plan.depth > kWarpSize ? threads / kWarpSize : 0)
                               : (plan.depth > 1 ? int64_t(threads) * Groups<T>::kSize : 0);
  const LaunchShape shape{ceil_div(energies.outer * plan.units, plan.width), threads, states * kState, 1};
  launch("free_energy_fwd_kernel", along ? free_energy_fwd_kernel<T, true> : free_energy_fwd_kernel<T, false>, shape,
         stream, energies, plan);
}

template <class T>
void launch_bwd(const FreeEnergyGradient& gradient, void* stream) {
  const FreeEnergy& energies = gradient.energies;
  const bool along = along_candidates(energies.inner, gradient.inner_stride);
  check_count(energies.count);
  const Plan plan = plan_for<T>(energies, along, kThreads);
  const LaunchShape shape{ceil_div(energies.outer * plan.units, plan.width), plan.width * plan.depth, 0, 1};
  launch("free_energy_bwd_kernel", along ? free_energy_bwd_kernel<T, true> : free_energy_bwd_kernel<T, false>, shape,
         stream, gradient, plan);
}

}  // namespace

void launch_free_energy_fwd(const FreeEnergy& energies, void* stream) {
  with_element(energies.element, [&](auto zero) { launch_fwd<decltype(zero)>(energies, stream); });
}

void launch_free_energy_bwd(const FreeEnergyGradient& gradient, void* stream) {
  with_element(gradient.energies.element, [&](auto zero) { launch_bwd<decltype(zero)>(gradient, stream); });
}

}  // namespace sslkernels
