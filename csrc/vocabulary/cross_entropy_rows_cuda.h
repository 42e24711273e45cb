// Kernels of the cross-entropy of rows of logits: loss, statistics and gradient.
//
// A row belongs to a block, or to the blocks of a cluster that share its columns. One pass over it keeps, per thread, a
// running maximum and sums relative to it. For the gradient a row is either cached in shared memory, scaled and biased
// in the accumulation type (one read, one write; a softcap is applied again, since its derivative needs the uncapped
// logits), or read again: with so few rows in flight that they fit in the L2 cache, and from the end, which L2
// keeps longest. Nothing of the size of the logits is materialised except the gradient. Every reduction has a fixed
// order.
#pragma once

#include <type_traits>

#include "core/cuda/reduce.h"
#include "core/cuda/words.h"
#include "core/tanh.h"
#include "vocabulary/cross_entropy.h"

namespace sslkernels {

constexpr int kRowThreads = 256;  // per block, at most; rows that are read twice may take more
template <class T>  // resident threads per multiprocessor that registers must allow: 64 registers a thread, float64 128
constexpr int kResident = sizeof(T) == 8 ? 512 : 1024;
template <bool kCached>  // groups in flight per thread
constexpr int kBatch = kCached ? 4 : 2;

template <class T, class S>
struct CachedRow;

// Compile-time features of a kernel; an absent feature costs nothing. Which part of kTransform is active is decided
// once per group.
template <bool kTransform_, bool kSums_>
struct RowFeatures {
  static constexpr bool kTransform = kTransform_;  // logit_scale, bias and softcap
  static constexpr bool kSums = kSums_;            // statistics and label smoothing

  template <class T>  // type in which a row is cached
  using Cached = CachedRow<T, std::conditional_t<kTransform, typename Accumulation<T>::type, T>>;
};

// NaN only if both are.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return std::fmax(a, b);
}

// e^x. As exact as the library in float32; for 16-bit logits the error is far below their rounding.
template <class T, class A>
__device__ __forceinline__ A row_exp(A x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(x * 1.44269504088896341f);
  } else {
    return std::exp(x);
  }
}

// tanh x, with a small relative error also for small x.
template <class T, class A>
__device__ __forceinline__ A row_tanh(A x) {
  if constexpr (sizeof(T) == 2) {
    const float large = 1.0f - 2.0f * reciprocal_approx(exp2_approx(x * 2.88539008177792681f) + 1.0f);
    return std::fabs(x) < 0.625f ? tanh_near_zero(x) : large;
  } else {
    return std::tanh(x);
  }
}

// The derivative of tanh: 1 - tanh(x)^2 would cancel where tanh(x) is near 1.
template <class T, class A>
__device__ __forceinline__ A row_tanh_slope(A x) {
  const A t = row_exp<T>(A(-2) * std::fabs(x));
  if constexpr (sizeof(T) == 2) {
    const A r = reciprocal_approx(A(1) + t);
    return A(4) * t * r * r;
  } else {
    return A(4) * t / ((A(1) + t) * (A(1) + t));
  }
}

template <class T, bool kSums>
struct RowPartial {
  using A = typename Accumulation<T>::type;
  A maximum;
  A others;  // sum of exp(z - maximum) over the columns other than the target, as in the next line
  A expected;
  A gaps;  // sum of weight * (anchor - z)
  int32_t argmax;
  int32_t unused;

  static __device__ __forceinline__ RowPartial identity() { return {A(-INFINITY), A(0), A(0), A(0), INT32_MAX, 0}; }

  // Rescales the sums to a new maximum `to`. A sum that has underflowed to 0 stays 0 however far below it is.
  __device__ __forceinline__ void rescale(A to) {
    if (maximum == A(-INFINITY)) return;
    const A factor = row_exp<T>(maximum - to);
    expected = factor > A(0) ? factor * (expected + others * (maximum - to)) : factor * others;
    others *= factor;
  }
  static __device__ __forceinline__ RowPartial combine(RowPartial a, RowPartial b) {
    const A top = larger(a.maximum, b.maximum);
    a.rescale(top);
    b.rescale(top);
    const bool of_a = a.maximum > b.maximum || (a.maximum == b.maximum && a.argmax < b.argmax);
    return {top, a.others + b.others, a.expected + b.expected, a.gaps + b.gaps, of_a ? a.argmax : b.argmax, 0};
  }
};

template <class T>
struct RowPartial<T, false> {
  using A = typename Accumulation<T>::type;
  A maximum;
  A others;

  static __device__ __forceinline__ RowPartial identity() { return {A(-INFINITY), A(0)}; }
  __device__ __forceinline__ void rescale(A to) {
    if (maximum != A(-INFINITY)) others *= row_exp<T>(maximum - to);
  }
  static __device__ __forceinline__ RowPartial combine(RowPartial a, RowPartial b) {
    const A top = larger(a.maximum, b.maximum);
    a.rescale(top);
    b.rescale(top);
    return {top, a.others + b.others};
  }
};

template <class T, class F>
struct Row {
  using A = typename Accumulation<T>::type;
  static constexpr int kSize = Groups<T>::kSize;

  const T* logits;
  const A* bias;
  const A* weight;
  A scale;
  A softcap;
  A inverse_softcap;
  int target;

  __device__ __forceinline__ Row(const CrossEntropyRows& rows, int64_t i)
      : logits(static_cast<const T*>(rows.logits) + i * rows.logits_stride),
        bias(static_cast<const A*>(rows.bias)),
        weight(static_cast<const A*>(rows.weight)),
        scale(A(rows.options.logit_scale)),
        softcap(A(rows.options.softcap)),
        inverse_softcap(A(1) / A(rows.options.softcap)),
        target(int(target_of(rows, i))) {}

  __device__ __forceinline__ A capped(A value) const { return softcap * row_tanh<T>(value * inverse_softcap); }

  // l = scale * logit + bias of one column.
  __device__ __forceinline__ A uncapped(int column) const {
    A value = to_float(logits[column]);
    if constexpr (F::kTransform) value = value * scale + (bias == nullptr ? A(0) : bias[column]);
    return value;
  }

  // The transformed logit of one column.
  __device__ __forceinline__ A z(int column) const {
    const A value = uncapped(column);
    if constexpr (F::kTransform) {
      if (softcap != A(0)) return capped(value);
    }
    return value;
  }

  // l of a complete group.
  __device__ __forceinline__ void uncapped(const Words& words, int column, A (&l)[kSize]) const {
    unpack_group<T>(words, l);
    if constexpr (F::kTransform) {
      if (bias == nullptr) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) l[k] *= scale;
      } else {
        A add[kSize];
        load_elements(bias + column, add);
#pragma unroll
        for (int k = 0; k < kSize; ++k) l[k] = l[k] * scale + add[k];
      }
    }
  }

  // l of the columns that a group shares with `groups`, -inf for the others.
  __device__ __forceinline__ void gather(const Groups<T>& groups, int column, A (&l)[kSize]) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) l[k] = groups.contains(column + k) ? uncapped(column + k) : A(-INFINITY);
  }

  // Turns l into z, and into -inf where it belongs to no column of `groups`.
  __device__ __forceinline__ void cap(const Groups<T>& groups, int column, A (&l)[kSize]) const {
    if constexpr (F::kTransform) {
      if (softcap == A(0)) return;
#pragma unroll
      for (int k = 0; k < kSize; ++k) l[k] = groups.contains(column + k) ? capped(l[k]) : A(-INFINITY);
    }
  }
};

// The logits of a block's part of a row, scaled and biased but not capped, cached in shared memory as S: the
// accumulation type, or the type of the logits if there is no transform. A group of 16-bit logits as float takes 32
// bytes: its halves are stored in two planes, so that the threads of a warp access different banks.
template <class T, class S>
struct CachedRow {
  using A = typename Accumulation<T>::type;
  static constexpr int kSize = Groups<T>::kSize;  // elements per group
  static constexpr int kEach = Groups<S>::kSize;  // elements per plane
  S* values;
  int groups;

  __device__ __forceinline__ Words& words(int plane, int group) const {
    return *reinterpret_cast<Words*>(values + (plane * groups + group) * kEach);
  }
  __device__ __forceinline__ void store(int group, const A (&z)[kSize]) const {
#pragma unroll
    for (int p = 0; p < kSize / kEach; ++p) {
      A part[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) part[k] = z[p * kEach + k];
      words(p, group) = pack_group<S>(part);
    }
  }
  __device__ __forceinline__ void load(int group, A (&z)[kSize]) const {
#pragma unroll
    for (int p = 0; p < kSize / kEach; ++p) {
      A part[kEach];
      unpack_group<S>(words(p, group), part);
#pragma unroll
      for (int k = 0; k < kEach; ++k) z[p * kEach + k] = part[k];
    }
  }
  // The element at `offset` from the first column of group 0.
  __device__ __forceinline__ A element(int offset) const {
    return to_float(values[(offset % kSize / kEach * groups + offset / kSize) * kEach + offset % kEach]);
  }
};

template <class A>
__device__ __forceinline__ A weight_sum(const CrossEntropyRows& rows) {
  return rows.weight_sum == nullptr ? A(rows.vocab) : *static_cast<const A*>(rows.weight_sum);
}

template <class A>
__device__ __forceinline__ A weight_of(const A* weight, int column) {
  return weight == nullptr ? A(1) : weight[column];
}

// Adds a group to the sums; z is clobbered.
template <class T, class F>
__device__ __forceinline__ void accumulate(const CrossEntropyRows& rows, const Row<T, F>& row, const Groups<T>& part,
                                           int column, bool whole, typename Accumulation<T>::type anchor,
                                           typename Accumulation<T>::type (&z)[Groups<T>::kSize],
                                           RowPartial<T, F::kSums>& sums) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  A top = z[0];
#pragma unroll
  for (int k = 1; k < kSize; ++k) top = larger(z[k], top);
  if (top > sums.maximum) {
    sums.rescale(top);
    sums.maximum = top;
    if constexpr (F::kSums) {
#pragma unroll
      for (int k = kSize - 1; k >= 0; --k) sums.argmax = z[k] == top ? column + k : sums.argmax;
    }
  }
  if constexpr (F::kSums) {
    if (rows.options.label_smoothing > 0) {
      if (whole && row.weight == nullptr) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) sums.gaps += anchor - z[k];
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const A w = part.contains(column + k) ? weight_of(row.weight, column + k) : A(0);
          sums.gaps += w > A(0) ? w * (anchor - z[k]) : A(0);
        }
      }
    }
  }
  if (unsigned(row.target - column) < unsigned(kSize)) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) z[k] = column + k == row.target ? A(-INFINITY) : z[k];
  }
  const A reference = sums.maximum == A(-INFINITY) ? A(0) : sums.maximum;
  A others = 0, expected = 0;  // summed per group first, so that the sums of a thread have fewer terms
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const A shifted = z[k] - reference;
    const A e = row_exp<T>(shifted);
    others += e;
    if constexpr (F::kSums) expected += e > A(0) ? e * shifted : e;
  }
  sums.others += others;
  if constexpr (F::kSums) sums.expected += expected;
}

template <class T, class F, bool kCached>
__device__ __forceinline__ RowPartial<T, F::kSums> sum_part(const CrossEntropyRows& rows, const Row<T, F>& row,
                                                            const Groups<T>& part,
                                                            const typename F::template Cached<T>& cached,
                                                            typename Accumulation<T>::type anchor) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  constexpr int kAhead = kBatch<kCached>;
  RowPartial<T, F::kSums> sums = RowPartial<T, F::kSums>::identity();
  const int threads = int(blockDim.x);
  for (int g = int(threadIdx.x); g < part.count; g += kAhead * threads) {
    Words words[kAhead];
#pragma unroll
    for (int b = 0; b < kAhead; ++b) {
      const int group = g + b * threads;
      if (group < part.count && part.whole(group)) {
        const T* at = row.logits + part.column(group);
        words[b] = kCached ? load_words_last(at) : load_words(at);
      }
    }
#pragma unroll
    for (int b = 0; b < kAhead; ++b) {
      const int group = g + b * threads;
      if (group >= part.count) break;
      const int column = part.column(group);
      const bool whole = part.whole(group);
      A z[kSize];
      if (whole) {
        row.uncapped(words[b], column, z);
      } else {
        row.gather(part, column, z);
      }
      if constexpr (kCached) cached.store(group, z);
      row.cap(part, column, z);
      accumulate<T, F>(rows, row, part, column, whole, anchor, z, sums);
    }
  }
  return sums;
}

template <class T, class F, bool kCached>
__device__ __forceinline__ void write_part(const CrossEntropyRows& rows, int64_t i, const Row<T, F>& row,
                                           const Groups<T>& part, const typename F::template Cached<T>& cached,
                                           typename Accumulation<T>::type row_max,
                                           const RowGradient<typename Accumulation<T>::type>& gradient) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  T* grad = static_cast<T*>(rows.grad) + i * rows.grad_stride;
  // Groups of the gradient: if its rows are aligned differently from the logits, z is gathered element by element.
  const Groups<T> out(grad, part.begin, part.end);
  const bool alike = out.first == part.first;
  const bool weighted = row.weight != nullptr && gradient.smooth != A(0);
  const int threads = int(blockDim.x);
  constexpr int kHere = kCached ? 1 : kBatch<kCached>;
  for (int g = out.count - 1 - int(threadIdx.x); g >= 0; g -= kHere * threads) {
    Words words[kHere];
    if constexpr (!kCached) {
#pragma unroll
      for (int b = 0; b < kHere; ++b) {
        const int group = g - b * threads;
        if (group >= 0 && alike && out.whole(group)) words[b] = load_words_last(row.logits + out.column(group));
      }
    }
#pragma unroll
    for (int b = 0; b < kHere; ++b) {
      const int group = g - b * threads;
      if (group < 0) break;
      const int column = out.column(group);
      A z[kSize];
      if (kCached && alike) {
        cached.load(group, z);
      } else if (kCached) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          z[k] = out.contains(column + k) ? cached.element(column + k - part.first) : A(0);
        }
      } else if (alike && out.whole(group)) {
        row.uncapped(words[b], column, z);
      } else {
        row.gather(out, column, z);
      }
      A slope[kSize];
      if constexpr (F::kTransform) {
        if (row.softcap != A(0)) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) slope[k] = row_tanh_slope<T>(z[k] * row.inverse_softcap);
          row.cap(out, column, z);
        }
      }
      A value[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) value[k] = row_exp<T>(z[k] - row_max);
      if (weighted) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const A w = out.contains(column + k) ? row.weight[column + k] : A(0);
          value[k] = gradient.exp_scale * value[k] - gradient.smooth * w;
        }
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) value[k] = gradient.exp_scale * value[k] - gradient.smooth;
      }
      if (unsigned(row.target - column) < unsigned(kSize)) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (column + k == row.target) {
            value[k] = gradient.target_constant + gradient.target_exp_scale * row_exp<T>(z[k] - row_max);
          }
        }
      }
      if constexpr (F::kTransform) {
        if (row.softcap != A(0)) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) value[k] *= slope[k];
        }
      }
      if (out.whole(group)) {
        store_words(grad + column, pack_group<T>(value));
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (out.contains(column + k)) from_float(value[k], grad + column + k);
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void fill_part(const CrossEntropyRows& rows, int64_t i, const Groups<T>& part,
                                          typename Accumulation<T>::type value) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  T* grad = static_cast<T*>(rows.grad) + i * rows.grad_stride;
  const Groups<T> out(grad, part.begin, part.end);
  A values[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) values[k] = value;
  const Words words = pack_group<T>(values);
  for (int g = int(threadIdx.x); g < out.count; g += int(blockDim.x)) {
    if (out.whole(g)) {
      store_words(grad + out.column(g), words);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (out.contains(out.column(g) + k)) from_float(value, grad + out.column(g) + k);
      }
    }
  }
}

// Writes the results of a row that is ignored (0) or whose target is out of range (NaN); true if row i is one of these.
template <class T>
__device__ __forceinline__ bool excluded_row(const CrossEntropyRows& rows, int64_t i, const Groups<T>& part,
                                             bool forward, bool first_block) {
  using A = typename Accumulation<T>::type;
  const int64_t target = target_of(rows, i);
  const bool ignored = target == rows.options.ignore_index;
  if (!ignored && target >= 0 && target < rows.vocab) return false;
  const A value = ignored ? A(0) : A(NAN);
  if (rows.grad != nullptr) fill_part<T>(rows, i, part, value);
  if (!forward || !first_block || threadIdx.x != 0) return true;
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

template <class T, class F>
__device__ __forceinline__ RowGradient<typename Accumulation<T>::type> gradient_of_row(
    const CrossEntropyRows& rows, int64_t i, const Row<T, F>& row, typename Accumulation<T>::type row_max,
    typename Accumulation<T>::type sum_exp, typename Accumulation<T>::type logprob) {
  using A = typename Accumulation<T>::type;
  return row_gradient<A>(static_cast<const A*>(rows.coefficient)[i], row_max, sum_exp, logprob,
                         weight_of(row.weight, row.target), weight_sum<A>(rows), rows.vocab, rows.options);
}

// Grid: one cluster per row. Shared memory: a Reduction's scratch, then the cached part of the row.
template <class T, class F, bool kCached>
__global__ void __launch_bounds__(kCached ? kRowThreads : kResident<T>, kCached ? kResident<T> / kRowThreads : 1)
    cross_entropy_rows_fwd_kernel(const __grid_constant__ CrossEntropyRows rows) {
  using A = typename Accumulation<T>::type;
  using Sums = Reduction<RowPartial<T, F::kSums>>;
  const int64_t i = int64_t(blockIdx.x) / cluster_size();
  const bool first_block = cluster_rank() == 0;
  const Row<T, F> row(rows, i);
  const Groups<T> part = part_of_row(row.logits, int(rows.vocab), cluster_rank(), cluster_size());
  if (excluded_row<T>(rows, i, part, true, first_block)) return;

  auto* scratch = reinterpret_cast<typename Sums::Scratch*>(shared_memory());
  using Cached = typename F::template Cached<T>;
  const Cached cached{reinterpret_cast<decltype(Cached::values)>(shared_memory() + (sizeof(*scratch) + 15) / 16 * 16),
                      part.count};
  // Read before the reduction: afterwards the gradient may overwrite it.
  const A target_z = row.z(row.target);
  const A anchor = target_z > A(-INFINITY) ? target_z : A(0);
  const RowPartial<T, F::kSums> partial =
      Sums::over_cluster(sum_part<T, F, kCached>(rows, row, part, cached, anchor), scratch);

  RowSums<A> sums{partial.maximum, target_z, partial.others, A(0), A(0)};
  if constexpr (F::kSums) {
    sums.expected = partial.expected;
    sums.weighted_gaps = partial.gaps + weight_sum<A>(rows) * (partial.maximum - anchor);
  }
  const RowResult<A> result =
      finish_row<A>(sums, weight_of(row.weight, row.target), weight_sum<A>(rows), rows.vocab, rows.options);
  if (first_block && threadIdx.x == 0) {
    static_cast<A*>(rows.loss)[i] = result.loss;
    static_cast<A*>(rows.row_max)[i] = partial.maximum;
    static_cast<A*>(rows.sum_exp)[i] = result.sum_exp;
    static_cast<A*>(rows.logprob)[i] = result.logprob;
    if constexpr (F::kSums) {
      if (rows.prediction != nullptr) {
        rows.prediction[i] = partial.argmax < rows.vocab ? partial.argmax : 0;
        static_cast<A*>(rows.entropy)[i] = result.entropy;
      }
    }
  }
  if (rows.grad != nullptr) {
    write_part<T, F, kCached>(rows, i, row, part, cached, partial.maximum,
                              gradient_of_row(rows, i, row, partial.maximum, result.sum_exp, result.logprob));
  }
  Sums::finish();
}

// Grid: `parts` blocks per row.
template <class T, class F>
__global__ void __launch_bounds__(kRowThreads, kResident<T> / kRowThreads)
    cross_entropy_rows_bwd_kernel(const __grid_constant__ CrossEntropyRows rows, int parts) {
  using A = typename Accumulation<T>::type;
  const int64_t i = int64_t(blockIdx.x) / parts;
  const Row<T, F> row(rows, i);
  const Groups<T> part = part_of_row(row.logits, int(rows.vocab), int(blockIdx.x) % parts, parts);
  if (excluded_row<T>(rows, i, part, false, false)) return;
  const A row_max = static_cast<const A*>(rows.row_max)[i];
  write_part<T, F, false>(rows, i, row, part, {nullptr, 0}, row_max,
                          gradient_of_row(rows, i, row, row_max, static_cast<const A*>(rows.sum_exp)[i],
                                          static_cast<const A*>(rows.logprob)[i]));
}

}  // namespace sslkernels
