#pragma once

#include "core/bind.h"
#include "core/segment_sums.h"

namespace sslkernels {

inline SortRows parse_sort_rows(const Tensor& keys, const Tensor& order, const Tensor& starts) {
  SortRows sort{};
  sort.entries = keys.numel();
  sort.rows = starts.numel() - 1;
  STD_TORCH_CHECK(sort.rows >= 0, "sslkernels: starts must have one element more than there are rows");
  sort.wide_keys = is_wide(keys, "keys");
  sort.keys = readable(keys, {sort.entries}, keys.scalar_type(), "keys");
  sort.order = writable<int64_t>(order, {sort.entries}, ScalarType::Long, "order");
  sort.starts = writable<int64_t>(starts, {sort.rows + 1}, ScalarType::Long, "starts");
  return sort;
}

inline CompactRows parse_compact_rows(const Tensor& keys, int64_t rows, const Tensor& order, const Tensor& index,
                                      const Tensor& starts, const Tensor& count) {
  CompactRows compact{};
  compact.entries = keys.numel();
  compact.rows = rows;
  compact.room = index.numel();
  STD_TORCH_CHECK(compact.room >= (rows < compact.entries ? rows : compact.entries),
                  "sslkernels: index must have room for all keys");
  compact.wide_keys = is_wide(keys, "keys");
  compact.keys = readable(keys, {compact.entries}, keys.scalar_type(), "keys");
  compact.order = writable<int64_t>(order, {compact.entries}, ScalarType::Long, "order");
  compact.index = writable<int64_t>(index, {compact.room}, ScalarType::Long, "index");
  compact.starts = writable<int64_t>(starts, {compact.room + 1}, ScalarType::Long, "starts");
  compact.count = writable<int64_t>(count, {}, ScalarType::Long, "count");
  return compact;
}

inline WeightedRowSums parse_weighted_row_sums(const Tensor& starts, const Tensor& order, const Tensor& coefficient,
                                               const Tensor& source, const OptionalTensor& source_index,
                                               const Tensor& out, int64_t entries_of_source) {
  STD_TORCH_CHECK(out.dim() == 2 && source.dim() == 2 && entries_of_source > 0,
                  "sslkernels: source and out must have 2 dimensions");
  WeightedRowSums sums{};
  sums.rows = out.size(0);
  sums.dim = out.size(1);
  sums.entries = order.numel();
  sums.source_rows = source.size(0);
  sums.entries_of_source = entries_of_source;
  const auto type = accumulation_type(out);
  STD_TORCH_CHECK(source.scalar_type() == out.scalar_type() || source.scalar_type() == type,
                  "sslkernels: source must have the dtype of out or the one that it is accumulated in");
  if (source_index) {
    sums.wide_index = is_wide(*source_index, "source_index");
    check_contiguous(*source_index, {sums.entries / entries_of_source}, source_index->scalar_type(), "source_index");
  } else {
    STD_TORCH_CHECK(sums.entries == sums.source_rows * entries_of_source, "sslkernels: wrong size of source");
  }
  sums.source_element = element_of(source);
  sums.out_element = element_of(out);
  sums.starts = readable<int64_t>(starts, {sums.rows + 1}, ScalarType::Long, "starts");
  sums.order = readable<int64_t>(order, {sums.entries}, ScalarType::Long, "order");
  if (!starts.is_cuda()) {
    bool ordered = sums.rows == 0 || sums.starts[0] >= 0;
    for (int64_t r = 0; r < sums.rows; ++r) ordered &= sums.starts[r] <= sums.starts[r + 1];
    STD_TORCH_CHECK(ordered && sums.starts[sums.rows] <= sums.entries,
                    "sslkernels: starts must ascend from 0 to at most the number of entries");
    check_indices(order, sums.starts[sums.rows], sums.entries, "order");
  }
  sums.coefficient = readable(coefficient, {sums.entries}, type, "coefficient");
  sums.source = readable(source, {sums.source_rows, sums.dim}, source.scalar_type(), "source");
  sums.source_index = pointer(source_index);
  sums.out = writable(out, {sums.rows, sums.dim}, out.scalar_type(), "out");
  return sums;
}

}  // namespace sslkernels
