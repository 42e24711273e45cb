#include "core/cuda/launch.h"
#include "planted.h"

namespace {

using namespace sslkernels;

enum Mistake : int64_t {
  kNone,
  kNoBarrier,
  kOutOfBounds,
  kNoClusterBarrier,
  kSameElement,
  kMisaligned,
  kNoLastBarrier
};

// Each thread writes a number that its neighbour reads, then adds the neighbouring block's number.
__global__ void planted_kernel(int64_t mistake, int32_t* out) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  auto* values = reinterpret_cast<int32_t*>(shared_memory());
  values[thread] = thread + 1;
  if (mistake != kNoBarrier) __syncthreads();
  const int32_t neighbour = values[(thread + 1) % threads];
  if (mistake != kNoClusterBarrier) {
    cluster_arrive();
    cluster_wait();
  }
  const int32_t other = cluster_shared(values, (cluster_rank() + 1) % cluster_size())[thread];
  int64_t at = int64_t(blockIdx.x) * threads + thread;
  if (mistake == kOutOfBounds) at += 1;
  if (mistake == kSameElement) at = thread;
  if (mistake == kMisaligned) {
    if (thread == 0) store_words(out + 1, Words{});
  } else {
    out[at] = neighbour + other;
  }
  if (mistake != kNoLastBarrier) {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace

void launch_planted(const cuda_host::Call& call) {
  const LaunchShape shape{call.integer("blocks"), 32, 32 * sizeof(int32_t), 2};
  launch("planted_kernel", planted_kernel, shape, nullptr, call.integer("mistake"), call.array<int32_t>("out"));
}
