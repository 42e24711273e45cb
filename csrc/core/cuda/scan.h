// An exclusive scan over the threads of a block, in their order.
#pragma once

#include "core/cuda/reduce.h"

namespace sslkernels {

// Value as for Reduction; `combine` must be associative and need not commute.
template <class Value>
struct Scan {
  struct Scratch {
    Value of_warp[kMaxWarps];
  };

  // Returns the combination of the values of all earlier threads; `total` gets the combination of all. Called by every
  // thread of the block. The scratch is read until the next barrier, so consecutive calls must alternate between two
  // scratches.
  static __device__ __forceinline__ Value exclusive_over_block(Value value, Scratch* scratch, Value& total) {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    const int warps = int(blockDim.x) / kWarpSize;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const Value before = shuffle_up(value, lanes);
      if (lane >= lanes) value = Value::combine(before, value);
    }
    if (lane == kWarpSize - 1) scratch->of_warp[warp] = value;
    const Value in_warp = shuffle_up(value, 1);
    __syncthreads();
    Value before = Value::identity();
    total = Value::identity();
    for (int w = 0; w < warps; ++w) {
      if (w == warp) before = total;
      total = Value::combine(total, scratch->of_warp[w]);
    }
    return lane == 0 ? before : Value::combine(before, in_warp);
  }
};

}  // namespace sslkernels
