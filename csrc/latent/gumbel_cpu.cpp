// Gumbel-softmax over rows: state, result and gradient.
//
// A row is computed in a scratch of its own length, which stays in the L2 cache except for very long rows: first s =
// logits + noise and its maximum, then the exponentials. The noise is generated once per pass, block by block, and
// never materialised. Block sums are accumulated in double. Rows of a few columns are processed side by side:
// gumbel_short_cpu.h.
#include <cstring>
#include <limits>

#include "core/cpu/element.h"
#include "latent/gumbel.h"
#include "latent/gumbel_short_cpu.h"

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

// First index of a value that is known to occur.
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
SSLKERNELS_ONCE void add_noise(const T* logits, const float* noise, int64_t count, A* s) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) s[j] = A(to_float(logits[j])) + A(noise[j]);
}

template <class A>
struct RowState {
  A max = -std::numeric_limits<A>::infinity();
  A sum = 0;
  int64_t index = 0;
};

// Replaces s by exp((s - max) / tau) and returns the sum.
template <class A>
SSLKERNELS_ONCE double exponentials(A* s, int64_t count, A max, A inverse_tau) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    s[j] = exp_nonpositive((s[j] - max) * inverse_tau);
    sum += s[j];
  }
  return sum;
}

// fill(begin, count, s) computes a block of the row; its exponentials are left in `row`.
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
SSLKERNELS_ONCE void scale_row(const A* row, int64_t columns, A scale, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) from_float(row[j] * scale, &out[j]);
}

template <class A>
void write_hard(Element element, int64_t columns, const RowState<A>& state, void* out) {
  if (state.sum == state.sum) {
    const A one = 1;
    std::memset(out, 0, size_t(columns * bytes_of(element)));
    store_any(element, &one, state.index, 1, out);
  } else {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    for (int64_t j = 0; j < columns; ++j) store_any(element, &nan, j, 1, out);
  }
}

const void* row_of(const GumbelRows& rows, int64_t i) {
  return static_cast<const char*>(rows.logits) + i * rows.logits_stride * bytes_of(rows.element);
}

template <class A>
void fwd(const GumbelForward& forward, int64_t begin, int64_t end, void* scratch) {
  const GumbelRows& rows = forward.rows;
  if (rows.columns <= kShort) return fwd_short<A>(forward, begin, end);
  A* row = static_cast<A*>(scratch);
  Noise noise(rows, end);
  for (int64_t i = begin; i < end; ++i) {
    const auto load_logits = [&](int64_t from, int64_t count, A* s) {
      load_any(rows.element, row_of(rows, i), from, count, s);
    };
    if (forward.argmax != nullptr) {
      const RowState<A> softmax = reduce_row(row, rows.columns, A(1), load_logits);
      put_state(rows.softmax_state, i, softmax);
      forward.argmax[i] = softmax.index;
    }
    const auto load_noisy = [&](int64_t from, int64_t count, A* s) {
      const float* of_block = noise.block(i, from, count);
      with_elements<A>(rows.element, row_of(rows, i), from,
                       [=](const auto* logits) { add_noise(logits, of_block, count, s); });
    };
    const RowState<A> state = reduce_row(row, rows.columns, A(inverse_tau_of(rows)), load_noisy);
    put_state(rows.state, i, state);
    if (forward.index != nullptr) forward.index[i] = state.index;
    if (forward.output == GumbelOutput::kNone) continue;
    void* y = static_cast<char*>(forward.y) + i * rows.columns * bytes_of(rows.element);
    if (forward.output == GumbelOutput::kSoft) {
      with_elements<A>(rows.element, y, 0, [&](auto* out) { scale_row(row, rows.columns, 1 / state.sum, out); });
    }
    if (forward.output == GumbelOutput::kHard) write_hard(rows.element, rows.columns, state, y);
  }
}

// y = exp((s - max) / tau) / sum for a block, and its dot product with `grad`.
template <class T, class G, class A>
SSLKERNELS_ONCE double soft_block(const T* logits, const float* noise, const G* grad, int64_t count, A max,
                                  A inverse_tau, A scale, A* y) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < count; ++j) {
    y[j] = exp_nonpositive((A(to_float(logits[j])) + A(noise[j]) - max) * inverse_tau) * scale;
    dot += y[j] * A(to_float(grad[j]));
  }
  return dot;
}

template <class G, class A>
SSLKERNELS_ONCE void add_gradient(const A* y, const G* grad, int64_t count, A mean, A inverse_tau, A* values) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) values[j] += y[j] * (A(to_float(grad[j])) - mean) * inverse_tau;
}

template <class A>
void bwd(const GumbelBackward& backward, int64_t begin, int64_t end, void* scratch) {
  const GumbelRows& rows = backward.rows;
  if (rows.columns <= kShort) return bwd_short<A>(backward, begin, end);
  const A inverse_tau = A(inverse_tau_of(rows));
  A* y = static_cast<A*>(scratch);
  Noise noise(rows, end);
  alignas(kLine) const float none[kBlock] = {};
  alignas(kLine) A values[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t element_bytes = bytes_of(rows.element), grad_bytes = bytes_of(grad_element(backward));
    const void* grad = static_cast<const char*>(backward.grad) + i * backward.grad_stride * grad_bytes;
    void* out = static_cast<char*>(backward.grad_logits) + i * rows.columns * element_bytes;
    double dot = 0, use = 0;
    if (backward.grad != nullptr) {
      const A max = static_cast<const A*>(rows.state.max)[i], scale = 1 / static_cast<const A*>(rows.state.sum)[i];
      for (int64_t from = 0; from < rows.columns; from += kBlock) {
        const int64_t count = block_count(rows.columns - from);
        const float* of_block = noise.block(i, from, count);
        dot += with_elements<A>(rows.element, row_of(rows, i), from, [&](const auto* logits) {
          using T = std::remove_pointer_t<decltype(logits)>;
          if (backward.wide_grad) {
            const A* wide = static_cast<const A*>(grad) + from;
            return soft_block(logits, of_block, wide, count, max, inverse_tau, scale, y + from);
          }
          return soft_block(logits, of_block, static_cast<T*>(grad) + from, count, max, inverse_tau, scale, y + from);
        });
      }
    }
    const bool used = backward.grad_usage != nullptr && (backward.mask == nullptr || backward.mask[i] != 0);
    const A* usage = used ? static_cast<const A*>(backward.grad_usage) + i % backward.groups * rows.columns : nullptr;
    const A softmax_max = used ? static_cast<const A*>(rows.softmax_state.max)[i] : A(0);
    const A softmax_scale = used ? 1 / static_cast<const A*>(rows.softmax_state.sum)[i] : A(0);
    const auto use_block = [&](int64_t from, int64_t count) {
      return with_elements<A>(rows.element, row_of(rows, i), from, [&](const auto* logits) {
        return soft_block(logits, none, usage + from, count, softmax_max, A(1), softmax_scale, values);
      });
    };
    for (int64_t from = 0; used && from < rows.columns; from += kBlock) {
      use += use_block(from, block_count(rows.columns - from));
    }
    for (int64_t from = 0; from < rows.columns; from += kBlock) {
      const int64_t count = block_count(rows.columns - from);
      if (used) {
        use_block(from, count);
        const A mean = A(use);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) values[j] *= usage[from + j] - mean;
      } else {
        std::memset(values, 0, size_t(count) * sizeof(A));
      }
      if (backward.grad != nullptr) {
        const A mean = A(dot);
        with_elements<A>(grad_element(backward), grad, from, [&](const auto* of_block) {
          add_gradient(y + from, of_block, count, mean, inverse_tau, values);
        });
      }
      store_any(rows.element, values, from, count, out);
    }
  }
}

template <class A>
void sum_probabilities(const ProbabilitySums& sums, int64_t begin, int64_t end) {
  const GumbelRows& rows = sums.rows;
  const int64_t chunk = sums.chunk_rows * sums.groups;
  alignas(kLine) A values[kBlock];
  for (int64_t c = begin; c < end; ++c) {
    A* partial = static_cast<A*>(sums.partial) + c * sums.groups * rows.columns;
    std::memset(partial, 0, size_t(sums.groups * rows.columns) * sizeof(A));
    const int64_t last = (c + 1) * chunk < rows.rows ? (c + 1) * chunk : rows.rows;
    for (int64_t i = c * chunk; i < last; ++i) {
      if (sums.mask != nullptr && sums.mask[i] == 0) continue;
      const A max = static_cast<const A*>(rows.softmax_state.max)[i],
              scale = 1 / static_cast<const A*>(rows.softmax_state.sum)[i];
      for (int64_t from = 0; from < rows.columns; from += kBlock) {
        const int64_t count = block_count(rows.columns - from);
        load_any(rows.element, row_of(rows, i), from, count, values);
        A* out = partial + i % sums.groups * rows.columns + from;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) out[j] += exp_nonpositive(values[j] - max) * scale;
      }
    }
  }
}

}  // namespace

void gumbel_rows_fwd(const GumbelForward& forward, int64_t begin, int64_t end, void* scratch) {
  forward.rows.element == Element::kDouble ? fwd<double>(forward, begin, end, scratch)
                                           : fwd<float>(forward, begin, end, scratch);
}

void gumbel_rows_bwd(const GumbelBackward& backward, int64_t begin, int64_t end, void* scratch) {
  backward.rows.element == Element::kDouble ? bwd<double>(backward, begin, end, scratch)
                                            : bwd<float>(backward, begin, end, scratch);
}

void probability_sums(const ProbabilitySums& sums, int64_t begin, int64_t end) {
  sums.rows.element == Element::kDouble ? sum_probabilities<double>(sums, begin, end)
                                        : sum_probabilities<float>(sums, begin, end);
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
