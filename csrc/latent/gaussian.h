// gaussian_rsample and gaussian_kl: arguments of the kernels and launchers, and the divergence of one element.
// sslkernels/latent/gaussian_operators.py defines the operators. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/fma.h"

namespace sslkernels {

constexpr int64_t kGaussianRowsOfBlock = 64;  // rows that are reduced to one partial sum per column

// Rows begin `stride` elements apart; columns are contiguous. shared: one row for all, with stride 0.
struct GaussianRows {
  const void* data;
  int64_t stride;
  bool shared;
};

// Arguments that forward and backward share. A is the accumulation type. Null: absent.
struct Gaussian {
  Element element;  // type of all tensors that are not A
  int64_t rows;
  int64_t columns;
  int64_t samples;  // 0 if nothing is drawn
  GaussianRows mean;
  GaussianRows logvar;
  GaussianRows prior_mean;
  GaussianRows prior_logvar;
  const int64_t* row_ids;  // (rows); null: row i has id i
  const int64_t* seed;
  double free_bits;
  double low;
  double high;
};

// Strides of z: element (row, k, column) is at row * row_stride + k * sample_stride + column.
struct GaussianSamples {
  int64_t row_stride;
  int64_t sample_stride;
};

struct GaussianForward {
  Gaussian inputs;
  void* z;
  GaussianSamples z_strides;
  void* kl;  // A (rows, columns), or if by_row (rows, kl_parts): sums over parts of the columns
  bool by_row;
  int64_t kl_parts;
  // A (blocks, 3, columns), over the rows of a block: the sum of kl, the average of `mean` minus row 0 of it, and the
  // sum of squared deviations from that average
  void* statistics;
};

struct GaussianBackward {
  Gaussian inputs;
  const void* grad_z;
  GaussianSamples z_strides;
  const void* grad_kl;  // A (rows, columns), or if by_row (rows)
  int64_t kl_stride;    // from one row of grad_kl to the next
  bool by_row;
  void* grad_mean;  // (rows, columns), like the others
  void* grad_logvar;
  void* grad_prior_mean;  // if the rows share the prior: A (blocks, columns), sums over the rows of a block
  void* grad_prior_logvar;
};

namespace {  // one copy for each instruction set of the CPU

inline int64_t gaussian_blocks(const Gaussian& inputs) {
  return (inputs.rows + kGaussianRowsOfBlock - 1) / kGaussianRowsOfBlock;
}

// (exp(d) - 1 - d) / d^2 for |d| <= 1: 1/2! + d/3! + d^2/4! + ..., truncated below one rounding.
SSLKERNELS_HD float excess_series(float d) {
  float p = 2.50521084e-8f;  // 1/11!
  p = fused(p, d, 2.75573192e-7f);
  p = fused(p, d, 2.75573192e-6f);
  p = fused(p, d, 2.48015873e-5f);
  p = fused(p, d, 1.98412698e-4f);
  p = fused(p, d, 1.38888889e-3f);
  p = fused(p, d, 8.33333333e-3f);
  p = fused(p, d, 4.16666667e-2f);
  p = fused(p, d, 1.66666667e-1f);
  return fused(p, d, 0.5f);
}
SSLKERNELS_HD double excess_series(double d) {
  double p = 8.22063524662433e-18;  // 1/19!
  p = fused(p, d, 1.5619206968586225e-16);
  p = fused(p, d, 2.8114572543455206e-15);
  p = fused(p, d, 4.779477332387385e-14);
  p = fused(p, d, 7.647163731819816e-13);
  p = fused(p, d, 1.1470745597729725e-11);
  p = fused(p, d, 1.6059043836821613e-10);
  p = fused(p, d, 2.08767569878681e-09);
  p = fused(p, d, 2.505210838544172e-08);
  p = fused(p, d, 2.755731922398589e-07);
  p = fused(p, d, 2.7557319223985893e-06);
  p = fused(p, d, 2.48015873015873e-05);
  p = fused(p, d, 0.0001984126984126984);
  p = fused(p, d, 0.001388888888888889);
  p = fused(p, d, 0.008333333333333333);
  p = fused(p, d, 0.041666666666666664);
  p = fused(p, d, 0.16666666666666666);
  return fused(p, d, 0.5);
}

template <class A>
SSLKERNELS_HD A clamp(A value, A low, A high) {
  value = value < low ? low : value;
  return value > high ? high : value;  // propagates NaN
}

// exp(d) - 1 and exp(d) - 1 - d, from e = exp(d). (Through pointers, because gcc 12 does not vectorise a loop over
// structs of such results.)
template <class A>
SSLKERNELS_HD void expm1_terms(A d, A e, A* expm1, A* excess) {
  constexpr A kMost = A(1e30);  // avoids infinity - infinity
  const A near = d * d * excess_series(d);
  const A far = e - A(1);
  const bool is_near = (d >= A(-1)) & (d <= A(1));
  *expm1 = is_near ? d + near : far;
  *excess = is_near ? near : far - (d > kMost ? kMost : d);
}

// The divergence of an element at t = (mean - prior_mean) / (scale of the prior).
template <class A>
SSLKERNELS_HD A divergence(A t, A excess) {
  return A(0.5) * fused(t, t, excess);
}

}  // namespace

constexpr int64_t kGaussianChunk = 1024;  // columns of a row that the CPU kernels sum to one number

namespace {  // one copy for each instruction set: see isa.h

// The work is cut into tasks, blocks of rows of one chunk of columns, that are the same for any number of threads.
inline int64_t gaussian_chunks(const Gaussian& inputs) {
  return (inputs.columns + kGaussianChunk - 1) / kGaussianChunk;
}

// Rows of one chunk that fit in the cache together.
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

// Tasks [begin, end).
SSLKERNELS_CPU_KERNELS(void gaussian_fwd(const GaussianForward& forward, int64_t begin, int64_t end);
                       void gaussian_bwd(const GaussianBackward& backward, int64_t begin, int64_t end);)

// Columns of a row that the CUDA kernel sums to one number: a warp's tile.
constexpr int64_t gaussian_columns_per_sum_cuda(Element element) { return 32 * (bytes_of(element) == 2 ? 8 : 4); }

void launch_gaussian_fwd(const GaussianForward& forward, void* stream);
void launch_gaussian_bwd(const GaussianBackward& backward, void* stream);

}  // namespace sslkernels
