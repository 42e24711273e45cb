// Kernels of Gumbel-softmax over rows.
//
// A row belongs to a team: part of a warp, a block, or the blocks of a cluster. A thread takes chunks of columns of one
// 16-byte access (float64: two) and generates their noise, four numbers per Philox call, where it reads them. Results
// that a second pass needs are cached in shared memory, private to each thread, so that noise is generated once; rows
// that are too long for that generate it again. Every reduction has a fixed order.
#pragma once

#include "core/cuda/columns.h"
#include "core/cuda/teams.h"
#include "latent/gumbel.h"
#include "random/cuda/noise.h"

namespace sslkernels {
namespace {

template <class T>
constexpr int kChunk = sizeof(T) == 2 ? 8 : 4;
template <class T>  // threads per block, at most; the registers allow that many per multiprocessor
constexpr int kMostThreads = sizeof(T) == 8 ? 512 : 1024;

// How rows are divided among teams, as in shape_of_teams.
struct GumbelTeam {
  int team;
  bool cached;
};

template <class T>
__device__ __forceinline__ typename Accumulation<T>::type soft_exp(typename Accumulation<T>::type x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(x * 1.44269504088896341f);
  } else {
    return std::exp(x);
  }
}

template <class T>
using Place = TeamPlace<kChunk<T>>;

template <class T>
struct NoisyRow {
  using A = typename Accumulation<T>::type;
  static constexpr int kSize = kChunk<T>;

  const T* logits;
  int columns;
  const int64_t* seed;
  uint64_t group;  // Philox group of column 0

  __device__ __forceinline__ NoisyRow(const GumbelRows& rows, const Place<T>& place)
      : logits(static_cast<const T*>(rows.logits) + place.row * rows.logits_stride),
        columns(int(rows.columns)),
        seed(rows.seed),
        group(place.in_range ? row_number(rows, place.row) * uint64_t(groups_of_row(rows.columns)) : 0) {}

  // Pads with -inf beyond the end of the row.
  __device__ __forceinline__ void load(int column, A (&out)[kSize]) const {
    load_columns(logits, column, columns, out);
#pragma unroll
    for (int k = 0; k < kSize; ++k) out[k] = column + k < columns ? out[k] : A(-INFINITY);
  }

  __device__ __forceinline__ void add_noise(int column, A (&s)[kSize]) const {
    if (seed == nullptr) return;
    const uint64_t key = uint64_t(*seed);
    // One group after the other, each rotated to the front: two Philox calls at once take too many registers.
#pragma unroll 1
    for (int at = 0; at < kSize; at += kGroup) {
      float noise[kGroup] = {};
      if (column + at < columns) draw_values<Stream::kGumbel>(key, group + uint64_t((column + at) / kGroup), 0, noise);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const A sum = s[k] + A(noise[k]);
#pragma unroll
        for (int j = k; j + kGroup < kSize; j += kGroup) s[j] = s[j + kGroup];
        s[kSize - kGroup + k] = sum;
      }
    }
  }
};

// A thread's cached chunks, in planes of 16 bytes so that the threads of a warp access different banks.
template <class A, int N>
struct Cached {
  static constexpr int kEach = Groups<A>::kSize;
  static constexpr int kPlanes = N / kEach;
  char* memory;

  __device__ __forceinline__ Words& words(int turn, int plane) const {
    return reinterpret_cast<Words*>(memory)[(turn * kPlanes + plane) * int(blockDim.x) + int(threadIdx.x)];
  }
  __device__ __forceinline__ void store(int turn, const A (&values)[N]) const {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      A part[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) part[k] = values[p * kEach + k];
      words(turn, p) = pack_group<A>(part);
    }
  }
  __device__ __forceinline__ void load(int turn, A (&values)[N]) const {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      A part[kEach];
      unpack_group<A>(words(turn, p), part);
#pragma unroll
      for (int k = 0; k < kEach; ++k) values[p * kEach + k] = part[k];
    }
  }
};

template <class A>
struct Top {
  A max;
  int32_t index;
  int32_t unused;

  static __device__ __forceinline__ Top identity() { return {A(-INFINITY), INT32_MAX, 0}; }
  static __device__ __forceinline__ Top combine(Top a, Top b) {
    return b.max > a.max || (b.max == a.max && b.index < a.index) ? b : a;
  }
};

template <class A, int kCount>
struct Totals {
  A value[kCount];

  static __device__ __forceinline__ Totals identity() { return {}; }
  static __device__ __forceinline__ Totals combine(Totals a, Totals b) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) a.value[k] += b.value[k];
    return a;
  }
};

// The maximum of a thread's columns, and the sum of exp((s - maximum) / tau).
template <class T>
struct Running {
  using A = typename Accumulation<T>::type;
  Top<A> top = Top<A>::identity();
  A sum = 0;

  template <int N>
  __device__ __forceinline__ void add(const A (&s)[N], int column, A inverse_tau) {
    A largest = s[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = std::fmax(largest, s[k]);  // NaN only if both are
    if (largest > top.max) {
      sum *= soft_exp<T>((top.max - largest) * inverse_tau);
      top.max = largest;
#pragma unroll
      for (int k = N - 1; k >= 0; --k) top.index = s[k] == largest ? column + k : top.index;
    }
    const A reference = top.max == A(-INFINITY) ? A(0) : top.max;
    A part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) part += soft_exp<T>((s[k] - reference) * inverse_tau);
    sum += part;
  }
  // NaN for a row that holds only -inf.
  __device__ __forceinline__ A moved(A max, A inverse_tau) const {
    return sum * soft_exp<T>((top.max - max) * inverse_tau);
  }
};

template <class A>
__device__ __forceinline__ void put_state(const GumbelState& to, int64_t row, A max, A sum) {
  static_cast<A*>(to.max)[row] = max;
  static_cast<A*>(to.sum)[row] = sum;
}

__device__ __forceinline__ int64_t code(int32_t index) { return index == INT32_MAX ? 0 : index; }

// Shared memory of the forward: scratch of the reductions, then the cache.
template <class T>
struct ForwardScratch {
  using A = typename Accumulation<T>::type;
  using Sums = Totals<A, 2>;
  typename Reduction<Top<A>>::Scratch top;
  typename Reduction<Top<A>>::Scratch softmax_top;
  typename Reduction<Sums>::Scratch sums;
};
template <class T>
struct BackwardScratch {
  typename Reduction<Totals<typename Accumulation<T>::type, 2>>::Scratch sums;
};
template <class Scratch>
constexpr int64_t kScratchBytes = (int64_t(sizeof(Scratch)) + 15) / 16 * 16;

// Grid: one team per row. With forward.argmax, also computes the softmax state of the logits without noise.
template <class T>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    gumbel_rows_fwd_kernel(const __grid_constant__ GumbelForward forward, GumbelTeam team) {
  using A = typename Accumulation<T>::type;
  using Scratch = ForwardScratch<T>;
  using Sums = typename Scratch::Sums;
  constexpr int N = kChunk<T>;
  const Place<T> place(forward.rows.rows, int(forward.rows.columns), team.team);
  const NoisyRow<T> row(forward.rows, place);
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const Cached<A, N> cached{shared_memory() + kScratchBytes<Scratch>};
  const A inverse_tau = A(inverse_tau_of(forward.rows));
  const bool stats = forward.argmax != nullptr;

  Running<T> running, softmax;
  for (int chunk = place.lane, turn = 0; chunk < place.chunks; chunk += place.step, ++turn) {
    const int column = chunk * N;
    A s[N];
    row.load(column, s);
    if (stats) softmax.add(s, column, A(1));
    row.add_noise(column, s);
    running.add(s, column, inverse_tau);
    if (team.cached) cached.store(turn, s);
  }

  using Tops = TeamReduction<Top<A>>;
  const Top<A> top = Tops::run(running.top, place.lanes, &scratch->top);
  Tops::finish(place.lanes);
  Top<A> softmax_top = top;
  if (stats) {
    softmax_top = Tops::run(softmax.top, place.lanes, &scratch->softmax_top);
    Tops::finish(place.lanes);
  }
  Sums sums = Sums::identity();
  sums.value[0] = running.moved(top.max, inverse_tau);
  if (stats) sums.value[1] = softmax.moved(softmax_top.max, A(1));
  sums = TeamReduction<Sums>::run(sums, place.lanes, &scratch->sums);

  const A sum = sums.value[0];
  if (place.first()) {
    put_state(forward.rows.state, place.row, top.max, sum);
    if (forward.index != nullptr) forward.index[place.row] = code(top.index);
    if (stats) {
      put_state(forward.rows.softmax_state, place.row, softmax_top.max, sums.value[1]);
      forward.argmax[place.row] = code(softmax_top.index);
    }
  }
  if (forward.output != GumbelOutput::kNone) {
    T* y = static_cast<T*>(forward.y) + place.row * forward.rows.columns;
    const A scale = A(1) / sum;
    for (int chunk = place.lane, turn = 0; chunk < place.chunks; chunk += place.step, ++turn) {
      const int column = chunk * N;
      A s[N];
      if (forward.output == GumbelOutput::kHard) {
        const A zero = sum == sum ? A(0) : sum;
#pragma unroll
        for (int k = 0; k < N; ++k) s[k] = column + k == top.index ? A(1) + zero : zero;
      } else {
        if (team.cached) {
          cached.load(turn, s);
        } else {
          row.load(column, s);
          row.add_noise(column, s);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) s[k] = soft_exp<T>((s[k] - top.max) * inverse_tau) * scale;
      }
      store_columns(s, y, column, row.columns);
    }
  }
  TeamReduction<Sums>::finish(place.lanes);
}

template <class T>
struct Softmax {
  using A = typename Accumulation<T>::type;
  A max;
  A scale;
  A inverse_tau;

  __device__ __forceinline__ Softmax(const GumbelState& state, const Place<T>& place, A inverse_tau)
      : max(0), scale(0), inverse_tau(inverse_tau) {
    if (state.max == nullptr || !place.in_range) return;
    max = static_cast<const A*>(state.max)[place.row];
    scale = A(1) / static_cast<const A*>(state.sum)[place.row];
  }
  template <int N>
  __device__ __forceinline__ void apply(A (&s)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) s[k] = soft_exp<T>((s[k] - max) * inverse_tau) * scale;
  }
};

// The gradient of y: in the accumulation type if it is a product of the package's own, else in the type of the logits.
template <class T>
struct GradRow {
  using A = typename Accumulation<T>::type;
  const char* values;
  bool wide;

  __device__ __forceinline__ GradRow(const GumbelBackward& backward, int64_t row)
      : values(static_cast<const char*>(backward.grad)), wide(backward.wide_grad) {
    if (values != nullptr) values += row * backward.grad_stride * int64_t(wide ? sizeof(A) : sizeof(T));
  }
  template <int N>
  __device__ __forceinline__ void load(int column, int columns, A (&out)[N]) const {
    if (wide) {
      load_columns(reinterpret_cast<const A*>(values), column, columns, out);
    } else {
      load_columns(reinterpret_cast<const T*>(values), column, columns, out);
    }
  }
};

// Grid: one team per row.
template <class T>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    gumbel_rows_bwd_kernel(const __grid_constant__ GumbelBackward backward, GumbelTeam team) {
  using A = typename Accumulation<T>::type;
  using Scratch = BackwardScratch<T>;
  using Sums = Totals<A, 2>;
  constexpr int N = kChunk<T>;
  const Place<T> place(backward.rows.rows, int(backward.rows.columns), team.team);
  const NoisyRow<T> row(backward.rows, place);
  const GradRow<T> grads(backward, place.row);
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const Cached<A, N> cached{shared_memory() + kScratchBytes<Scratch>};
  const Softmax<T> soft(backward.rows.state, place, A(inverse_tau_of(backward.rows)));
  const bool has_grad = backward.grad != nullptr;
  const bool used =
      backward.grad_usage != nullptr && place.in_range && (backward.mask == nullptr || backward.mask[place.row] != 0);
  const A* usage = nullptr;
  if (used) usage = static_cast<const A*>(backward.grad_usage) + place.row % backward.groups * backward.rows.columns;

  Sums sums = Sums::identity();
  if (used) {
    const Softmax<T> softmax(backward.rows.softmax_state, place, A(1));
    for (int chunk = place.lane; chunk < place.chunks; chunk += place.step) {
      A p[N], weight[N];
      row.load(chunk * N, p);
      softmax.apply(p);
      load_columns(usage, chunk * N, row.columns, weight);
#pragma unroll
      for (int k = 0; k < N; ++k) sums.value[1] += p[k] * weight[k];
    }
  }
  for (int chunk = place.lane, turn = 0; has_grad && chunk < place.chunks; chunk += place.step, ++turn) {
    A y[N], weight[N];
    row.load(chunk * N, y);
    row.add_noise(chunk * N, y);
    soft.apply(y);
    grads.load(chunk * N, row.columns, weight);
#pragma unroll
    for (int k = 0; k < N; ++k) sums.value[0] += y[k] * weight[k];
    if (team.cached) cached.store(turn, y);
  }
  sums = TeamReduction<Sums>::run(sums, place.lanes, &scratch->sums);

  const Softmax<T> softmax(backward.rows.softmax_state, place, A(1));
  T* out = static_cast<T*>(backward.grad_logits) + place.row * backward.rows.columns;
  for (int chunk = place.lane, turn = 0; chunk < place.chunks; chunk += place.step, ++turn) {
    const int column = chunk * N;
    A y[N], weight[N], value[N];
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] = 0;
    if (has_grad) {
      if (team.cached) {
        cached.load(turn, y);
      } else {
        row.load(column, y);
        row.add_noise(column, y);
        soft.apply(y);
      }
      grads.load(column, row.columns, weight);
#pragma unroll
      for (int k = 0; k < N; ++k) value[k] = y[k] * (weight[k] - sums.value[0]) * soft.inverse_tau;
    }
    if (used) {
      row.load(column, y);
      softmax.apply(y);
      load_columns(usage, column, row.columns, weight);
#pragma unroll
      for (int k = 0; k < N; ++k) value[k] += y[k] * (weight[k] - sums.value[1]);
    }
    store_columns(value, out, column, row.columns);
  }
  TeamReduction<Sums>::finish(place.lanes);
}

// Grid: `lanes` threads per tile of columns of a group, in a chunk of rows.
template <class T>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    probability_sums_kernel(const __grid_constant__ ProbabilitySums sums, int lanes, int tiles) {
  using A = typename Accumulation<T>::type;
  constexpr int N = kChunk<T>;
  const int64_t item = int64_t(blockIdx.x) * (int(blockDim.x) / lanes) + int(threadIdx.x) / lanes;
  const int64_t part = item / tiles, group = part % sums.groups, chunk = part / sums.groups;
  const int64_t columns = sums.rows.columns;
  const int64_t first = (item % tiles * lanes + int(threadIdx.x) % lanes) * N;
  if (chunk >= sums.chunks || first >= columns) return;
  const int column = int(first);
  const A *max = static_cast<const A*>(sums.rows.softmax_state.max),
          *sum = static_cast<const A*>(sums.rows.softmax_state.sum);
  const int64_t begin = chunk * sums.chunk_rows * sums.groups, end = begin + sums.chunk_rows * sums.groups;
  A total[N];
#pragma unroll
  for (int k = 0; k < N; ++k) total[k] = 0;
  for (int64_t i = begin + group; i < end && i < sums.rows.rows; i += sums.groups) {
    if (sums.mask != nullptr && sums.mask[i] == 0) continue;
    const T* logits = static_cast<const T*>(sums.rows.logits) + i * sums.rows.logits_stride;
    const A scale = A(1) / sum[i], largest = max[i];
    A l[N];
    load_columns(logits, column, int(columns), l);
#pragma unroll
    for (int k = 0; k < N; ++k) total[k] += soft_exp<T>(l[k] - largest) * scale;
  }
  store_columns(total, static_cast<A*>(sums.partial) + part * columns, column, int(columns));
}

}  // namespace
}  // namespace sslkernels
