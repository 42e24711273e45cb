// Launches the kernels of cross_entropy_rows_cuda.h for one element type.
#pragma once

#include "core/cuda/launch.h"
#include "vocabulary/cross_entropy.h"
#include "vocabulary/cross_entropy_rows_cuda.h"

namespace sslkernels {

// Calls `run` with the fewest features that the rows need; float64 has one kernel for all.
template <class T, bool kSums, class Run>
void with_features(const CrossEntropyRows& rows, Run run) {
  if constexpr (sizeof(T) == 8) {
    run(RowFeatures<true, kSums>{});
  } else if (is_transformed(rows)) {
    run(RowFeatures<true, kSums>{});
  } else {
    run(RowFeatures<false, kSums>{});
  }
}

template <class T>
void launch_rows_fwd(const CrossEntropyRows& rows, void* stream) {
  constexpr const char* kName = "cross_entropy_rows_fwd_kernel";
  if (rows.count == 0) return;
  const auto run = [&](auto features) {
    using F = decltype(features);
    const int64_t scratch = (sizeof(typename Reduction<RowPartial<T, F::kSums>>::Scratch) + 15) / 16 * 16;
    DeviceLimits limits = device_limits();
    if (limits.largest_cluster > 1 && !knows_clusters(kName, cross_entropy_rows_fwd_kernel<T, F, false>)) {
      limits.largest_cluster = 1;
    }
    RowPlan plan = plan_rows_fwd(rows, scratch, limits);
    const auto shape = [&] {
      return LaunchShape{rows.count * plan.cluster, plan.threads, plan.shared_bytes, plan.cluster};
    };
    if constexpr (sizeof(T) < 8) {
      if (plan.cluster > kPortableCluster && !can_launch(kName, cross_entropy_rows_fwd_kernel<T, F, true>, shape())) {
        limits.largest_cluster = kPortableCluster;
        plan = plan_rows_fwd(rows, scratch, limits);
      }
      if (plan.cached) return launch(kName, cross_entropy_rows_fwd_kernel<T, F, true>, shape(), stream, rows);
    }
    launch(kName, cross_entropy_rows_fwd_kernel<T, F, false>, shape(), stream, rows);
  };
  [[maybe_unused]] const bool sums = rows.prediction != nullptr || rows.options.label_smoothing > 0;
  if constexpr (sizeof(T) == 8) {
    with_features<T, true>(rows, run);
  } else {
    sums ? with_features<T, true>(rows, run) : with_features<T, false>(rows, run);
  }
}

template <class T>
void launch_rows_bwd(const CrossEntropyRows& rows, void* stream) {
  with_features<T, false>(rows, [&](auto features) {
    const RowPlan plan = plan_rows_bwd(rows);
    const LaunchShape shape{rows.count * plan.parts, plan.threads, 0, 1};
    launch("cross_entropy_rows_bwd_kernel", cross_entropy_rows_bwd_kernel<T, decltype(features)>, shape, stream, rows,
           plan.parts);
  });
}

}  // namespace sslkernels
