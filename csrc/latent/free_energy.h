// The free energy of K candidates: arguments of its kernels and launchers, and the arithmetic of sums over candidates,
// which every reduction of energies shares. `stream` is a cudaStream_t.
//
// With d = E - lowest it is lowest - log(mean(exp(-beta d))) / beta. Near 1 the mean loses the digits of d, so the sum
// of (1 - exp(-beta d)) / beta, the deficit, is kept beside it: a mean of the d if beta is small, in units of the
// energy.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// Energies (outer, count, inner) of any strides; the other arrays are contiguous (outer, inner). A is the accumulation
// type. Null: not wanted.
struct FreeEnergy {
  Element element;
  const void* energy;
  int64_t outer;
  int64_t count;
  int64_t inner;
  int64_t outer_stride;
  int64_t count_stride;
  int64_t inner_stride;
  bool minimum;  // else soft
  double beta;
  void* value;      // A
  void* lowest;     // A, for "soft"
  void* total;      // A, for "soft"
  int64_t* winner;  // for "min"
};

// energies.value is an input: the upstream derivative. For the minimum the energies are null, because they are not
// needed, and energies.element is the type of the gradient.
struct FreeEnergyGradient {
  FreeEnergy energies;
  void* grad;  // (outer, count, inner)
  int64_t outer_stride;
  int64_t count_stride;
  int64_t inner_stride;
};

namespace {  // one copy for each instruction set of the CPU

template <class A>
struct Beta {
  A value;
  A inverse;
};

template <class A>
SSLKERNELS_HD Beta<A> beta_of(double beta) {
  return {A(beta), A(1 / beta)};
}

// (1 - exp(-x)) / x * d for x = beta d in [0, 1/2), where x may have lost digits of d: Taylor series, within 1.4e-8.
SSLKERNELS_HD float deficit_near_zero(float d, float x, float) {
  float p = -2.4801587e-5f;
  p = p * x + 1.9841270e-4f;
  p = p * x - 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x - 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x - 0.5f;
  return d + d * (x * p);
}
SSLKERNELS_HD double deficit_near_zero(double d, double x, double inverse) {
  return x == 0 ? d : -std::expm1(-x) * inverse;
}

SSLKERNELS_HD float epsilon(float) { return 0x1p-23f; }
SSLKERNELS_HD double epsilon(double) { return 0x1p-52; }

template <class A>
struct EnergyTerm {
  A exponential;  // exp(-beta d)
  A deficit;      // (1 - exp(-beta d)) / beta
};

// d is >= 0, infinite or NaN. Math provides exp(x) for x <= 0, log(x) for x in (0, 1] and log1p(x) for x in (-1/2, 0].
template <class Math, class A>
SSLKERNELS_HD EnergyTerm<A> energy_term(A d, const Beta<A>& beta) {
  const A x = beta.value * d;
  const A e = Math::exp(-x);
  const A near = deficit_near_zero(d, x, beta.inverse), far = (A(1) - e) * beta.inverse;
  return {e, x < A(0.5) ? near : far};
}

// Sums over candidates relative to the lowest of them. `lowest` is never NaN; the sums are NaN if an energy is.
template <class Math, class A>
struct EnergySums {
  A lowest;
  A count;
  A total;    // sum of exponentials
  A deficit;  // sum of deficits

  static SSLKERNELS_HD EnergySums identity() { return {A(INFINITY), A(0), A(0), A(0)}; }

  // The sums relative to `to`, at most the lowest.
  SSLKERNELS_HD EnergySums moved(A to, const Beta<A>& beta) const {
    const EnergyTerm<A> term = energy_term<Math>(lowest == to ? A(0) : lowest - to, beta);
    return {to, count, total * term.exponential, deficit * term.exponential + count * term.deficit};
  }

  static SSLKERNELS_HD EnergySums combine(const EnergySums& a, const EnergySums& b, const Beta<A>& beta) {
    const A to = b.lowest < a.lowest ? b.lowest : a.lowest;
    const EnergySums x = a.moved(to, beta), y = b.moved(to, beta);
    return {to, x.count + y.count, x.total + y.total, x.deficit + y.deficit};
  }

  // Adds the first n of N energies.
  template <int N>
  SSLKERNELS_HD void add(const A (&energies)[N], int n, const Beta<A>& beta) {
    A to = lowest;
    for (int j = 0; j < N; ++j) to = j < n && energies[j] < to ? energies[j] : to;
    if (to < lowest) *this = moved(to, beta);
    for (int j = 0; j < N; ++j) {
      if (j >= n) continue;
      const EnergyTerm<A> term = energy_term<Math>(energies[j] == to ? A(0) : energies[j] - to, beta);
      count += A(1);
      total += term.exponential;
      deficit += term.deficit;
    }
  }

  SSLKERNELS_HD A value(const Beta<A>& beta) const {
    const A mean = deficit / count, u = beta.value * mean;
    // -log(1 - u) / u, which tends to 1 at 0, where u may have lost its digits; beyond 1/2 the exponentials keep
    // theirs.
    const A inside = u < A(0.5) ? u : A(0);
    const bool tiny = inside * inside < epsilon(A(0));
    const A ratio = tiny ? A(1) + inside / A(2) : -Math::log1p(-inside) / inside;
    const A near = mean * ratio, far = -Math::log(total / count) * beta.inverse;
    return lowest + (u < A(0.5) ? near : far);
  }
};

// The derivative of the free energy with respect to one energy. NaN if it and the lowest are the same infinity, as for
// logsumexp.
template <class Math, class A>
SSLKERNELS_HD A energy_weight(A energy, A lowest, A total, const Beta<A>& beta) {
  return Math::exp(-(beta.value * (energy - lowest))) / total;
}

}  // namespace

// Results [begin, end) of outer * inner, and the gradient of their energies.
SSLKERNELS_CPU_KERNELS(void free_energy_fwd(const FreeEnergy& energies, int64_t begin, int64_t end);
                       void free_energy_bwd(const FreeEnergyGradient& gradient, int64_t begin, int64_t end);)

void launch_free_energy_fwd(const FreeEnergy& energies, void* stream);
void launch_free_energy_bwd(const FreeEnergyGradient& gradient, void* stream);

}  // namespace sslkernels
