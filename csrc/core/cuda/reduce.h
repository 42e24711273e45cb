// Reductions over the threads of a warp, a block and a cluster, in a fixed order.
#pragma once

#include "core/cuda/device.h"

namespace sslkernels {

constexpr int kMaxWarps = 32;

// A Value has `static Value identity()` and `static Value combine(Value, Value)`, and is trivially copyable. It has
// fields `unused` in place of padding, which a shuffle would move uninitialised.
template <class Value>
struct Reduction {
  struct Scratch {
    Value of_warp[kMaxWarps];
    Value of_block;
  };

  // Combined in the order of lane 0 and returned to every lane.
  static __device__ __forceinline__ Value over_warp(Value value) {
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      value = Value::combine(value, shuffle_xor(value, lanes));
    }
    return shuffle(value, 0);
  }

  // Over all threads of the cluster, returned to each. One call per kernel, by every thread, which must call finish()
  // before it exits: until then other blocks read this block's shared memory.
  static __device__ __forceinline__ Value over_cluster(Value value, Scratch* scratch) {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
    const int warps = int(blockDim.x) / kWarpSize, blocks = cluster_size();
    value = over_warp(value);
    if (lane == 0) scratch->of_warp[warp] = value;
    __syncthreads();
    value = over_warp(lane < warps ? scratch->of_warp[lane] : Value::identity());
    if (blocks > 1) {
      if (threadIdx.x == 0) scratch->of_block = value;
      cluster_arrive();
      cluster_wait();
      value = over_warp(lane < blocks ? *cluster_shared(&scratch->of_block, lane) : Value::identity());
      cluster_arrive_relaxed();
    }
    return value;
  }
  static __device__ __forceinline__ void finish() {
    if (cluster_size() > 1) cluster_wait();
  }
};

}  // namespace sslkernels
