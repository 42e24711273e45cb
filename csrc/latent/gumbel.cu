// Launch plans of the Gumbel-softmax kernels, and the choice by element type.
#include <algorithm>

#include "latent/gumbel.h"
#include "latent/gumbel_rows_cuda.h"

namespace sslkernels {
namespace {

// A few rows are shared by more blocks, as long as each thread has two chunks.
void share_rows(GumbelPlan& plan, int64_t rows, int64_t chunks, const DeviceLimits& limits) {
  while (2 * plan.cluster <= limits.largest_cluster && rows * plan.cluster < limits.processors &&
         chunks >= int64_t(4) * plan.cluster * plan.threads) {
    plan.cluster *= 2;
  }
}

template <class T, class Scratch>
GumbelPlan plan_of(const GumbelRows& rows, bool twice, DeviceLimits limits, bool clusters) {
  check_dim(rows.columns);
  if (!clusters) limits.largest_cluster = 1;
  return plan_gumbel_rows(rows.rows, rows.columns, kChunk<T>, sizeof(typename Accumulation<T>::type), twice,
                          kMostThreads<T>, kScratchBytes<Scratch>, limits);
}

LaunchShape shape_of(const GumbelPlan& plan, int64_t rows) {
  return shape_of_teams(rows, plan.team, plan.threads, plan.cluster, plan.shared_bytes);
}

template <class T>
void launch_fwd(const GumbelForward& forward, void* stream) {
  constexpr const char* kName = "gumbel_rows_fwd_kernel";
  const auto kernel = gumbel_rows_fwd_kernel<T>;
  const GumbelPlan plan = plan_of<T, ForwardScratch<T>>(forward.rows, forward.output == GumbelOutput::kSoft,
                                                        device_limits(), knows_clusters(kName, kernel));
  launch(kName, kernel, shape_of(plan, forward.rows.rows), stream, forward, GumbelTeam{plan.team, plan.cached});
}

template <class T>
void launch_bwd(const GumbelBackward& backward, void* stream) {
  constexpr const char* kName = "gumbel_rows_bwd_kernel";
  const auto kernel = gumbel_rows_bwd_kernel<T>;
  const GumbelPlan plan = plan_of<T, BackwardScratch<T>>(backward.rows, backward.grad != nullptr, device_limits(),
                                                         knows_clusters(kName, kernel));
  launch(kName, kernel, shape_of(plan, backward.rows.rows), stream, backward, GumbelTeam{plan.team, plan.cached});
}

template <class T>
void launch_sums(const ProbabilitySums& sums, void* stream) {
  check_dim(sums.rows.columns);
  const int64_t column_chunks = ceil_div(sums.rows.columns, kChunk<T>);
  const int lanes = power_of_2(std::min<int64_t>(column_chunks, kThreads));
  const int tiles = int(ceil_div(column_chunks, lanes));
  const int64_t threads = sums.chunks * sums.groups * tiles * lanes;
  launch("probability_sums_kernel", probability_sums_kernel<T>, {ceil_div(threads, kThreads), kThreads, 0, 1}, stream,
         sums, lanes, tiles);
}

}  // namespace

GumbelPlan plan_gumbel_rows(int64_t rows, int64_t columns, int chunk, int bytes_each, bool twice, int most_threads,
                            int64_t scratch_bytes, const DeviceLimits& of_device) {
  const int64_t chunks = ceil_div(columns, chunk), chunk_bytes = chunk * bytes_each;
  DeviceLimits limits = of_device;
  limits.largest_cluster = std::min(limits.largest_cluster, kPortableCluster);
  GumbelPlan plan{1, kThreads, 1, false, scratch_bytes};
  if (chunks <= kWarpSize) {
    plan.team = power_of_2(chunks);
    const int64_t each = ceil_div(rows * plan.team, limits.processors);  // spreads a few rows over all multiprocessors
    plan.threads = whole_warps(std::clamp<int64_t>(each, 1, kThreads));
    plan.cached = twice;
    if (twice) plan.shared_bytes += plan.threads * chunk_bytes;
    return plan;
  }
  plan.threads = whole_warps(std::min<int64_t>(chunks, kThreads));
  const auto cached_bytes = [&](int cluster) {
    return scratch_bytes + ceil_div(chunks, int64_t(plan.threads) * cluster) * plan.threads * chunk_bytes;
  };
  if (twice) {
    // As many threads as the multiprocessor supports, however few blocks fit in its shared memory.
    while (plan.cluster < limits.largest_cluster && cached_bytes(plan.cluster) > limits.shared_per_block) {
      plan.cluster *= 2;
    }
    plan.cached = cached_bytes(plan.cluster) <= limits.shared_per_block;
    if (plan.cached) {
      const int64_t blocks = limits.shared_per_processor / (cached_bytes(plan.cluster) + limits.shared_reserved);
      plan.threads =
          whole_warps(std::clamp<int64_t>(most_threads / std::max<int64_t>(blocks, 1), plan.threads, most_threads));
      plan.cached = cached_bytes(plan.cluster) <= limits.shared_per_block;
    }
    if (!plan.cached) {
      plan.cluster = 1;
      plan.threads = kThreads;
    }
  }
  share_rows(plan, rows, chunks, limits);
  if (plan.cached) plan.shared_bytes = cached_bytes(plan.cluster);
  plan.team = plan.threads;
  return plan;
}

void launch_gumbel_rows_fwd(const GumbelForward& forward, void* stream) {
  with_element(forward.rows.element, [&](auto zero) { launch_fwd<decltype(zero)>(forward, stream); });
}

void launch_gumbel_rows_bwd(const GumbelBackward& backward, void* stream) {
  with_element(backward.rows.element, [&](auto zero) { launch_bwd<decltype(zero)>(backward, stream); });
}

void launch_probability_sums(const ProbabilitySums& sums, void* stream) {
  with_element(sums.rows.element, [&](auto zero) { launch_sums<decltype(zero)>(sums, stream); });
}

}  // namespace sslkernels
