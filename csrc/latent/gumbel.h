// Gumbel-softmax over rows: arguments of the kernels and launchers. `stream` is a cudaStream_t.
//
// With noise g (none without a seed), s = logits + g of a row is reduced to its state: the maximum, the sum of exp((s -
// maximum) / tau), and the lowest index of the maximum. s is one float32 addition (float64 for float64 logits), so that
// the index is the same on every backend. A NaN, +inf or a row of -inf makes the sum NaN; NaN is never a maximum.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// One number per row, in the accumulation type A of the logits.
struct GumbelState {
  void* max;
  void* sum;
};

struct GumbelRows {
  Element element;
  const void* logits;  // (rows, columns), rows `logits_stride` apart
  int64_t logits_stride;
  int64_t rows;
  int64_t columns;
  const int64_t* seed;     // null: no noise
  const int64_t* row_ids;  // (rows); null: row i has id first_row + i
  int64_t first_row;
  const double* inverse_tau;  // null: 1
  GumbelState state;          // with noise
  GumbelState softmax_state;  // softmax of the logits: without noise, tau = 1; or null
};

enum class GumbelOutput { kNone, kSoft, kHard };

struct GumbelForward {
  GumbelRows rows;
  GumbelOutput output;
  void* y;          // (rows, columns), contiguous, in the type of the logits
  int64_t* index;   // (rows), or null
  int64_t* argmax;  // index without noise; null together with softmax_state
};

// grad_logits = y * (grad - <grad, y>) / tau. With grad_usage, rows that are valid in `mask` also get p * (usage -
// <usage, p>), p = softmax(logits), with usage = grad_usage[i % groups] for row i.
struct GumbelBackward {
  GumbelRows rows;
  const void* grad;  // rows grad_stride apart; null: 0. May alias grad_logits.
  bool wide_grad;    // A, else the type of the logits
  int64_t grad_stride;
  const void* grad_usage;  // A (groups, columns), or null
  const uint8_t* mask;     // (rows), or null: all
  int64_t groups;
  void* grad_logits;  // (rows, columns), contiguous, in the type of the logits
};

// partial[c][i % groups] = sum of softmax(logits) over the rows i of chunk c that are valid in `mask`; a chunk has
// chunk_rows * groups rows.
struct ProbabilitySums {
  GumbelRows rows;
  const uint8_t* mask;
  int64_t groups;
  int64_t chunk_rows;
  int64_t chunks;
  void* partial;  // A (chunks, groups, columns)
};

namespace {  // one copy for each instruction set of the CPU

SSLKERNELS_HD uint64_t row_number(const GumbelRows& rows, int64_t i) {
  return uint64_t(rows.row_ids == nullptr ? rows.first_row + i : rows.row_ids[i]);
}

SSLKERNELS_HD double inverse_tau_of(const GumbelRows& rows) {
  return rows.inverse_tau == nullptr ? 1.0 : *rows.inverse_tau;
}

}  // namespace

// Rows [begin, end), or chunks. `scratch` has one number of the accumulation type per column.
SSLKERNELS_CPU_KERNELS(void gumbel_rows_fwd(const GumbelForward& forward, int64_t begin, int64_t end, void* scratch);
                       void gumbel_rows_bwd(const GumbelBackward& backward, int64_t begin, int64_t end, void* scratch);
                       void probability_sums(const ProbabilitySums& sums, int64_t begin, int64_t end);)

struct DeviceLimits;

struct GumbelPlan {
  int team;     // threads per row: at most a warp, or all of a block
  int threads;  // per block
  int cluster;  // blocks per row if the team is a block
  bool cached;
  int64_t shared_bytes;
};

// twice: a second pass needs the results of the first, bytes_each per column, which are cached if they fit.
GumbelPlan plan_gumbel_rows(int64_t rows, int64_t columns, int chunk, int bytes_each, bool twice, int most_threads,
                            int64_t scratch_bytes, const DeviceLimits& limits);

void launch_gumbel_rows_fwd(const GumbelForward& forward, void* stream);
void launch_gumbel_rows_bwd(const GumbelBackward& backward, void* stream);
void launch_probability_sums(const ProbabilitySums& sums, void* stream);

}  // namespace sslkernels
