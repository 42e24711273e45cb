// Skip-gram with negative sampling, one pair at a time: each of its rows is read from memory once. Software-prefetches
// the rows of a later pair; the hardware prefetcher cannot predict gathers.
#include "contrastive/negative_sampling.h"
#include "core/cpu/prefetch.h"
#include "core/cpu/vector_math.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kRowsAhead = 16;  // rows in flight
constexpr int kBatch = 16;          // scores whose terms are computed together

struct VectorMath {
  template <class A>
  static SSLKERNELS_HD A exp(A x) {
    return exp_nonpositive(x);
  }
  template <class A>
  static SSLKERNELS_HD A log1p(A x) {
    return log1p_unit(x);
  }
};

template <class T, class A>
A dot(const T* a, const T* b, int64_t dim) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < dim; ++j) sum += A(to_float(a[j])) * A(to_float(b[j]));
  return sum;
}

// out = weight * row, or out += weight * row unless `first`.
template <class T, class A>
void add_row(const T* row, A weight, int64_t dim, bool first, A* out) {
  if (first) {
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) out[j] = weight * A(to_float(row[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) out[j] += weight * A(to_float(row[j]));
  }
}

template <class T, class Index>
void run(const NegativeSampling& pairs, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const int64_t dim = pairs.dim, negatives = pairs.negative_count, candidates = 1 + negatives;
  const T* center_weight = static_cast<const T*>(pairs.center_weight);
  const T* context_weight = static_cast<const T*>(pairs.context_weight);
  const Index* center = static_cast<const Index*>(pairs.center);
  const Index* context = static_cast<const Index*>(pairs.context);
  const Index* negative = static_cast<const Index*>(pairs.negatives);
  const int64_t ahead = kRowsAhead / (candidates + 1) + 1;
  const auto candidate = [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    return k == 0 ? context[i] : negative[i * negatives + k - 1];
  };

  for (int64_t i = begin; i < end; ++i) {
    const T* u = center_weight + int64_t(center[i]) * dim;
    A* slopes = pairs.slopes == nullptr ? nullptr : static_cast<A*>(pairs.slopes) + i * candidates;
    A* direction = pairs.direction == nullptr ? nullptr : static_cast<A*>(pairs.direction) + i * dim;
    if (i + ahead < end) prefetch_row(center_weight + int64_t(center[i + ahead]) * dim, dim);
    A loss = 0;
    for (int64_t first = 0; first < candidates; first += kBatch) {
      const int count = int(candidates - first < kBatch ? candidates - first : kBatch);
      const T* rows[kBatch];
      A scores[kBatch] = {}, losses[kBatch], used[kBatch] = {};
      for (int t = 0; t < count; ++t) {
        const int64_t k = first + t;
        if (i + ahead < end && candidate(i + ahead, k) >= 0) {
          prefetch_row(context_weight + int64_t(candidate(i + ahead, k)) * dim, dim);
        }
        const Index index = candidate(i, k);
        if (index < 0) continue;
        rows[t] = context_weight + int64_t(index) * dim;
        if (k > 0 && pairs.exclude_positive && index == context[i]) continue;
        used[t] = 1;
        scores[t] = dot<T, A>(u, rows[t], dim);
      }
#pragma omp simd
      for (int t = 0; t < kBatch; ++t) {  // fixed length: vectorises without a remainder
        const ScoreTerm<A> term = score_term<VectorMath>(scores[t], first + t == 0);
        losses[t] = used[t] > A(0) ? term.loss : A(0);
        scores[t] = used[t] > A(0) ? term.slope : A(0);
      }
      for (int t = 0; t < count; ++t) {
        loss += losses[t];
        if (slopes != nullptr) slopes[first + t] = scores[t];
        if (direction != nullptr && used[t] > A(0)) add_row(rows[t], scores[t], dim, first + t == 0, direction);
      }
    }
    static_cast<A*>(pairs.loss)[i] = loss;
  }
}

template <class T>
void run_for(const NegativeSampling& pairs, int64_t begin, int64_t end) {
  return pairs.wide_index ? run<T, int64_t>(pairs, begin, end) : run<T, int32_t>(pairs, begin, end);
}

}  // namespace

void negative_sampling_fwd(const NegativeSampling& pairs, int64_t begin, int64_t end) {
  with_element(pairs.element, [&](auto zero) { run_for<decltype(zero)>(pairs, begin, end); });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
