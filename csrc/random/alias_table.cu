// Indices from an alias table: a thread draws for a group of four columns.
#include "random/alias_table.h"
#include "random/cuda/noise.h"

namespace sslkernels {
namespace {

// Grid: one thread per group.
__global__ void __launch_bounds__(kThreads) alias_draw_kernel(const __grid_constant__ AliasDraw draw) {
  const ColumnGroup group = group_of_all(draw, thread_of_grid());
  if (group.count == 0) return;
  const uint64_t seed = uint64_t(*draw.seed);
  uint32_t high[kGroup], low[kGroup];
  draw_words(seed, group.number, 0, high);
  draw_words(seed, group.number, 1, low);
  int64_t index[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) index[k] = alias_index(draw, high[k], low[k]);
  store_group(index, group.count, draw.out + group.offset);
}

}  // namespace

void launch_alias_draw(const AliasDraw& draw, void* stream) {
  launch("alias_draw_kernel", alias_draw_kernel, shape_of_groups(draw.rows, draw.columns), stream, draw);
}

}  // namespace sslkernels
