// Sums over candidates on a GPU: the soft and the hard minimum of energies, and reads and writes of groups of them.
#pragma once

#include "core/cuda/launch.h"
#include "core/cuda/words.h"
#include "latent/free_energy.h"

namespace sslkernels {

// Candidate numbers are 32-bit, even some steps beyond the last.
inline void check_count(int64_t count) {
  if (count > int64_t(1) << 30) fail("the CUDA kernels take at most 2^30 candidates");
}

// Whether groups at multiples of `pitch` from `start` are aligned 16-byte words.
template <class T>
__device__ __forceinline__ bool are_words(const T* start, int64_t stride, int64_t pitch) {
  return stride == 1 && reinterpret_cast<uint64_t>(start) % 16 == 0 && pitch % Groups<T>::kSize == 0;
}

// A group of kSize elements `stride` apart; elements from n on are padded with zeros. kLast: they are not read again.
template <bool kLast, class T>
__device__ __forceinline__ Words read_group(const T* from, int64_t stride, int n, bool words) {
  constexpr int kSize = Groups<T>::kSize;
  if (words && n == kSize) {
    return kLast ? load_words_last(from) : load_words_cached(from);
  }
  typename Accumulation<T>::type values[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) values[j] = j < n ? to_float(from[j * stride]) : 0;
  return pack_group<T>(values);
}

template <class T, class A>
__device__ __forceinline__ void write_group(const A (&values)[Groups<T>::kSize], int n, T* to, int64_t stride,
                                            bool words) {
  if (words && n == Groups<T>::kSize) {
    store_words(to, pack_group<T>(values));
  } else {
#pragma unroll
    for (int j = 0; j < Groups<T>::kSize; ++j) {
      if (j < n) from_float(values[j], to + j * stride);
    }
  }
}

struct EnergyMath {
  static __device__ __forceinline__ float exp(float x) { return exp2_approx(x * 1.44269504f); }
  static __device__ __forceinline__ double exp(double x) { return std::exp(x); }
  template <class A>
  static __device__ __forceinline__ A log(A x) {
    return std::log(x);
  }
  template <class A>
  static __device__ __forceinline__ A log1p(A x) {
    return std::log1p(x);
  }
};

// The lowest candidate; ties go to the first, and NaN is the lowest of all.
template <class A>
struct LowestEnergy {
  A energy;
  int index;

  __device__ __forceinline__ bool before(const LowestEnergy& other) const {
    const bool is_nan = energy != energy, other_is_nan = other.energy != other.energy;
    if (is_nan != other_is_nan) return is_nan;
    return energy < other.energy || (!(other.energy < energy) && index < other.index);
  }
};

// How candidates are reduced: a State, and the results written from it.
template <class A>
struct SoftMinimum {
  using State = EnergySums<EnergyMath, A>;
  Beta<A> beta;

  __device__ __forceinline__ State identity() const { return State::identity(); }
  __device__ __forceinline__ State combine(const State& a, const State& b) const { return State::combine(a, b, beta); }
  template <int N>
  __device__ __forceinline__ void add(State& state, const A (&energies)[N], int n, int) const {
    state.add(energies, n, beta);
  }
  // If all states have seen the same number of candidates, the count takes one register.
  static __device__ __forceinline__ void set_count(State& state, A count) { state.count = count; }
  __device__ __forceinline__ A value(const State& state) const { return state.value(beta); }
  __device__ __forceinline__ A weight(const State& state, A energy, int) const {
    return energy_weight<EnergyMath>(energy, state.lowest, state.total, beta);
  }
};

template <class A>
struct HardMinimum {
  using State = LowestEnergy<A>;

  __device__ __forceinline__ State identity() const { return {A(INFINITY), INT32_MAX}; }
  __device__ __forceinline__ State combine(const State& a, const State& b) const { return b.before(a) ? b : a; }
  template <int N>
  __device__ __forceinline__ void add(State& state, const A (&energies)[N], int n, int first) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < n) state = combine(state, {energies[j], first + j});
    }
  }
  static __device__ __forceinline__ void set_count(State&, A) {}
  __device__ __forceinline__ A value(const State& state) const { return state.energy; }
  __device__ __forceinline__ A weight(const State& state, A, int k) const { return A(k == state.index); }
};

// Over `team` adjacent lanes of a warp, a power of two; returned to each of them.
template <class Rule>
__device__ __forceinline__ typename Rule::State combine_lanes(const Rule& rule, typename Rule::State state, int team) {
  for (int lanes = team / 2; lanes > 0; lanes /= 2) state = rule.combine(state, shuffle_xor(state, lanes));
  return state;
}

}  // namespace sslkernels
