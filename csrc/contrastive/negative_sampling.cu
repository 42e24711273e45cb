// Skip-gram with negative sampling, one warp per pair; each row is read from memory once. Up to 32 candidates at a time
// (the context and the negatives) have their scores in one lane each. The direction, the sum of their rows weighted by
// the slopes, reads them again while they are in the cache.
#include "contrastive/negative_sampling.h"
#include "core/cuda/columns.h"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <class T>
constexpr int kInFlight = sizeof(T) == 2 ? 2 : 4;  // candidates whose rows are in flight

struct Math {
  template <class A>
  static SSLKERNELS_HD A exp(A x) {
    return std::exp(x);
  }
  template <class A>
  static SSLKERNELS_HD A log1p(A x) {
    return std::log1p(x);
  }
};

template <class A>
struct Sum {
  A value;
  static __device__ __forceinline__ Sum identity() { return {A(0)}; }
  static __device__ __forceinline__ Sum combine(Sum a, Sum b) { return {a.value + b.value}; }
};

// Candidate 0 is the context; the others are the negatives, -1 for none.
__device__ __forceinline__ int64_t candidate(const NegativeSampling& pairs, int64_t i, int64_t k) {
  return k == 0 ? index_at(pairs.context, pairs.wide_index, i)
                : index_at(pairs.negatives, pairs.wide_index, i * pairs.negative_count + k - 1);
}

template <class A>
__device__ __forceinline__ void fill_with_nan(A* out, int64_t count, int lane) {
  for (int64_t j = lane; j < count; j += kWarpSize) out[j] = A(NAN);
}

// Grid: kWarps pairs per block.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    negative_sampling_fwd_kernel(const __grid_constant__ NegativeSampling pairs) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  constexpr int kTile = kWarpSize * kSize;
  constexpr int kAtOnce = kInFlight<T>;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t i = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarpSize;
  if (i >= pairs.count) return;
  const int64_t dim = pairs.dim, candidates = 1 + pairs.negative_count;
  A* loss = static_cast<A*>(pairs.loss) + i;
  A* slopes = pairs.slopes == nullptr ? nullptr : static_cast<A*>(pairs.slopes) + i * candidates;
  A* direction = pairs.direction == nullptr ? nullptr : static_cast<A*>(pairs.direction) + i * dim;

  const int64_t center = index_at(pairs.center, pairs.wide_index, i), context = candidate(pairs, i, 0);
  int wrong = !in_range(center, pairs.center_rows);
  for (int64_t k = lane; k < candidates; k += kWarpSize) {
    const int64_t index = candidate(pairs, i, k);
    wrong += !in_range(index, pairs.context_rows) && (k == 0 || index != -1);
  }
  if (Reduction<Sum<int>>::over_warp({wrong}).value > 0) {
    fill_with_nan(loss, 1, lane);
    if (slopes != nullptr) fill_with_nan(slopes, candidates, lane);
    if (direction != nullptr) fill_with_nan(direction, dim, lane);
    return;
  }

  const T* u = static_cast<const T*>(pairs.center_weight) + center * dim;
  const T* table = static_cast<const T*>(pairs.context_weight);
  A losses = 0;
  for (int64_t first = 0; first < candidates; first += kWarpSize) {
    const int count = candidates - first < kWarpSize ? int(candidates - first) : kWarpSize;
    const int64_t own = candidate(pairs, i, first + (lane < count ? lane : 0));
    A score = 0;
    for (int t = 0; t < count; t += kAtOnce) {
      const T* rows[kAtOnce];
      A parts[kAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t index = shuffle(own, t + j < count ? t + j : t);
        rows[j] = table + (index < 0 ? 0 : index) * dim;
      }
      for (int column = lane * kSize; column < int(dim); column += kTile) {
        A of_center[kSize];
        load_columns(u, column, int(dim), of_center);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          A of_row[kSize];
          load_columns(rows[j], column, int(dim), of_row);
#pragma unroll
          for (int c = 0; c < kSize; ++c) parts[j] += of_center[c] * of_row[c];
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const A sum = Reduction<Sum<A>>::over_warp({parts[j]}).value;
        if (lane == t + j) score = sum;
      }
    }

    ScoreTerm<A> term = score_term<Math>(score, first + lane == 0);
    const bool excluded = own < 0 || (pairs.exclude_positive && first + lane > 0 && own == context);
    if (lane >= count || excluded) term = {A(0), A(0)};
    losses += term.loss;
    if (slopes != nullptr && lane < count) slopes[first + lane] = term.slope;

    if (direction == nullptr) continue;
    for (int tile = 0; tile < int(dim); tile += kTile) {
      const int column = tile + lane * kSize;
      A sum[kSize] = {};
      if (first > 0) load_columns(direction, column, int(dim), sum);
#pragma unroll(kAtOnce)
      for (int t = 0; t < count; ++t) {
        const int64_t index = shuffle(own, t);
        if (index < 0) continue;  // for all lanes alike
        const T* row = table + index * dim;
        const A slope = shuffle(term.slope, t);
        A of_row[kSize];
        load_columns(row, column, int(dim), of_row);
#pragma unroll
        for (int c = 0; c < kSize; ++c) sum[c] += slope * of_row[c];
      }
      store_columns(sum, direction, column, int(dim));
    }
  }
  const A total = Reduction<Sum<A>>::over_warp({losses}).value;
  if (lane == 0) *loss = total;
}

template <class T>
void launch_for(const NegativeSampling& pairs, void* stream) {
  const LaunchShape shape{ceil_div(pairs.count, kWarps), kThreads, 0, 1};
  launch("negative_sampling_fwd_kernel", negative_sampling_fwd_kernel<T>, shape, stream, pairs);
}

}  // namespace

void launch_negative_sampling_fwd(const NegativeSampling& pairs, void* stream) {
  check_dim(pairs.dim);
  with_element(pairs.element, [&](auto zero) { launch_for<decltype(zero)>(pairs, stream); });
}

}  // namespace sslkernels
