// Gaussian samples and their divergence on the CPU.
#pragma once

#include "../common/gaussian.h"
#include "isa.h"

namespace sslkernels {

constexpr int64_t kGaussianChunk = 1024;  // columns of a row that are added up to one number

namespace {  // one copy for each instruction set: see isa.h

// The work is cut in tasks, blocks of rows of a chunk of columns, that are the same for any number of threads.
inline int64_t gaussian_chunks(const Gaussian& inputs) {
  return (inputs.columns + kGaussianChunk - 1) / kGaussianChunk;
}

// Rows of one chunk that are in the cache at a time.
inline int64_t gaussian_rows_of_batch(const Gaussian& inputs) {
  const int64_t columns = inputs.columns < kGaussianChunk ? (inputs.columns + 3) / 4 * 4 : kGaussianChunk;
  return kGaussianChunk / columns;
}

inline int64_t gaussian_rows_of_task(const Gaussian& inputs, bool has_sums) {
  return has_sums ? kGaussianRowsOfBlock : 16 * gaussian_rows_of_batch(inputs);
}

inline int64_t gaussian_tasks(const Gaussian& inputs, bool has_sums) {
  const int64_t rows = gaussian_rows_of_task(inputs, has_sums);
  return (inputs.rows + rows - 1) / rows * gaussian_chunks(inputs);
}

inline bool has_sums(const GaussianForward& forward) { return forward.statistics != nullptr; }
inline bool has_sums(const GaussianBackward& backward) {
  return (backward.grad_prior_mean != nullptr && backward.inputs.prior_mean.shared) ||
         (backward.grad_prior_logvar != nullptr && backward.inputs.prior_logvar.shared);
}

}  // namespace

// The tasks [begin, end).
#define SSLKERNELS_DECLARE(isa)                                                    \
  namespace isa {                                                                  \
  void gaussian_fwd(const GaussianForward& forward, int64_t begin, int64_t end);   \
  void gaussian_bwd(const GaussianBackward& backward, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
