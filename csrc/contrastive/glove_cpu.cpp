// GloVe's weighted squares, one pair at a time. Software-prefetches the rows of a later pair; the hardware prefetcher
// cannot predict gathers.
#include "contrastive/glove.h"
#include "core/cpu/element.h"
#include "core/cpu/prefetch.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kAhead = 8;  // pairs whose rows are in flight

template <class T, class Index>
void run(const Glove& pairs, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const int64_t dim = pairs.dim;
  const T* center_weight = static_cast<const T*>(pairs.center_weight);
  const T* context_weight = static_cast<const T*>(pairs.context_weight);
  const T* center_bias = static_cast<const T*>(pairs.center_bias);
  const T* context_bias = static_cast<const T*>(pairs.context_bias);
  const Index* center = static_cast<const Index*>(pairs.center);
  const Index* context = static_cast<const Index*>(pairs.context);
  const A* target = static_cast<const A*>(pairs.target);
  const A* weight = static_cast<const A*>(pairs.weight);
  A* loss = static_cast<A*>(pairs.loss);
  A* slope = static_cast<A*>(pairs.slope);

  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) {
      const int64_t next_center = center[i + kAhead], next_context = context[i + kAhead];
      prefetch_row(center_weight + next_center * dim, dim);
      prefetch_row(context_weight + next_context * dim, dim);
      prefetch(center_bias + next_center, 1);
      prefetch(context_bias + next_context, 1);
    }
    const T* u = center_weight + int64_t(center[i]) * dim;
    const T* v = context_weight + int64_t(context[i]) * dim;
    A score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t j = 0; j < dim; ++j) score += A(to_float(u[j])) * A(to_float(v[j]));
    const A bias = A(to_float(center_bias[center[i]])) + A(to_float(context_bias[context[i]]));
    const A error = score + bias - target[i];
    loss[i] = weight[i] * error * error;
    if (slope != nullptr) slope[i] = 2 * weight[i] * error;
  }
}

template <class T>
void run_for(const Glove& pairs, int64_t begin, int64_t end) {
  return pairs.wide_index ? run<T, int64_t>(pairs, begin, end) : run<T, int32_t>(pairs, begin, end);
}

}  // namespace

void glove_fwd(const Glove& pairs, int64_t begin, int64_t end) {
  with_element(pairs.element, [&](auto zero) { run_for<decltype(zero)>(pairs, begin, end); });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
