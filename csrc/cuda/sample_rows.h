// The choice of a column by Gumbel noise on a GPU, from float32 or float64 products. `stream` is a cudaStream_t.
#pragma once

#include "../common/sample_rows.h"

namespace sslkernels {

struct DeviceLimits;

struct SamplePlan {
  int team;     // threads of a row: at most those of a warp, or the block's
  int threads;  // of a block
  int cluster;  // blocks of a row, where it has the block
};

SamplePlan plan_sample_rows(int64_t rows, int64_t columns, const DeviceLimits& limits);
void launch_sample_rows(const SampleRows& sample, void* stream);

}  // namespace sslkernels
