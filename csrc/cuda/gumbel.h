// Gumbel-softmax over rows on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/gumbel.h"

namespace sslkernels {

struct DeviceLimits;

struct GumbelPlan {
  int team;     // threads of a row: at most those of a warp, or the block's
  int threads;  // of a block
  int cluster;  // blocks of a row, where it has the block
  bool held;
  int64_t shared_bytes;
};

// twice: a second pass needs what the first has made, bytes_each a column, which is held where it fits.
GumbelPlan plan_gumbel_rows(int64_t rows, int64_t columns, int chunk, int bytes_each, bool twice, int most_threads,
                            int64_t scratch_bytes, const DeviceLimits& limits);

void launch_gumbel_rows_fwd(const GumbelForward& forward, void* stream);
void launch_gumbel_rows_bwd(const GumbelBackward& backward, void* stream);
void launch_probability_sums(const ProbabilitySums& sums, void* stream);

}  // namespace sslkernels
