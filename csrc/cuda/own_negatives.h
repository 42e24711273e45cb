// Own negatives of rows of queries on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/own_negatives.h"

namespace sslkernels {

struct DeviceLimits;

// How a block computes its row: the negatives in tiles, each negative by a team of threads.
struct OwnPlan {
  int tile;      // negatives
  int team;      // threads, a power of two, at most a warp
  int pitch;     // 16-byte groups of a negative in shared memory, however it is aligned
  bool held;     // a tile is held in shared memory, for the gradients
  bool aligned;  // every negative and its gradient start at multiples of 16 bytes
  int threads;
  int64_t shared_bytes;
};

OwnPlan plan_own_negatives(const OwnNegatives& own, const DeviceLimits& limits);
void launch_own_negatives(const OwnNegatives& own, void* stream);

}  // namespace sslkernels
