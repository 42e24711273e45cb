// Rows that belong to a team: part of a warp, a block, or the blocks of a cluster.
#pragma once

#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"

namespace sslkernels {
namespace {

inline int power_of_2(int64_t value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

// `team` threads per row: lanes of a warp, or all threads of a block and of the blocks of its cluster.
inline LaunchShape shape_of_teams(int64_t rows, int team, int threads, int cluster, int64_t shared_bytes) {
  if (team > kWarpSize) return {rows * cluster, threads, shared_bytes, cluster};
  return {ceil_div(rows, threads / team), threads, shared_bytes, 1};
}

// A thread's position: it has the chunks lane, lane + step, ... of kChunk columns each. kWide: a team may be larger
// than a warp.
template <int kChunk, bool kWide = true>
struct TeamPlace {
  int64_t row;
  bool in_range;
  int lane;
  int step;
  int chunks;  // chunks of the row; 0 if the row is out of range
  int lanes;   // lanes of a warp that share a row; 0: the whole block does

  __device__ __forceinline__ TeamPlace(int64_t rows, int columns, int team) {
    lanes = !kWide || team <= kWarpSize ? team : 0;
    if (!kWide || lanes > 0) {
      row = int64_t(blockIdx.x) * (int(blockDim.x) / team) + int(threadIdx.x) / team;
      lane = int(threadIdx.x) % team;
      step = team;
    } else {
      row = int64_t(blockIdx.x) / cluster_size();
      lane = int(threadIdx.x) + cluster_rank() * int(blockDim.x);
      step = int(blockDim.x) * cluster_size();
    }
    in_range = row < rows;
    chunks = in_range ? (columns + kChunk - 1) / kChunk : 0;
  }
  __device__ __forceinline__ bool first() const { return in_range && lane == 0; }
};

// Butterfly reduction over the lanes of a warp that share a row, a power of 2 of them; called by the whole warp.
template <class Value, class Combine>
__device__ __forceinline__ Value over_lanes(Value value, int lanes, Combine combine) {
  for (int away = lanes / 2; away > 0; away /= 2) value = combine(value, shuffle_xor(value, away));
  return value;
}

// Reductions over the team of one row.
template <class Value>
struct TeamReduction {
  using Blocks = Reduction<Value>;

  static __device__ __forceinline__ Value run(Value value, int lanes, typename Blocks::Scratch* scratch) {
    return lanes == 0 ? Blocks::over_cluster(value, scratch) : over_lanes(value, lanes, Value::combine);
  }
  static __device__ __forceinline__ void finish(int lanes) {
    if (lanes == 0) Blocks::finish();
  }
};

}  // namespace
}  // namespace sslkernels
