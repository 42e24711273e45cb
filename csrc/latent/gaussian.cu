// Gaussian samples and their divergence. A team of lanes of one warp has a row, or a tile of it, and each thread the
// columns of one 16-byte access: mean and logvar are read once for all samples, and the noise, four columns per Philox
// call, is generated where it is used. A thread keeps its columns from row to row, so that sums over rows are private
// until the block has finished; they are kept in shared memory, which saves registers. Sums over columns are reduced by
// the team. Neither uses atomics, and both have a fixed order.
#include <algorithm>

#include "core/cuda/columns.h"
#include "core/cuda/packed_columns.h"
#include "latent/gaussian.h"
#include "random/cuda/noise.h"

namespace sslkernels {
namespace {

constexpr int kRowsOfTeam = 4;  // unless sums over rows need more

template <class T>
constexpr int kQuads = sizeof(T) == 2 ? 2 : 1;  // groups of noise per thread
template <class T>
constexpr int kColumns = 4 * kQuads<T>;
constexpr int kStep = 2;  // columns whose divergence is computed together
template <class T>
constexpr int kTile = kWarpSize * kColumns<T>;
static_assert(gaussian_columns_per_sum_cuda(Element::kFloat) == kTile<float>, "the binding sizes kl by it");
static_assert(gaussian_columns_per_sum_cuda(Element::kHalf) == kTile<Half>, "the binding sizes kl by it");

__device__ __forceinline__ float exp_any(float x) { return expf(x); }
// Out of line, because its constants would take registers of the caller.
SSLKERNELS_OUTLINED double exp_any(double x) { return exp(x); }

// The layout of a block's threads.
struct Layout {
  int team;  // lanes per row: a power of two
  int tiles;
  int rows_of_block;
};

// This thread's position.
struct Place {
  int lane;  // in the team
  int team;  // in the block
  int teams;
  int column;
  int columns;  // per row
  int64_t block;
  int64_t tile;
  int64_t begin;  // first row of the block
  int rows;       // rows of the block

  template <class T>
  static __device__ __forceinline__ Place of(const Gaussian& inputs, const Layout& layout, T) {
    Place place{};
    place.lane = int(threadIdx.x) % layout.team;
    place.team = int(threadIdx.x) / layout.team;
    place.teams = int(blockDim.x) / layout.team;
    place.tile = int64_t(blockIdx.x) % layout.tiles;
    place.block = int64_t(blockIdx.x) / layout.tiles;
    place.column = int(place.tile) * kTile<T> + place.lane * kColumns<T>;
    place.columns = int(inputs.columns);
    place.begin = place.block * layout.rows_of_block;
    const int64_t rows = inputs.rows - place.begin;
    place.rows = rows < layout.rows_of_block ? int(rows) : layout.rows_of_block;
    return place;
  }
  // Calls visit(row, exists), all threads of a warp together.
  template <class Visit>
  __device__ __forceinline__ void for_each_row(Visit visit) const {
    for (int step = 0; step < rows; step += teams) {
      visit(begin + step + team, step + team < rows && column < columns);
    }
  }
};

template <class T>
using PackedRow = PackedColumns<T, kColumns<T>>;

template <class T>
__device__ __forceinline__ void load_row(const GaussianRows& rows, int64_t row, const Place& place, PackedRow<T>& out) {
  out.load(static_cast<const T*>(rows.data) + row * rows.stride, place.column, place.columns);
}

// This thread's values in shared memory: several kinds, kColumns<T> of each.
template <class T>
struct Slots {
  using A = typename Accumulation<T>::type;
  static __device__ __forceinline__ A* at(int kind, int column, int thread) {
    return reinterpret_cast<A*>(shared_memory()) + (kind * kColumns<T> + column) * int(blockDim.x) + thread;
  }
  static __device__ __forceinline__ A& own(int kind, int column) { return *at(kind, column, int(threadIdx.x)); }
  static __device__ __forceinline__ void clear(int kinds) {
    for (int i = 0; i < kinds * kColumns<T>; ++i) own(0, i) = A(0);
  }
};

// A row of the inputs, and the divergence terms of its columns from their prior; names as in
// sslkernels/latent/gaussian_operators.py.
template <class T>
struct Row {
  using A = typename Accumulation<T>::type;
  PackedRow<T> mean, logvar, prior_mean, prior_logvar;
  bool has_prior;

  __device__ __forceinline__ void load_prior(const Gaussian& inputs, int64_t row, const Place& place) {
    if (has_prior) {
      load_row(inputs.prior_mean, row, place, prior_mean);
      load_row(inputs.prior_logvar, row, place, prior_logvar);
    }
  }
  // Calls visit(k, given, scale, t, inverse_scale, expm1, excess) for the columns of a step; `given` is logvar before
  // clamping.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Gaussian& inputs, int step, Visit visit) const {
    const A low = A(inputs.low), high = A(inputs.high);
    A given[kStep], of_mean[kStep], prior_m[kStep], prior_v[kStep];
    logvar.get(step, given);
    mean.get(step, of_mean);
    if (has_prior) {
      prior_mean.get(step, prior_m);
      prior_logvar.get(step, prior_v);
    }
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      const A v = clamp(given[k], low, high), scale = exp_any(A(0.5) * v);
      A t = of_mean[k], d = v, e = scale * scale, inverse_scale = A(1), expm1, excess;
      if (has_prior) {
        d = v - prior_v[k];
        e = exp_any(d);
        inverse_scale = exp_any(A(-0.5) * prior_v[k]);
        t = (t - prior_m[k]) * inverse_scale;
      }
      expm1_terms(d, e, &expm1, &excess);
      visit(k, given[k], scale, t, inverse_scale, expm1, excess);
    }
  }
};

__device__ __forceinline__ uint64_t first_group(const Gaussian& inputs, int64_t row, int column) {
  const int64_t row_id = inputs.row_ids == nullptr ? row : inputs.row_ids[row];
  return uint64_t(row_id) * uint64_t(groups_of_row(inputs.columns)) + uint64_t(column / kGroup);
}

template <class A>
__device__ __forceinline__ A over_team(A value, int team) {
  for (int lanes = team / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// Values that a thread keeps in shared memory to save registers: exp(logvar / 2) of a row, and sums over rows.
enum : int { kScale, kKl, kAverage, kSquares, kForwardKinds };
constexpr int kStatistics = kForwardKinds - kKl;

// Adds the columns of a step, from the thread's `column` on: the divergence, the running average of `mean` (minus row 0
// of it), and the squared deviations (Welford 1962). seen: number of rows, including this one.
template <class T, class A>
__device__ __forceinline__ void add_statistics(const Gaussian& inputs, const Place& place, int seen, int column,
                                               const A (&mean)[kStep], const A (&kl)[kStep]) {
  const T* first_row = static_cast<const T*>(inputs.mean.data) + place.column + column;
  const A weight = A(1) / A(seen);
#pragma unroll
  for (int k = 0; k < kStep; ++k) {
    const bool exists = place.column + column + k < place.columns;
    const A value = mean[k] - (exists ? A(to_float(first_row[k])) : A(0));
    const A before = Slots<T>::own(kAverage, column + k), after = before + (value - before) * weight;
    Slots<T>::own(kKl, column + k) += kl[k];
    Slots<T>::own(kAverage, column + k) = after;
    Slots<T>::own(kSquares, column + k) += (value - before) * (value - after);
  }
}

// Combines the teams in their order (Chan, Golub and LeVeque 1983).
template <class T>
__device__ __forceinline__ void write_statistics(const GaussianForward& forward, const Place& place, int team) {
  using A = typename Accumulation<T>::type;
  __syncthreads();
  const int64_t columns = forward.inputs.columns, first = place.tile * kTile<T>;
  A* out = static_cast<A*>(forward.statistics) + place.block * kStatistics * columns + first;
  for (int c = int(threadIdx.x); c < team * kColumns<T> && first + c < columns; c += int(blockDim.x)) {
    A kl = 0, average = 0, squares = 0, seen = 0;
    for (int t = 0; t < place.teams && t < place.rows; ++t) {
      const int thread = t * team + c / kColumns<T>, k = c % kColumns<T>;
      const A count = A((place.rows - t + place.teams - 1) / place.teams);
      const A apart = *Slots<T>::at(kAverage, k, thread) - average, weight = count / (seen + count);
      kl += *Slots<T>::at(kKl, k, thread);
      squares += *Slots<T>::at(kSquares, k, thread) + apart * apart * seen * weight;
      average += apart * weight;
      seen += count;
    }
    out[c] = kl;
    out[columns + c] = average;
    out[2 * columns + c] = squares;
  }
}

// Stores the scales of a row, and writes its divergence or adds it to the statistics; returns the sum over this
// thread's columns.
template <class T>
__device__ __forceinline__ auto divergence_of_row(const GaussianForward& forward, const Place& place, int64_t row,
                                                  int seen, const Row<T>& values) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = forward.inputs;
  const A free_bits = A(inputs.free_bits);
  A sum = 0;
  for_each_part(kColumns<T> / kStep, [&](int step) {
    const int column = step * kStep;
    A kl[kStep];
    values.for_each(inputs, step, [&](int k, A, A scale, A t, A, A, A excess) {
      Slots<T>::own(kScale, column + k) = scale;
      kl[k] = divergence(t, excess);
    });
    if (forward.kl == nullptr && forward.statistics == nullptr) return;
    if (forward.statistics != nullptr) {
      A mean[kStep];
      values.mean.get(step, mean);
      add_statistics<T>(inputs, place, seen, column, mean, kl);
    }
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      kl[k] = kl[k] < free_bits ? free_bits : kl[k];
      if (place.column + column + k < place.columns) sum += kl[k];
    }
    if (forward.kl != nullptr && !forward.by_row) {
      store_values(kl, static_cast<A*>(forward.kl) + row * inputs.columns, place.column + column, place.columns);
    }
  });
  return sum;
}

template <class T>
__device__ __forceinline__ void write_samples(const GaussianForward& forward, const Place& place, int64_t row,
                                              const PackedRow<T>& mean) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = forward.inputs;
  const uint64_t seed = uint64_t(*inputs.seed), group = first_group(inputs, row, place.column);
  T* z = static_cast<T*>(forward.z) + row * forward.z_strides.row_stride;
  for (int sample = 0; sample < int(inputs.samples); ++sample) {
    PackedRow<T> packed;
    for_each_part(kQuads<T>, [&](int quad) {
      float noise[kGroup];
      A values[kGroup];
      draw_values<Stream::kNormal>(seed, group + uint64_t(quad), uint64_t(sample), noise);
      mean.get(quad, values);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        values[k] = fused(Slots<T>::own(kScale, quad * kGroup + k), A(noise[k]), values[k]);
      }
      packed.set(quad, values);
    });
    packed.store(z, place.column, place.columns);
    z += forward.z_strides.sample_stride;
  }
}

// Grid: blocks of rows x tiles of columns.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    gaussian_fwd_kernel(const __grid_constant__ GaussianForward forward, const __grid_constant__ Layout layout) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = forward.inputs;
  const Place place = Place::of(inputs, layout, T{});
  if (forward.statistics != nullptr) Slots<T>::clear(kForwardKinds);
  int seen = 0;
  place.for_each_row([&](int64_t row, bool exists) {
    A sum = 0;
    if (exists) {
      Row<T> values;
      values.has_prior = inputs.prior_mean.data != nullptr;
      load_row(inputs.mean, row, place, values.mean);
      load_row(inputs.logvar, row, place, values.logvar);
      values.load_prior(inputs, row, place);
      sum = divergence_of_row(forward, place, row, ++seen, values);
      if (forward.z != nullptr) write_samples(forward, place, row, values.mean);
    }
    if (forward.kl != nullptr && forward.by_row) {
      sum = over_team(sum, layout.team);
      if (exists && place.lane == 0) static_cast<A*>(forward.kl)[row * forward.kl_parts + place.tile] = sum;
    }
  });
  if (forward.statistics != nullptr) write_statistics<T>(forward, place, layout.team);
}

// Gradients of a row and of a prior (if the rows share it, the sums over the rows so far). They are computed in shared
// memory to save registers.
enum : int { kMean, kLogvar, kPriorMean, kPriorLogvar, kGradients };

template <class T>
__device__ __forceinline__ void put(int kind, int column, bool add, typename Accumulation<T>::type value) {
  auto& slot = Slots<T>::own(kind, column);
  slot = add ? slot + value : value;
}

// Sums over the rows of a block, combining the teams in their order.
template <class T>
__device__ __forceinline__ void write_sums(int kind, void* to, const Gaussian& inputs, const Place& place, int team) {
  using A = typename Accumulation<T>::type;
  const int64_t first = place.tile * kTile<T>;
  A* out = static_cast<A*>(to) + place.block * inputs.columns + first;
  for (int c = int(threadIdx.x); c < team * kColumns<T> && first + c < inputs.columns; c += int(blockDim.x)) {
    A sum = 0;
    for (int t = 0; t < place.teams; ++t) {
      sum += *Slots<T>::at(kind, c % kColumns<T>, t * team + c / kColumns<T>);
    }
    out[c] = sum;
  }
}

// kMean gets the sum of the gradients of the samples, kLogvar the sum of their products with the noise.
template <class T>
__device__ __forceinline__ void add_samples(const GaussianBackward& backward, const Place& place, int64_t row) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = backward.inputs;
  const bool wants_noise = backward.grad_logvar != nullptr;
  const uint64_t seed = uint64_t(*inputs.seed), group = first_group(inputs, row, place.column);
  const T* grad_z = static_cast<const T*>(backward.grad_z) + row * backward.z_strides.row_stride;
  for (int sample = 0; sample < int(inputs.samples); ++sample) {
    PackedRow<T> packed;
    packed.load(grad_z, place.column, place.columns);
    grad_z += backward.z_strides.sample_stride;
    for_each_part(kQuads<T>, [&](int quad) {
      A grad[kGroup];
      packed.get(quad, grad);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) put<T>(kMean, quad * kGroup + k, sample > 0, grad[k]);
      if (!wants_noise) return;
      float noise[kGroup];
      draw_values<Stream::kNormal>(seed, group + uint64_t(quad), uint64_t(sample), noise);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) put<T>(kLogvar, quad * kGroup + k, sample > 0, grad[k] * A(noise[k]));
    });
  }
}

// The gradients of a row, from the results of add_samples.
template <class T, bool kPrior>
__device__ __forceinline__ void finish_row(const GaussianBackward& backward, const Place& place, int64_t row) {
  using A = typename Accumulation<T>::type;
  const Gaussian& inputs = backward.inputs;
  const A low = A(inputs.low), high = A(inputs.high), free_bits = A(inputs.free_bits);
  const bool has_z = backward.grad_z != nullptr && inputs.samples > 0, has_kl = backward.grad_kl != nullptr;
  const A* grad_kl = static_cast<const A*>(backward.grad_kl) + row * backward.kl_stride;
  Row<T> values;
  values.has_prior = kPrior;  // a compile-time constant, to save registers
  load_row(inputs.logvar, row, place, values.logvar);
  if (has_kl) load_row(inputs.mean, row, place, values.mean);
  values.load_prior(inputs, row, place);
  for_each_part(kColumns<T> / kStep, [&](int step) {
    const int first = step * kStep;
    A grad[kStep] = {};
    if (has_kl && !backward.by_row) load_values(grad_kl, place.column + first, place.columns, grad);
    if (has_kl && backward.by_row) {
#pragma unroll
      for (int k = 0; k < kStep; ++k) grad[k] = *grad_kl;
    }
    values.for_each(inputs, step, [&](int k, A given, A scale, A t, A inverse_scale, A expm1, A excess) {
      const int column = first + k;
      A in_mean = has_z ? Slots<T>::own(kMean, column) : A(0);
      A in_logvar = has_z ? scale * Slots<T>::own(kLogvar, column) : A(0);
      if (has_kl) {
        const A slope = divergence(t, excess) < free_bits ? A(0) : grad[k];
        const A of_mean = slope * t * inverse_scale;
        in_mean += of_mean;
        in_logvar = fused(slope, expm1, in_logvar);
        if (values.has_prior) {
          put<T>(kPriorMean, column, inputs.prior_mean.shared, -of_mean);
          put<T>(kPriorLogvar, column, inputs.prior_logvar.shared, A(-0.5) * slope * fused(t, t, expm1));
        }
      }
      put<T>(kMean, column, false, in_mean);
      put<T>(kLogvar, column, false, given < low || given > high ? A(0) : A(0.5) * in_logvar);
    });
  });
}

template <class T>
__device__ __forceinline__ void write_row(int kind, void* to, int64_t row, const Place& place) {
  if (to == nullptr) return;
  typename Accumulation<T>::type values[kColumns<T>];
#pragma unroll
  for (int k = 0; k < kColumns<T>; ++k) values[k] = Slots<T>::own(kind, k);
  PackedRow<T> packed;
  packed.set_all(values);
  packed.store(static_cast<T*>(to) + row * place.columns, place.column, place.columns);
}

// Grid: blocks of rows x tiles of columns. kPrior: there is a prior and a gradient of the divergence. has_sums: all
// rows share the prior.
template <class T, bool kPrior>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    gaussian_bwd_kernel(const __grid_constant__ GaussianBackward backward, const __grid_constant__ Layout layout,
                        bool has_sums) {
  const Gaussian& inputs = backward.inputs;
  const Place place = Place::of(inputs, layout, T{});
  if (kPrior && has_sums) Slots<T>::clear(kGradients);
  place.for_each_row([&](int64_t row, bool exists) {
    if (!exists) return;
    if (backward.grad_z != nullptr) add_samples<T>(backward, place, row);
    finish_row<T, kPrior>(backward, place, row);
    write_row<T>(kMean, backward.grad_mean, row, place);
    write_row<T>(kLogvar, backward.grad_logvar, row, place);
    if constexpr (kPrior) {
      if (!inputs.prior_mean.shared) write_row<T>(kPriorMean, backward.grad_prior_mean, row, place);
      if (!inputs.prior_logvar.shared) write_row<T>(kPriorLogvar, backward.grad_prior_logvar, row, place);
    }
  });
  if (!kPrior || !has_sums) return;
  __syncthreads();
  if (backward.grad_prior_mean != nullptr && inputs.prior_mean.shared) {
    write_sums<T>(kPriorMean, backward.grad_prior_mean, inputs, place, layout.team);
  }
  if (backward.grad_prior_logvar != nullptr && inputs.prior_logvar.shared) {
    write_sums<T>(kPriorLogvar, backward.grad_prior_logvar, inputs, place, layout.team);
  }
}

template <class T>
Layout layout_of(const Gaussian& inputs, bool has_sums) {
  int team = 1;
  while (team < kWarpSize && team * kColumns<T> < inputs.columns) team *= 2;
  const int rows = has_sums ? int(kGaussianRowsOfBlock) : kRowsOfTeam * (kThreads / team);
  return {team, int(ceil_div(inputs.columns, kTile<T>)), rows};
}

// kinds: number of kinds of a thread's values in shared memory.
template <class T>
LaunchShape shape_of(const Gaussian& inputs, const Layout& layout, int kinds) {
  const int64_t values = int64_t(kinds) * kColumns<T> * kThreads;
  return {ceil_div(inputs.rows, layout.rows_of_block) * layout.tiles, kThreads,
          values * int64_t(sizeof(typename Accumulation<T>::type)), 1};
}

template <class T>
void launch_fwd(const GaussianForward& forward, void* stream) {
  const bool has_sums = forward.statistics != nullptr;
  const Layout layout = layout_of<T>(forward.inputs, has_sums);
  launch("gaussian_fwd_kernel", gaussian_fwd_kernel<T>,
         shape_of<T>(forward.inputs, layout, has_sums ? kForwardKinds : kKl), stream, forward, layout);
}

template <class T>
void launch_bwd(const GaussianBackward& backward, void* stream) {
  const Gaussian& inputs = backward.inputs;
  const bool has_prior = inputs.prior_mean.data != nullptr && backward.grad_kl != nullptr;
  const bool has_sums = (backward.grad_prior_mean != nullptr && inputs.prior_mean.shared) ||
                        (backward.grad_prior_logvar != nullptr && inputs.prior_logvar.shared);
  const Layout layout = layout_of<T>(inputs, has_sums);
  launch("gaussian_bwd_kernel", has_prior ? gaussian_bwd_kernel<T, true> : gaussian_bwd_kernel<T, false>,
         shape_of<T>(inputs, layout, has_prior ? kGradients : kPriorMean), stream, backward, layout, has_sums);
}

}  // namespace

void launch_gaussian_fwd(const GaussianForward& forward, void* stream) {
  check_dim(forward.inputs.columns);
  with_element(forward.inputs.element, [&](auto zero) { launch_fwd<decltype(zero)>(forward, stream); });
}

void launch_gaussian_bwd(const GaussianBackward& backward, void* stream) {
  check_dim(backward.inputs.columns);
  with_element(backward.inputs.element, [&](auto zero) { launch_bwd<decltype(zero)>(backward, stream); });
}

}  // namespace sslkernels
