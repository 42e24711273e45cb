// GloVe's weighted squares, two or four pairs per warp, whose rows are in flight together. Each lane holds the indices
// of one pair and finishes its score.
#include "contrastive/glove.h"
#include "core/cuda/columns.h"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Pairs per warp. Four take more registers than half of the warps of a multiprocessor have, but for float64.
template <class T>
constexpr int kPairsOf = sizeof(T) == 8 ? 4 : 2;

template <class A>
struct Sum {
  A value;
  static __device__ __forceinline__ Sum identity() { return {A(0)}; }
  static __device__ __forceinline__ Sum combine(Sum a, Sum b) { return {a.value + b.value}; }
};

// Grid: kWarps * kPairsOf<T> pairs per block.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    glove_fwd_kernel(const __grid_constant__ Glove pairs) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  constexpr int kTile = kWarpSize * kSize;
  constexpr int kPairs = kPairsOf<T>;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarpSize) * kPairs;
  if (first >= pairs.count) return;
  const int count = pairs.count - first < kPairs ? int(pairs.count - first) : kPairs;
  const int64_t i = first + (lane < count ? lane : 0);
  int64_t center = index_at(pairs.center, pairs.wide_index, i);
  int64_t context = index_at(pairs.context, pairs.wide_index, i);
  const bool wrong = !in_range(center, pairs.center_rows) || !in_range(context, pairs.context_rows);
  if (wrong) center = context = 0;  // rows that exist; the pair's results are NaN

  const T* u[kPairs];
  const T* v[kPairs];
  A parts[kPairs] = {};
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int from = j < count ? j : 0;
    u[j] = static_cast<const T*>(pairs.center_weight) + shuffle(center, from) * pairs.dim;
    v[j] = static_cast<const T*>(pairs.context_weight) + shuffle(context, from) * pairs.dim;
  }
  for (int column = lane * kSize; column < int(pairs.dim); column += kTile) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      A of_center[kSize], of_context[kSize];
      load_columns(u[j], column, int(pairs.dim), of_center);
      load_columns(v[j], column, int(pairs.dim), of_context);
#pragma unroll
      for (int c = 0; c < kSize; ++c) parts[j] += of_center[c] * of_context[c];
    }
  }
  A score = 0;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const A sum = Reduction<Sum<A>>::over_warp({parts[j]}).value;
    if (lane == j) score = sum;
  }
  if (lane >= count) return;
  const A bias = A(to_float(static_cast<const T*>(pairs.center_bias)[center])) +
                 A(to_float(static_cast<const T*>(pairs.context_bias)[context]));
  const A weight = static_cast<const A*>(pairs.weight)[i];
  const A error = wrong ? A(NAN) : score + bias - static_cast<const A*>(pairs.target)[i];
  static_cast<A*>(pairs.loss)[i] = weight * error * error;
  if (pairs.slope != nullptr) static_cast<A*>(pairs.slope)[i] = 2 * weight * error;
}

template <class T>
void launch_for(const Glove& pairs, void* stream) {
  const LaunchShape shape{ceil_div(pairs.count, kWarps * kPairsOf<T>), kThreads, 0, 1};
  launch("glove_fwd_kernel", glove_fwd_kernel<T>, shape, stream, pairs);
}

}  // namespace

void launch_glove_fwd(const Glove& pairs, void* stream) {
  check_dim(pairs.dim);
  with_element(pairs.element, [&](auto zero) { launch_for<decltype(zero)>(pairs, stream); });
}

}  // namespace sslkernels
