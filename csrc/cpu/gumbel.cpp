// Gumbel-softmax over rows: state, result and gradient.
//
// A row goes through a scratch of its own length, which stays in the second-level cache but for very long rows: first
// s = logits + noise and its maximum, then the exponentials. Noise is made once a pass, block by block, and never
// stored. Block sums are accumulated in double. Rows of a few columns are taken side by side: gumbel_short.h.
#include "gumbel.h"

#include <cstring>
#include <limits>

#include "gumbel_short.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

template <class A>
A block_max(const A* s, int64_t count) {
  A result = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t j = 0; j < count; ++j) result = s[j] > result ? s[j] : result;
  return result;
}

// The first index of a value that is there.
template <class A>
int64_t index_of(const A* s, int64_t count, A value) {
  int32_t found = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : found)
  for (int32_t j = 0; j < int32_t(count); ++j) {
    const int32_t here = s[j] == value ? j : std::numeric_limits<int32_t>::max();
    found = here < found ? here : found;
  }
  return found;
}

template <class T, class A>
void add_noise(const T* logits, const float* noise, int64_t count, A* s) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) s[j] = A(to_float(logits[j])) + A(noise[j]);
}

template <class A>
struct RowState {
  A max = -std::numeric_limits<A>::infinity();
  A sum = 0;
  int64_t index = 0;
};

// s becomes exp((s - max) / tau), of which it returns the sum.
template <class A>
double exponentials(A* s, int64_t count, A max, A inverse_tau) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    s[j] = exp_nonpositive((s[j] - max) * inverse_tau);
    sum += s[j];
  }
  return sum;
}

// fill(begin, count, s) gives a block of the row; its exponentials are left in `row`.
template <class A, class Fill>
RowState<A> reduce_row(A* row, int64_t columns, A inverse_tau, Fill fill) {
  RowState<A> state;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = block_count(columns - begin);
    fill(begin, count, row + begin);
    const A top = block_max(row + begin, count);
    if (top > state.max) {
      state.max = top;
      state.index = begin + index_of(row + begin, count, top);
    }
  }
  double sum = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    sum += exponentials(row + begin, block_count(columns - begin), state.max, inverse_tau);
  }
  state.sum = A(sum);
  return state;
}

template <class A>
void put_state(const GumbelState& to, int64_t i, const RowState<A>& state) {
  static_cast<A*>(to.max)[i] = state.max;
  static_cast<A*>(to.sum)[i] = state.sum;
}

template <class T, class A>
void scale_row(const A* row, int64_t columns, A scale, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) from_float(row[j] * scale, &out[j]);
}

template <class T, class A>
void one_hot(int64_t columns, const RowState<A>& state, T* out) {
  T one, nan;
  from_float(A(1), &one);
  from_float(std::numeric_limits<A>::quiet_NaN(), &nan);
  if (state.sum == state.sum) {
    std::memset(out, 0, size_t(columns) * sizeof(T));
    out[state.index] = one;
  } else {
    for (int64_t j = 0; j < columns; ++j) out[j] = nan;
  }
}

template <class T>
void fwd(const GumbelForward& forward, int64_t begin, int64_t end, void* scratch) {
  using A = typename Accumulation<T>::type;
  const GumbelRows& rows = forward.rows;
  if (rows.columns <= kShort) return fwd_short<T>(forward, begin, end);
  A* row = static_cast<A*>(scratch);
  Noise noise(rows, end);
  for (int64_t i = begin; i < end; ++i) {
    const T* logits = static_cast<const T*>(rows.logits) + i * rows.logits_stride;
    if (forward.best != nullptr) {
      const RowState<A> plain = reduce_row(row, rows.columns, A(1),
                                           [&](int64_t from, int64_t count, A* s) { load(logits + from, count, s); });
      put_state(rows.plain, i, plain);
      forward.best[i] = plain.index;
    }
    const RowState<A> state = reduce_row(
        row, rows.columns, A(inverse_tau_of(rows)),
        [&](int64_t from, int64_t count, A* s) { add_noise(logits + from, noise.block(i, from, count), count, s); });
    put_state(rows.state, i, state);
    if (forward.index != nullptr) forward.index[i] = state.index;
    if (forward.output == GumbelOutput::kNone) continue;
    T* y = static_cast<T*>(forward.y) + i * rows.columns;
    if (forward.output == GumbelOutput::kSoft) scale_row(row, rows.columns, 1 / state.sum, y);
    if (forward.output == GumbelOutput::kHard) one_hot(rows.columns, state, y);
  }
}

// What is left of exp((s - max) / tau) / sum of a block, and its product with `grad`.
template <class T, class G, class A>
double soft_block(const T* logits, const float* noise, const G* grad, int64_t count, A max, A inverse_tau, A scale,
                  A* y) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < count; ++j) {
    y[j] = exp_nonpositive((A(to_float(logits[j])) + A(noise[j]) - max) * inverse_tau) * scale;
    dot += y[j] * A(to_float(grad[j]));
  }
  return dot;
}

template <class T, class G>
void bwd(const GumbelBackward& backward, int64_t begin, int64_t end, void* scratch) {
  using A = typename Accumulation<T>::type;
  const GumbelRows& rows = backward.rows;
  if (rows.columns <= kShort) return bwd_short<T, G>(backward, begin, end);
  const A inverse_tau = A(inverse_tau_of(rows));
  A* y = static_cast<A*>(scratch);
  Noise noise(rows, end);
  const float none[kBlock] = {};
  A values[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const T* logits = static_cast<const T*>(rows.logits) + i * rows.logits_stride;
    const G* grad = static_cast<const G*>(backward.grad) + i * backward.grad_stride;
    T* out = static_cast<T*>(backward.grad_logits) + i * rows.columns;
    double dot = 0, use = 0;
    if (backward.grad != nullptr) {
      const A max = static_cast<const A*>(rows.state.max)[i], scale = 1 / static_cast<const A*>(rows.state.sum)[i];
      for (int64_t from = 0; from < rows.columns; from += kBlock) {
        const int64_t count = block_count(rows.columns - from);
        dot += soft_block(logits + from, noise.block(i, from, count), grad + from, count, max, inverse_tau, scale,
                          y + from);
      }
    }
    const bool used = backward.uses != nullptr && (backward.mask == nullptr || backward.mask[i] != 0);
    const A* uses = used ? static_cast<const A*>(backward.uses) + i % backward.groups * rows.columns : nullptr;
    const A plain_max = used ? static_cast<const A*>(rows.plain.max)[i] : A(0);
    const A plain_scale = used ? 1 / static_cast<const A*>(rows.plain.sum)[i] : A(0);
    for (int64_t from = 0; used && from < rows.columns; from += kBlock) {
      const int64_t count = block_count(rows.columns - from);
      use += soft_block(logits + from, none, uses + from, count, plain_max, A(1), plain_scale, values);
    }
    for (int64_t from = 0; from < rows.columns; from += kBlock) {
      const int64_t count = block_count(rows.columns - from);
      if (used) {
        soft_block(logits + from, none, uses + from, count, plain_max, A(1), plain_scale, values);
        const A mean = A(use);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) values[j] *= uses[from + j] - mean;
      } else {
        std::memset(values, 0, size_t(count) * sizeof(A));
      }
      if (backward.grad != nullptr) {
        const A mean = A(dot);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          values[j] += y[from + j] * (A(to_float(grad[from + j])) - mean) * inverse_tau;
        }
      }
      store(values, count, out + from);
    }
  }
}

template <class T>
void sum_probabilities(const ProbabilitySums& sums, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const GumbelRows& rows = sums.rows;
  const int64_t chunk = sums.chunk_rows * sums.groups;
  for (int64_t c = begin; c < end; ++c) {
    A* partial = static_cast<A*>(sums.partial) + c * sums.groups * rows.columns;
    std::memset(partial, 0, size_t(sums.groups * rows.columns) * sizeof(A));
    const int64_t last = (c + 1) * chunk < rows.rows ? (c + 1) * chunk : rows.rows;
    for (int64_t i = c * chunk; i < last; ++i) {
      if (sums.mask != nullptr && sums.mask[i] == 0) continue;
      const T* logits = static_cast<const T*>(rows.logits) + i * rows.logits_stride;
      const A max = static_cast<const A*>(rows.plain.max)[i], scale = 1 / static_cast<const A*>(rows.plain.sum)[i];
      A* out = partial + i % sums.groups * rows.columns;
#pragma omp simd
      for (int64_t j = 0; j < rows.columns; ++j) {
        out[j] += exp_nonpositive(A(to_float(logits[j])) - max) * scale;
      }
    }
  }
}

}  // namespace

#define SSLKERNELS_BY_ELEMENT(element, call) \
  switch (element) {                         \
    case Element::kFloat: {                  \
      using T = float;                       \
      return call;                           \
    }                                        \
    case Element::kDouble: {                 \
      using T = double;                      \
      return call;                           \
    }                                        \
    case Element::kBFloat16: {               \
      using T = BFloat16;                    \
      return call;                           \
    }                                        \
    case Element::kHalf: {                   \
      using T = Half;                        \
      return call;                           \
    }                                        \
  }

void gumbel_rows_fwd(const GumbelForward& forward, int64_t begin, int64_t end, void* scratch) {
  SSLKERNELS_BY_ELEMENT(forward.rows.element, fwd<T>(forward, begin, end, scratch))
}

void gumbel_rows_bwd(const GumbelBackward& backward, int64_t begin, int64_t end, void* scratch) {
  if (backward.wide_grad) {
    SSLKERNELS_BY_ELEMENT(backward.rows.element,
                          (bwd<T, typename Accumulation<T>::type>(backward, begin, end, scratch)))
  }
  SSLKERNELS_BY_ELEMENT(backward.rows.element, (bwd<T, T>(backward, begin, end, scratch)))
}

void probability_sums(const ProbabilitySums& sums, int64_t begin, int64_t end) {
  SSLKERNELS_BY_ELEMENT(sums.rows.element, sum_probabilities<T>(sums, begin, end))
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
