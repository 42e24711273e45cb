// Cross-entropy of rows of logits: loss, statistics and gradient.
//
// One block a row. The forward reads the row twice (maximum, then sums), the gradient once more; neither the
// transformed logits nor the probabilities are stored. Every reduction has a fixed order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cross_entropy.h"
#include "device.h"
#include "launch.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 512;

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

template <class A, class T>
__device__ A load(const T* pointer) {
  return static_cast<A>(*pointer);
}

template <class T>
struct Row {
  using A = typename Accumulation<T>::type;
  const T* logits;
  const A* bias;
  A scale;
  A softcap;

  __device__ A z(int64_t j) const {
    A value = load<A>(logits + j) * scale;
    if (bias != nullptr) value += bias[j];
    return softcap == A(0) ? value : softcap * tanh(value / softcap);
  }
};

template <class T>
__device__ Row<T> make_row(const CrossEntropyRows& rows, int64_t i) {
  using A = typename Accumulation<T>::type;
  return {static_cast<const T*>(rows.logits) + i * rows.logits_stride, static_cast<const A*>(rows.bias),
          A(rows.options.logit_scale), A(rows.options.softcap)};
}

template <class A>
__device__ A weight_sum(const CrossEntropyRows& rows) {
  return rows.weight_sum == nullptr ? A(rows.vocab) : *static_cast<const A*>(rows.weight_sum);
}

template <class T>
__device__ void write_gradient(const CrossEntropyRows& rows, int64_t i, const Row<T>& row, int64_t target,
                               typename Accumulation<T>::type row_max, typename Accumulation<T>::type sum_exp,
                               typename Accumulation<T>::type logprob) {
  using A = typename Accumulation<T>::type;
  const A* weight = static_cast<const A*>(rows.weight);
  const A target_weight = weight == nullptr ? A(1) : weight[target];
  const RowGradient<A> gradient = row_gradient<A>(static_cast<const A*>(rows.coefficient)[i], row_max, sum_exp, logprob,
                                                  target_weight, weight_sum<A>(rows), rows.vocab, rows.options);
  T* grad = static_cast<T*>(rows.grad) + i * rows.grad_stride;
  for (int64_t j = threadIdx.x; j < rows.vocab; j += kThreads) {
    const A z = row.z(j);
    const A e = exp(z - row_max);
    A value = gradient.exp_scale * e - gradient.smooth * (weight == nullptr ? A(1) : weight[j]);
    if (j == target) value = gradient.target_constant + gradient.target_exp_scale * e;
    if (row.softcap != A(0)) value *= A(1) - (z / row.softcap) * (z / row.softcap);
    grad[j] = static_cast<T>(value);
  }
}

// Rows that are ignored (value 0) or whose target is out of range (value NaN); true if row i is one of them.
template <class T>
__device__ bool excluded_row(const CrossEntropyRows& rows, int64_t i, bool forward) {
  using A = typename Accumulation<T>::type;
  const int64_t target = rows.target[i];
  const bool ignored = target == rows.options.ignore_index;
  if (!ignored && target >= 0 && target < rows.vocab) return false;
  const A value = ignored ? A(0) : A(NAN);
  if (rows.grad != nullptr) {
    T* grad = static_cast<T*>(rows.grad) + i * rows.grad_stride;
    for (int64_t j = threadIdx.x; j < rows.vocab; j += kThreads) grad[j] = static_cast<T>(value);
  }
  if (!forward || threadIdx.x != 0) return true;
  static_cast<A*>(rows.loss)[i] = value;
  static_cast<A*>(rows.logprob)[i] = value;
  static_cast<A*>(rows.row_max)[i] = value;
  static_cast<A*>(rows.sum_exp)[i] = A(1);
  if (rows.prediction != nullptr) {
    rows.prediction[i] = -1;
    static_cast<A*>(rows.entropy)[i] = value;
  }
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_rows_fwd_kernel(CrossEntropyRows rows) {
  using A = typename Accumulation<T>::type;
  const int64_t i = blockIdx.x;
  if (excluded_row<T>(rows, i, true)) return;
  const Row<T> row = make_row<T>(rows, i);
  const int64_t target = rows.target[i];
  const A* weight = static_cast<const A*>(rows.weight);
  const bool stats = rows.prediction != nullptr;

  A own_max = A(-INFINITY);
  int64_t own_argmax = rows.vocab;
  for (int64_t j = threadIdx.x; j < rows.vocab; j += kThreads) {
    const A z = row.z(j);
    if (z > own_max) {
      own_max = z;
      own_argmax = j;
    }
  }
  const A row_max = block_reduce<Max>(own_max);

  A others = 0, expected = 0, weighted_gaps = 0;
  for (int64_t j = threadIdx.x; j < rows.vocab; j += kThreads) {
    const A shifted = row.z(j) - row_max;
    const A w = weight == nullptr ? A(1) : weight[j];
    if (rows.options.label_smoothing > 0 && w > A(0)) weighted_gaps -= w * shifted;
    if (j == target) continue;
    const A e = exp(shifted);
    others += e;
    if (stats) expected += e > A(0) ? e * shifted : e;
  }
  others = block_reduce<Sum>(others);
  if (stats) expected = block_reduce<Sum>(expected);
  if (rows.options.label_smoothing > 0) weighted_gaps = block_reduce<Sum>(weighted_gaps);

  const RowSums<A> sums{row_max, row.z(target), others, expected, weighted_gaps};
  const A target_weight = weight == nullptr ? A(1) : weight[target];
  const RowResult<A> result = finish_row<A>(sums, target_weight, weight_sum<A>(rows), rows.vocab, rows.options);
  if (stats) {
    // The lowest index among the threads that hold the maximum: the largest of its negative (exact below 2^24, or
    // 2^53).
    const double first = block_reduce<Max>(own_max == row_max ? -double(own_argmax) : double(-INFINITY));
    if (threadIdx.x == 0) {
      rows.prediction[i] = first > double(-INFINITY) ? int64_t(-first) : 0;
      static_cast<A*>(rows.entropy)[i] = result.entropy;
    }
  }
  if (threadIdx.x == 0) {
    static_cast<A*>(rows.loss)[i] = result.loss;
    static_cast<A*>(rows.row_max)[i] = row_max;
    static_cast<A*>(rows.sum_exp)[i] = result.sum_exp;
    static_cast<A*>(rows.logprob)[i] = result.logprob;
  }
  if (rows.grad == nullptr) return;
  // In place: every thread has read the target's logit before any of them overwrites it.
  __syncthreads();
  write_gradient<T>(rows, i, row, target, row_max, result.sum_exp, result.logprob);
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_rows_bwd_kernel(CrossEntropyRows rows) {
  using A = typename Accumulation<T>::type;
  const int64_t i = blockIdx.x;
  if (excluded_row<T>(rows, i, false)) return;
  write_gradient<T>(rows, i, make_row<T>(rows, i), rows.target[i], static_cast<const A*>(rows.row_max)[i],
                    static_cast<const A*>(rows.sum_exp)[i], static_cast<const A*>(rows.logprob)[i]);
}

template <class T>
void launch(const CrossEntropyRows& rows, bool forward, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows.count));
  if (forward) {
    cross_entropy_rows_fwd_kernel<T><<<grid, kThreads, 0, stream>>>(rows);
  } else {
    cross_entropy_rows_bwd_kernel<T><<<grid, kThreads, 0, stream>>>(rows);
  }
  check_launch(forward ? "cross_entropy_rows_fwd_kernel" : "cross_entropy_rows_bwd_kernel");
}

void launch(const CrossEntropyRows& rows, bool forward, void* stream) {
  if (rows.count == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (rows.element) {
    case Element::kFloat:
      return launch<float>(rows, forward, on);
    case Element::kDouble:
      return launch<double>(rows, forward, on);
    case Element::kBFloat16:
      return launch<__nv_bfloat16>(rows, forward, on);
    case Element::kHalf:
      return launch<__half>(rows, forward, on);
  }
}

}  // namespace

void launch_cross_entropy_rows_fwd(const CrossEntropyRows& rows, void* stream) { launch(rows, true, stream); }
void launch_cross_entropy_rows_bwd(const CrossEntropyRows& rows, void* stream) { launch(rows, false, stream); }

}  // namespace sslkernels
