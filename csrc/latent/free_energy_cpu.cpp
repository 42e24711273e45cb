// The free energy of K candidates. The lanes of a vector are results if there are few candidates or if neighbouring
// results are contiguous in memory, else the candidates of one result. Either way the energies are read once, in blocks
// whose lowest is found before their sums.
#include <cstring>

#include "core/cpu/element.h"
#include "core/cpu/vector_math.h"
#include "latent/free_energy.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int kLanes = 64;         // results per tile: always all lanes, so that no result depends on its neighbours
constexpr int kDepth = 64;         // candidates of each at a time
constexpr int kBlock = 1024;       // candidates of one result at a time
constexpr int kMinimumLanes = 32;  // lanes per block of the minimum
constexpr int64_t kFew = 32;       // candidates

struct VectorMath {
  template <class A>
  static SSLKERNELS_HD A exp(A x) {
    return exp_nonpositive(x);
  }
  template <class A>
  static SSLKERNELS_HD A log(A x) {
    return log_positive(x);
  }
  template <class A>
  static SSLKERNELS_HD A log1p(A x) {
    return log1p_unit(x);
  }
};

template <class A>
using Sums = EnergySums<VectorMath, A>;

bool side_by_side(const FreeEnergy& energies, int64_t inner_stride) {
  return energies.count < kFew || (energies.inner >= kLanes / 4 && inner_stride == 1);
}

// NaN is the lowest of all; ties go to the first.
template <class A>
SSLKERNELS_HD bool is_lower(A energy, A lowest) {
  return (energy < lowest) | ((energy != energy) & (lowest == lowest));
}

// Results [first, first + size) of one tile, in memory.
struct Tile {
  int size;
  bool adjacent;
  int64_t offset[kLanes];

  Tile(const FreeEnergy& energies, int64_t first, int64_t end, int64_t outer_stride, int64_t inner_stride) {
    size = int(end - first < kLanes ? end - first : kLanes);
    for (int i = 0; i < size; ++i) {
      const int64_t r = first + i;
      offset[i] = r / energies.inner * outer_stride + r % energies.inner * inner_stride;
    }
    adjacent = inner_stride == 1 && offset[size - 1] - offset[0] == size - 1 &&
               first / energies.inner == (first + size - 1) / energies.inner;
  }
};

// Pads lanes without a result with zeros.
template <class T, class A>
void load_tile(const Tile& tile, const T* from, int64_t stride, int depth, A (*out)[kLanes]) {
  for (int k = 0; k < depth; ++k) {
    if (tile.adjacent) load(from + tile.offset[0] + k * stride, tile.size, out[k]);
    for (int i = tile.size; i < kLanes; ++i) out[k][i] = A(0);
  }
  if (tile.adjacent) return;
  for (int i = 0; i < tile.size; ++i) {
    for (int k = 0; k < depth; ++k) out[k][i] = A(to_float(from[tile.offset[i] + k * stride]));
  }
}

template <class T, class A>
void store_tile(const Tile& tile, const A (*in)[kLanes], int depth, int64_t stride, T* to) {
  if (tile.adjacent) {
    for (int k = 0; k < depth; ++k) store(in[k], tile.size, to + tile.offset[0] + k * stride);
    return;
  }
  for (int i = 0; i < tile.size; ++i) {
    for (int k = 0; k < depth; ++k) from_float(in[k][i], to + tile.offset[i] + k * stride);
  }
}

template <class T>
void store_values(const T* values, int size, int64_t first, void* to) {
  if (to != nullptr) std::memcpy(static_cast<T*>(to) + first, values, size_t(size) * sizeof(T));
}

template <class A>
void sums_of_tile(const A (*tile)[kLanes], int depth, const Beta<A>& beta, A* lowest, A* total, A* deficit) {
  for (int i = 0; i < kLanes; ++i) lowest[i] = A(INFINITY), total[i] = deficit[i] = A(0);
  for (int k = 0; k < depth; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) lowest[i] = tile[k][i] < lowest[i] ? tile[k][i] : lowest[i];
  }
  for (int k = 0; k < depth; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const A energy = tile[k][i];
      const EnergyTerm<A> term = energy_term<VectorMath>(energy == lowest[i] ? A(0) : energy - lowest[i], beta);
      total[i] += term.exponential;
      deficit[i] += term.deficit;
    }
  }
}

template <class T>
void soft_tile(const FreeEnergy& energies, int64_t first, int64_t end) {
  using A = typename Accumulation<T>::type;
  const Beta<A> beta = beta_of<A>(energies.beta);
  const Tile tile(energies, first, end, energies.outer_stride, energies.inner_stride);
  alignas(kLine) A values[kDepth][kLanes], lowest[kLanes], total[kLanes], deficit[kLanes];
  alignas(kLine) A next_lowest[kLanes], next_total[kLanes], next_deficit[kLanes];
  for (int64_t k = 0; k < energies.count; k += kDepth) {
    const int depth = int(energies.count - k < kDepth ? energies.count - k : kDepth);
    load_tile(tile, static_cast<const T*>(energies.energy) + k * energies.count_stride, energies.count_stride, depth,
              values);
    if (k == 0) {
      sums_of_tile(values, depth, beta, lowest, total, deficit);
      continue;
    }
    sums_of_tile(values, depth, beta, next_lowest, next_total, next_deficit);
    const A before = A(k), here = A(depth);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const Sums<A> sums = Sums<A>::combine({lowest[i], before, total[i], deficit[i]},
                                            {next_lowest[i], here, next_total[i], next_deficit[i]}, beta);
      lowest[i] = sums.lowest;
      total[i] = sums.total;
      deficit[i] = sums.deficit;
    }
  }
  alignas(kLine) A result[kLanes];
  const A count = A(energies.count);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    result[i] = Sums<A>{lowest[i], count, total[i], deficit[i]}.value(beta);
  }
  store_values(result, tile.size, first, energies.value);
  store_values(lowest, tile.size, first, energies.lowest);
  store_values(total, tile.size, first, energies.total);
}

template <class T>
void minimum_tile(const FreeEnergy& energies, int64_t first, int64_t end) {
  using A = typename Accumulation<T>::type;
  const Tile tile(energies, first, end, energies.outer_stride, energies.inner_stride);
  alignas(kLine) A values[kDepth][kLanes], lowest[kLanes], next[kLanes];
  alignas(kLine) int32_t place[kLanes];
  int64_t winner[kLanes];
  for (int64_t k = 0; k < energies.count; k += kDepth) {
    const int depth = int(energies.count - k < kDepth ? energies.count - k : kDepth);
    load_tile(tile, static_cast<const T*>(energies.energy) + k * energies.count_stride, energies.count_stride, depth,
              values);
    for (int i = 0; i < kLanes; ++i) next[i] = values[0][i], place[i] = 0;
    for (int j = 1; j < depth; ++j) {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        const bool lower = is_lower(values[j][i], next[i]);
        next[i] = lower ? values[j][i] : next[i];
        place[i] = lower ? j : place[i];
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      if (k > 0 && !is_lower(next[i], lowest[i])) continue;
      lowest[i] = next[i];
      winner[i] = k + place[i];
    }
  }
  store_values(lowest, tile.size, first, energies.value);
  store_values(winner, tile.size, first, energies.winner);
}

template <class T>
void gradient_tile(const FreeEnergyGradient& gradient, int64_t first, int64_t end) {
  using A = typename Accumulation<T>::type;
  const FreeEnergy& energies = gradient.energies;
  const Beta<A> beta = beta_of<A>(energies.beta);
  const Tile from(energies, first, end, energies.outer_stride, energies.inner_stride);
  const Tile to(energies, first, end, gradient.outer_stride, gradient.inner_stride);
  alignas(kLine) A values[kDepth][kLanes], lowest[kLanes] = {}, scale[kLanes] = {};
  for (int i = 0; i < from.size; ++i) {
    scale[i] = static_cast<const A*>(energies.value)[first + i];
    if (energies.minimum) continue;
    lowest[i] = static_cast<const A*>(energies.lowest)[first + i];
    scale[i] /= static_cast<const A*>(energies.total)[first + i];
  }
  for (int64_t k = 0; k < energies.count; k += kDepth) {
    const int depth = int(energies.count - k < kDepth ? energies.count - k : kDepth);
    if (energies.minimum) {
      std::memset(values, 0, sizeof(values));
      for (int i = 0; i < from.size; ++i) {
        const int64_t winner = energies.winner[first + i] - k;
        if (0 <= winner && winner < depth) values[winner][i] = scale[i];
      }
    } else {
      load_tile(from, static_cast<const T*>(energies.energy) + k * energies.count_stride, energies.count_stride, depth,
                values);
      for (int j = 0; j < depth; ++j) {
#pragma omp simd
        for (int i = 0; i < kLanes; ++i) {
          values[j][i] = energy_weight<VectorMath>(values[j][i], lowest[i], A(1), beta) * scale[i];
        }
      }
    }
    store_tile(to, values, depth, gradient.count_stride, static_cast<T*>(gradient.grad) + k * gradient.count_stride);
  }
}

template <class T>
const T* energies_of(const FreeEnergy& energies, int64_t r) {
  return static_cast<const T*>(energies.energy) + r / energies.inner * energies.outer_stride +
         r % energies.inner * energies.inner_stride;
}

// `count` energies from `from` on in the accumulation type: the input itself or a copy in the buffer.
template <class T, class A>
const A* block_of(const T* from, int64_t stride, int count, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (stride == 1) return from;
  }
  if (stride == 1) {
    load(from, count, buffer);
  } else {
    for (int j = 0; j < count; ++j) buffer[j] = A(to_float(from[j * stride]));
  }
  return buffer;
}

template <class A>
struct Lowest {
  A energy;  // ignoring NaN
  bool has_nan;
};

template <class A>
Lowest<A> lowest_of(const A* block, int count) {
  alignas(kLine) A lanes[kMinimumLanes];
  alignas(kLine) uint32_t nans[kMinimumLanes] = {};
  for (A& lane : lanes) lane = A(INFINITY);
  const auto take = [&](int l, A energy) __attribute__((always_inline)) {
    lanes[l] = energy < lanes[l] ? energy : lanes[l];
    nans[l] |= uint32_t(energy != energy);
  };
  int j = 0;
  for (; j + kMinimumLanes <= count; j += kMinimumLanes) {
#pragma omp simd
    for (int l = 0; l < kMinimumLanes; ++l) take(l, block[j + l]);
  }
  for (int l = 0; j + l < count; ++l) take(l, block[j + l]);
  for (int half = kMinimumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) {
      lanes[l] = lanes[l + half] < lanes[l] ? lanes[l + half] : lanes[l];
      nans[l] |= nans[l + half];
    }
  }
  return {lanes[0], nans[0] != 0};
}

// First index of the lowest energy, which is known to occur.
template <class A>
int place_of(const A* block, int count, const Lowest<A>& lowest) {
  const auto is_it = [&](A energy) __attribute__((always_inline)) {
    return lowest.has_nan ? energy != energy : energy == lowest.energy;
  };
  int j = 0;
  for (; j + kMinimumLanes <= count; j += kMinimumLanes) {
    uint32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int l = 0; l < kMinimumLanes; ++l) found |= uint32_t(is_it(block[j + l]));
    if (found != 0) break;
  }
  while (!is_it(block[j])) ++j;
  return j;
}

template <class T>
void soft_result(const FreeEnergy& energies, int64_t r) {
  using A = typename Accumulation<T>::type;
  const Beta<A> beta = beta_of<A>(energies.beta);
  const T* from = energies_of<T>(energies, r);
  alignas(kLine) A buffer[kBlock];
  Sums<A> sums = Sums<A>::identity();
  for (int64_t k = 0; k < energies.count; k += kBlock) {
    const int count = int(energies.count - k < kBlock ? energies.count - k : kBlock);
    const A* block = block_of(from + k * energies.count_stride, energies.count_stride, count, buffer);
    const A lowest = lowest_of(block, count).energy;
    A total = 0, deficit = 0;
#pragma omp simd reduction(+ : total, deficit)
    for (int j = 0; j < count; ++j) {
      const EnergyTerm<A> term = energy_term<VectorMath>(block[j] == lowest ? A(0) : block[j] - lowest, beta);
      total += term.exponential;
      deficit += term.deficit;
    }
    const Sums<A> here{lowest, A(count), total, deficit};
    sums = k == 0 ? here : Sums<A>::combine(sums, here, beta);
  }
  static_cast<A*>(energies.value)[r] = sums.value(beta);
  if (energies.lowest != nullptr) static_cast<A*>(energies.lowest)[r] = sums.lowest;
  if (energies.total != nullptr) static_cast<A*>(energies.total)[r] = sums.total;
}

template <class T>
void minimum_result(const FreeEnergy& energies, int64_t r) {
  using A = typename Accumulation<T>::type;
  const T* from = energies_of<T>(energies, r);
  alignas(kLine) A buffer[kBlock];
  A lowest = A(to_float(from[0]));
  int64_t winner = 0;
  for (int64_t k = 0; k < energies.count && lowest == lowest; k += kBlock) {
    const int count = int(energies.count - k < kBlock ? energies.count - k : kBlock);
    const A* block = block_of(from + k * energies.count_stride, energies.count_stride, count, buffer);
    const Lowest<A> here = lowest_of(block, count);
    if (!here.has_nan && !(here.energy < lowest)) continue;
    const int place = place_of(block, count, here);
    lowest = block[place];
    winner = k + place;
  }
  static_cast<A*>(energies.value)[r] = lowest;
  if (energies.winner != nullptr) energies.winner[r] = winner;
}

template <class T>
void gradient_result(const FreeEnergyGradient& gradient, int64_t r) {
  using A = typename Accumulation<T>::type;
  const FreeEnergy& energies = gradient.energies;
  const Beta<A> beta = beta_of<A>(energies.beta);
  T* to = static_cast<T*>(gradient.grad) + r / energies.inner * gradient.outer_stride +
          r % energies.inner * gradient.inner_stride;
  const A upstream = static_cast<const A*>(energies.value)[r];
  const T* from = energies.minimum ? nullptr : energies_of<T>(energies, r);
  const A lowest = energies.minimum ? A(0) : static_cast<const A*>(energies.lowest)[r];
  const A scale = energies.minimum ? upstream : upstream / static_cast<const A*>(energies.total)[r];
  alignas(kLine) A block[kBlock];
  for (int64_t k = 0; k < energies.count; k += kBlock) {
    const int count = int(energies.count - k < kBlock ? energies.count - k : kBlock);
    if (energies.minimum) {
      std::memset(block, 0, size_t(count) * sizeof(A));
      const int64_t winner = energies.winner[r] - k;
      if (0 <= winner && winner < count) block[winner] = scale;
    } else {
      const A* here = block_of(from + k * energies.count_stride, energies.count_stride, count, block);
#pragma omp simd
      for (int j = 0; j < count; ++j) block[j] = energy_weight<VectorMath>(here[j], lowest, A(1), beta) * scale;
    }
    T* out = to + k * gradient.count_stride;
    if (gradient.count_stride == 1) {
      store(block, count, out);
    } else {
      for (int j = 0; j < count; ++j) from_float(block[j], out + j * gradient.count_stride);
    }
  }
}

template <class T>
void run(const FreeEnergy& energies, int64_t begin, int64_t end) {
  if (side_by_side(energies, energies.inner_stride)) {
    for (int64_t r = begin; r < end; r += kLanes) {
      energies.minimum ? minimum_tile<T>(energies, r, end) : soft_tile<T>(energies, r, end);
    }
  } else {
    for (int64_t r = begin; r < end; ++r) {
      energies.minimum ? minimum_result<T>(energies, r) : soft_result<T>(energies, r);
    }
  }
}

template <class T>
void run_gradient(const FreeEnergyGradient& gradient, int64_t begin, int64_t end) {
  if (side_by_side(gradient.energies, gradient.inner_stride)) {
    for (int64_t r = begin; r < end; r += kLanes) gradient_tile<T>(gradient, r, end);
  } else {
    for (int64_t r = begin; r < end; ++r) gradient_result<T>(gradient, r);
  }
}

}  // namespace

void free_energy_fwd(const FreeEnergy& energies, int64_t begin, int64_t end) {
  with_element(energies.element, [&](auto zero) { run<decltype(zero)>(energies, begin, end); });
}

void free_energy_bwd(const FreeEnergyGradient& gradient, int64_t begin, int64_t end) {
  with_element(gradient.energies.element, [&](auto zero) { run_gradient<decltype(zero)>(gradient, begin, end); });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
