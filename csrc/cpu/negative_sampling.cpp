// Skip-gram with negative sampling, a pair at a time: each of its rows is read from memory once. The rows of a later pair
// are asked for meanwhile, because nothing else foretells where they are.
#include "negative_sampling.h"

#include "element.h"
#include "prefetch.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kRowsAhead = 24;  // that are being read: as many as a core has outstanding misses for

template <class T, class A>
A dot(const T* a, const T* b, int64_t dim) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < dim; ++j) sum += A(to_float(a[j])) * A(to_float(b[j]));
  return sum;
}

// out = weight * row, added to what is there unless `first`.
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
  const int64_t dim = pairs.dim, negatives = pairs.negative_count;
  const T* center_weight = static_cast<const T*>(pairs.center_weight);
  const T* context_weight = static_cast<const T*>(pairs.context_weight);
  const Index* center = static_cast<const Index*>(pairs.center);
  const Index* context = static_cast<const Index*>(pairs.context);
  const Index* negative = static_cast<const Index*>(pairs.negatives);
  A* slopes = static_cast<A*>(pairs.slopes);
  A* direction = static_cast<A*>(pairs.direction);
  const int64_t ahead = kRowsAhead / (negatives + 2) + 1;

  const auto prefetch = [&](int64_t i) {
    prefetch_row(center_weight + int64_t(center[i]) * dim, dim);
    prefetch_row(context_weight + int64_t(context[i]) * dim, dim);
    for (int64_t k = 0; k < negatives; ++k) {
      prefetch_row(context_weight + int64_t(negative[i * negatives + k]) * dim, dim);
    }
  };
  for (int64_t i = begin; i < end && i < begin + ahead; ++i) prefetch(i);
  for (int64_t i = begin; i < end; ++i) {
    if (i + ahead < end) prefetch(i + ahead);
    const T* u = center_weight + int64_t(center[i]) * dim;
    A loss = 0;
    for (int64_t k = -1; k < negatives; ++k) {
      const bool positive = k < 0;
      const Index row = positive ? context[i] : negative[i * negatives + k];
      ScoreTerm<A> term = {0, 0};
      if (positive || !pairs.exclude_positive || row != context[i]) {
        const T* v = context_weight + int64_t(row) * dim;
        term = score_term(dot<T, A>(u, v, dim), positive);
        if (direction != nullptr) add_row(v, term.slope, dim, positive, direction + i * dim);
      }
      loss += term.loss;
      if (slopes != nullptr) slopes[i * (negatives + 1) + k + 1] = term.slope;
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
  switch (pairs.element) {
    case Element::kFloat:
      return run_for<float>(pairs, begin, end);
    case Element::kDouble:
      return run_for<double>(pairs, begin, end);
    case Element::kBFloat16:
      return run_for<BFloat16>(pairs, begin, end);
    case Element::kHalf:
      return run_for<Half>(pairs, begin, end);
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
