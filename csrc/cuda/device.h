// What the kernels use of the GPU: reductions over a block. The only header that knows it runs on one.
#pragma once

#include <cstdint>

namespace sslkernels {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;

struct Sum {
  template <class A>
  static __device__ A identity() {
    return A(0);
  }
  template <class A>
  static __device__ A combine(A a, A b) {
    return a + b;
  }
};

struct Max {
  template <class A>
  static __device__ A identity() {
    return A(-INFINITY);
  }
  template <class A>
  static __device__ A combine(A a, A b) {
    return a > b ? a : b;
  }
};

// The reduction of `value` over the block, in the same order each time, returned to every thread. blockDim.x is a
// multiple of the warp size; every thread of the block calls it.
template <class Reduction, class A>
__device__ A block_reduce(A value) {
  __shared__ A of_warp[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = Reduction::combine(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < warps ? of_warp[lane] : Reduction::template identity<A>();
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = Reduction::combine(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  __syncthreads();  // of_warp may be written again
  return value;
}

}  // namespace sslkernels
