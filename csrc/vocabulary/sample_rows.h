// Gumbel-max over tiles of logits: arguments of the kernels and launchers. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// Logits are (product + bias) * scale for columns [first_column, first_column + columns) of rows of `vocab` columns;
// first_column is a multiple of 4. An infinite scale, of temperature 0, draws the largest logit: without noise, with
// log-probability 0. A logit of -inf stays -inf at scale 0. The state of a row is carried from tile to tile in column
// order, in the accumulation type: the largest logit, the sum of exponentials relative to it, the largest logit +
// noise, its logit and its column. The first tile initialises it; the last one turns the logit into its
// log-probability.
struct SampleRows {
  Element element;
  const void* products;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  int64_t first_column;
  int64_t vocab;
  const void* bias;        // (vocab), accumulation type, or null
  const void* scale;       // (rows), accumulation type
  int64_t draw;            // which of the samples of a row; the third coordinate of the noise
  const int64_t* row_ids;  // (rows)
  const int64_t* seed;
  void* row_max;
  void* sum_exp;
  void* best;
  void* logprob;
  int64_t* index;
};

namespace {  // one copy for each instruction set of the CPU

constexpr float kLargestGumbel = 22.88f;  // Gumbel number of the word 0, rounded up

SSLKERNELS_HD bool is_first_tile(const SampleRows& sample) { return sample.first_column == 0; }
SSLKERNELS_HD bool is_last_tile(const SampleRows& sample) {
  return sample.first_column + sample.columns == sample.vocab;
}

}  // namespace

// Rows [begin, end) of a tile.
SSLKERNELS_CPU_KERNELS(void sample_rows(const SampleRows& sample, int64_t begin, int64_t end);)

struct DeviceLimits;

struct SamplePlan {
  int team;     // threads per row: at most a warp, or all of a block
  int threads;  // per block
  int cluster;  // blocks per row if the team is a block
};

SamplePlan plan_sample_rows(int64_t rows, int64_t columns, const DeviceLimits& limits);
void launch_sample_rows(const SampleRows& sample, void* stream);

}  // namespace sslkernels
