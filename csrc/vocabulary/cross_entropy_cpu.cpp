// Cross-entropy of rows of logits: loss, statistics and gradient.
//
// A row is processed in blocks that stay in the L1 cache: one pass for the maximum, one for the sums, one for the
// gradient. Only the first pass reads the row from memory; it then stays in the L2 cache. Neither the transformed
// logits nor the probabilities are ever materialised. Block sums are accumulated in double.
#include <limits>

#include "core/cpu/vector_math.h"
#include "vocabulary/cross_entropy.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 2048;

inline int64_t block_count(int64_t left) { return left < kBlock ? left : kBlock; }

template <class T>
struct Row {
  using A = typename Accumulation<T>::type;

  const T* logits;
  const A* bias;
  int64_t vocab;
  A scale;
  A softcap;

  bool is_identity() const { return bias == nullptr && scale == A(1) && softcap == A(0); }

  // z of columns [begin, begin + count): in `buffer`, or the logits themselves if there is no transform.
  const A* block(int64_t begin, int64_t count, A* buffer) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (is_identity()) return logits + begin;
    }
    return block_copy(begin, count, buffer);
  }

  A* block_copy(int64_t begin, int64_t count, A* buffer) const {
    uncapped(begin, count, buffer);
    if (softcap != A(0)) {
      const A cap = softcap, inverse = A(1) / softcap;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) buffer[j] = cap * vector_tanh(buffer[j] * inverse);
    }
    return buffer;
  }

  // Like block_copy with a softcap; dz/dl in `slope`.
  A* block_and_slope(int64_t begin, int64_t count, A* buffer, A* slope) const {
    uncapped(begin, count, buffer);
    const A cap = softcap, inverse = A(1) / softcap;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const A scaled = buffer[j] * inverse;
      buffer[j] = cap * vector_tanh(scaled);
      slope[j] = tanh_slope(scaled);
    }
    return buffer;
  }

 private:
  // l = scale * logit + bias.
  void uncapped(int64_t begin, int64_t count, A* buffer) const {
    load(logits + begin, count, buffer);
    if (scale != A(1)) {
      const A factor = scale;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) buffer[j] *= factor;
    }
    if (bias != nullptr) {
      const A* add = bias + begin;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) buffer[j] += add[j];
    }
  }
};

template <class A>
A block_max(const A* z, int64_t count) {
  A result = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t j = 0; j < count; ++j) result = z[j] > result ? z[j] : result;
  return result;
}

// First index of a value that is known to occur.
template <class A>
int64_t index_of(const A* z, A value) {
  int64_t j = 0;
  while (z[j] != value) ++j;
  return j;
}

template <class A>
double block_exp_sum(const A* z, int64_t count, A row_max) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += exp_nonpositive(z[j] - row_max);
  return sum;
}

template <class A>
double block_expected(const A* z, int64_t count, A row_max) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const A shifted = z[j] - row_max;
    const A exp = exp_nonpositive(shifted);
    sum += exp > A(0) ? exp * shifted : exp;
  }
  return sum;
}

template <class A>
double block_weighted_gaps(const A* z, int64_t count, A row_max, const A* weight) {
  A sum = 0;
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += row_max - z[j];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += weight[j] > A(0) ? weight[j] * (row_max - z[j]) : A(0);
  }
  return sum;
}

template <class T>
Row<T> make_row(const CrossEntropyRows& rows, int64_t i) {
  using A = typename Accumulation<T>::type;
  return {static_cast<const T*>(rows.logits) + i * rows.logits_stride, static_cast<const A*>(rows.bias), rows.vocab,
          A(rows.options.logit_scale), A(rows.options.softcap)};
}

template <class A>
A weight_sum(const CrossEntropyRows& rows) {
  return rows.weight_sum == nullptr ? A(rows.vocab) : *static_cast<const A*>(rows.weight_sum);
}

template <class T>
void write_gradient(const CrossEntropyRows& rows, int64_t i, const Row<T>& row, int64_t target) {
  using A = typename Accumulation<T>::type;
  const A row_max = static_cast<const A*>(rows.row_max)[i];
  const A* weight = static_cast<const A*>(rows.weight);
  const A target_weight = weight == nullptr ? A(1) : weight[target];
  const RowGradient<A> gradient = row_gradient<A>(
      static_cast<const A*>(rows.coefficient)[i], row_max, static_cast<const A*>(rows.sum_exp)[i],
      static_cast<const A*>(rows.logprob)[i], target_weight, weight_sum<A>(rows), rows.vocab, rows.options);
  const A exp_scale = gradient.exp_scale, smooth = gradient.smooth;
  const bool weighted = smooth != A(0) && weight != nullptr;
  T* grad = static_cast<T*>(rows.grad) + i * rows.grad_stride;
  A z_buffer[kBlock], grad_buffer[kBlock], slope[kBlock];
  for (int64_t begin = 0; begin < rows.vocab; begin += kBlock) {
    const int64_t count = block_count(rows.vocab - begin);
    const A* z =
        row.softcap == A(0) ? row.block(begin, count, z_buffer) : row.block_and_slope(begin, count, z_buffer, slope);
    const bool here = target >= begin && target < begin + count;
    const A target_grad =
        here ? gradient.target_constant + gradient.target_exp_scale * exp_nonpositive(z[target - begin] - row_max)
             : A(0);
    A* out = grad_buffer;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (row.softcap == A(0)) out = grad + begin;  // in-place is safe: each element is read before it is written
    }
    if (weighted) {
      const A* w = weight + begin;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) out[j] = exp_scale * exp_nonpositive(z[j] - row_max) - smooth * w[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) out[j] = exp_scale * exp_nonpositive(z[j] - row_max) - smooth;
    }
    if (here) out[target - begin] = target_grad;
    if (row.softcap != A(0)) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) out[j] *= slope[j];
    }
    if (out == grad_buffer) store(grad_buffer, count, grad + begin);
  }
}

template <class T>
void fill_gradient(const CrossEntropyRows& rows, int64_t i, float value) {
  T element;
  from_float(typename Accumulation<T>::type(value), &element);
  T* grad = static_cast<T*>(rows.grad) + i * rows.grad_stride;
  for (int64_t j = 0; j < rows.vocab; ++j) grad[j] = element;
}

// Writes the results of a row that is ignored (0) or whose target is out of range (NaN); true if row i is one of these.
template <class T>
bool excluded_row(const CrossEntropyRows& rows, int64_t i, bool forward) {
  using A = typename Accumulation<T>::type;
  const int64_t target = target_of(rows, i);
  const bool ignored = target == rows.options.ignore_index;
  if (!ignored && target >= 0 && target < rows.vocab) return false;
  const float value = ignored ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  if (rows.grad != nullptr) fill_gradient<T>(rows, i, value);
  if (!forward) return true;
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
void fwd_row(const CrossEntropyRows& rows, int64_t i) {
  using A = typename Accumulation<T>::type;
  if (excluded_row<T>(rows, i, true)) return;
  const Row<T> row = make_row<T>(rows, i);
  const int64_t target = target_of(rows, i);
  const A* weight = static_cast<const A*>(rows.weight);
  const bool stats = rows.prediction != nullptr;
  A buffer[kBlock];

  A row_max = -std::numeric_limits<A>::infinity();
  int64_t argmax = 0;
  for (int64_t begin = 0; begin < rows.vocab; begin += kBlock) {
    const int64_t count = block_count(rows.vocab - begin);
    const A* z = row.block(begin, count, buffer);
    const A maximum = block_max(z, count);
    if (maximum > row_max) {
      row_max = maximum;
      if (stats) argmax = begin + index_of(z, maximum);
    }
  }

  double others = 0, expected = 0, weighted_gaps = 0;
  A target_z = 0;
  for (int64_t begin = 0; begin < rows.vocab; begin += kBlock) {
    const int64_t count = block_count(rows.vocab - begin);
    const A* z = row.block(begin, count, buffer);
    if (rows.options.label_smoothing > 0) {
      weighted_gaps += block_weighted_gaps(z, count, row_max, weight == nullptr ? nullptr : weight + begin);
    }
    if (target >= begin && target < begin + count) {
      A* copy = row.block_copy(begin, count, buffer);
      target_z = copy[target - begin];
      copy[target - begin] = -std::numeric_limits<A>::infinity();
      z = copy;
    }
    others += block_exp_sum(z, count, row_max);
    if (stats) expected += block_expected(z, count, row_max);
  }

  const RowSums<A> sums{row_max, target_z, A(others), A(expected), A(weighted_gaps)};
  const A target_weight = weight == nullptr ? A(1) : weight[target];
  const RowResult<A> result = finish_row<A>(sums, target_weight, weight_sum<A>(rows), rows.vocab, rows.options);
  static_cast<A*>(rows.loss)[i] = result.loss;
  static_cast<A*>(rows.row_max)[i] = row_max;
  static_cast<A*>(rows.sum_exp)[i] = result.sum_exp;
  static_cast<A*>(rows.logprob)[i] = result.logprob;
  if (stats) {
    rows.prediction[i] = argmax;
    static_cast<A*>(rows.entropy)[i] = result.entropy;
  }
  if (rows.grad != nullptr) write_gradient<T>(rows, i, row, target);
}

template <class T>
void bwd_row(const CrossEntropyRows& rows, int64_t i) {
  if (!excluded_row<T>(rows, i, false)) write_gradient<T>(rows, i, make_row<T>(rows, i), target_of(rows, i));
}

}  // namespace

void cross_entropy_rows_fwd(const CrossEntropyRows& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    with_element(rows.element, [&](auto zero) { fwd_row<decltype(zero)>(rows, i); });
  }
}

void cross_entropy_rows_bwd(const CrossEntropyRows& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    with_element(rows.element, [&](auto zero) { bwd_row<decltype(zero)>(rows, i); });
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
