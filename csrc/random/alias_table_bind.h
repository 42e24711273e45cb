#pragma once

#include "random/alias_table.h"
#include "random/random_stream_bind.h"

namespace sslkernels {

inline AliasDraw parse_alias_draw(const Tensor& seed, const OptionalTensor& row_ids, const Tensor& table,
                                  const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2 && table.dim() == 2, "sslkernels: table and out must have 2 dimensions");
  AliasDraw draw{};
  draw.size = table.size(0);
  STD_TORCH_CHECK(draw.size > 0 && draw.size < int64_t(1) << 31, "sslkernels: a table has 1 to 2^31 - 1 rows");
  draw.buckets = readable<AliasBucket>(table, {draw.size, 2}, ScalarType::Int, "table");
  draw.rows = out.size(0);
  draw.columns = out.size(1);
  draw.row_ids = parse_row_ids(row_ids, draw.rows);
  draw.seed = parse_seed(seed);
  draw.out = writable<int64_t>(out, {draw.rows, draw.columns}, ScalarType::Long, "out");
  return draw;
}

}  // namespace sslkernels
