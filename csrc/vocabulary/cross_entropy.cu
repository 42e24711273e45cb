// Launch plans of the cross-entropy kernels, and the choice by element type. The float and double kernels are
// instantiated here.
#include <algorithm>

#include "vocabulary/cross_entropy_launch_cuda.h"

namespace sslkernels {

extern template void launch_rows_fwd<BFloat16>(const CrossEntropyRows&, void*);
extern template void launch_rows_bwd<BFloat16>(const CrossEntropyRows&, void*);
extern template void launch_rows_fwd<Half>(const CrossEntropyRows&, void*);
extern template void launch_rows_bwd<Half>(const CrossEntropyRows&, void*);

namespace {

// 16-byte groups of a row at any alignment.
int64_t groups_of_row(const CrossEntropyRows& rows) { return ceil_div(rows.vocab, 16 / bytes_of(rows.element)) + 1; }

void check_columns(const CrossEntropyRows& rows) {
  if (rows.vocab > int64_t(1) << 30) {  // column and group numbers are 32-bit
    fail("the CUDA kernels of cross-entropy take at most 2^30 columns");
  }
}

int threads_for(int64_t groups, int most = kRowThreads) {
  const int64_t wanted = ceil_div(ceil_div(groups, kBatch<false>), kWarpSize) * kWarpSize;
  return int(std::clamp<int64_t>(wanted, kWarpSize, most));
}

// Threads per block of the two-pass kernel, so that all rows in flight fit in L2. The L2 cache has two halves that may
// each hold a copy of the same line, and gradients pass through it too: 3 / 8 of it count.
int threads_for_two_reads(const CrossEntropyRows& rows, const DeviceLimits& limits) {
  const int resident = rows.element == Element::kDouble ? kResident<double> : kResident<float>;
  const int64_t row_bytes = rows.vocab * bytes_of(rows.element);
  const int64_t fit = limits.cache * 3 / 8 / (limits.processors * row_bytes);
  const int64_t rows_at_once = std::clamp<int64_t>(fit, 1, resident / kRowThreads);
  return int(resident / rows_at_once / kWarpSize * kWarpSize);
}

}  // namespace

RowPlan plan_rows_fwd(const CrossEntropyRows& rows, int64_t scratch_bytes, const DeviceLimits& limits) {
  const int64_t groups = groups_of_row(rows);
  // RowFeatures::Cached: float for transformed logits, else the logits as they are.
  const int64_t cached_bytes_each = is_transformed(rows) ? int64_t(sizeof(float)) : bytes_of(rows.element);
  const int64_t group_bytes = 16 / bytes_of(rows.element) * cached_bytes_each;
  const auto cached_bytes = [&](int cluster) { return scratch_bytes + ceil_div(groups, cluster) * group_bytes; };
  // Several blocks per multiprocessor, so that some load while others compute or store.
  const int blocks = limits.largest_cluster > 1 ? 3 : 2;
  const int64_t wanted =
      std::min(limits.shared_per_block, limits.shared_per_processor / blocks - limits.shared_reserved);

  RowPlan plan{false, 1, 1, 0, scratch_bytes};
  if (rows.grad != nullptr && rows.element != Element::kDouble) {
    int cluster = 1;
    while (cluster < limits.largest_cluster && cached_bytes(cluster) > wanted) cluster *= 2;
    const int64_t allowed = cluster > 1 ? limits.shared_per_block : wanted;
    if (cached_bytes(cluster) <= allowed) {
      plan.cached = true;
      plan.cluster = cluster;
    }
  }
  // A few rows are shared by more blocks, as long as each has work for all its threads.
  while (2 * plan.cluster <= std::min(limits.largest_cluster, kPortableCluster) &&
         rows.count * plan.cluster < limits.processors &&
         ceil_div(groups, 2 * plan.cluster) >= kBatch<false> * kRowThreads) {
    plan.cluster *= 2;
  }
  if (plan.cached) plan.shared_bytes = cached_bytes(plan.cluster);
  const bool twice = rows.grad != nullptr && !plan.cached;
  const int most = twice ? threads_for_two_reads(rows, limits) : kRowThreads;
  plan.threads = threads_for(ceil_div(groups, plan.cluster), most);
  return plan;
}

RowPlan plan_rows_bwd(const CrossEntropyRows& rows) {
  constexpr int64_t kGroupsOfPart = 8 * kRowThreads;
  const int64_t groups = groups_of_row(rows);
  const int parts = int(ceil_div(groups, kGroupsOfPart));
  return {false, 1, parts, threads_for(ceil_div(groups, parts)), 0};
}

void launch_cross_entropy_rows_fwd(const CrossEntropyRows& rows, void* stream) {
  check_columns(rows);
  with_element(rows.element, [&](auto zero) { launch_rows_fwd<decltype(zero)>(rows, stream); });
}

void launch_cross_entropy_rows_bwd(const CrossEntropyRows& rows, void* stream) {
  check_columns(rows);
  with_element(rows.element, [&](auto zero) { launch_rows_bwd<decltype(zero)>(rows, stream); });
}

}  // namespace sslkernels
