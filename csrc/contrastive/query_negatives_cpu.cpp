// Per-query negatives: scores, energy and gradients.
//
// A row is processed in two passes, for the scores and for the gradients. The first reads its negatives from memory,
// the second from a cache. Negatives are converted in the loops; no converted copy is materialised.
#include <cstring>

#include "contrastive/query_negatives.h"
#include "core/cpu/element.h"
#include "core/cpu/prefetch.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

template <class A>
struct Negative {
  A dot;
  A square;
  A score;
};

template <class T, class A>
Negative<A> dot_and_square(const A* query, const T* negative, int64_t dim, bool normalise) {
  A dot = 0, square = 0;
  if (normalise) {
#pragma omp simd reduction(+ : dot, square)
    for (int64_t d = 0; d < dim; ++d) {
      const A n = to_float(negative[d]);
      dot += query[d] * n;
      square += n * n;
    }
  } else {
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < dim; ++d) dot += query[d] * to_float(negative[d]);
  }
  return {dot, square, A(0)};
}

template <class T, class A>
void add_to_grad_query(const T* negative, int64_t dim, A factor, A* grad_query) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) grad_query[d] += factor * to_float(negative[d]);
}

// In blocks, because a loop that both computes and converts to 16 bits is not vectorised.
template <class T, class A>
void write_grad_negative(const A* query, const T* negative, int64_t dim, const NegativeFactors<A>& factors, T* grad) {
  constexpr int64_t kBlock = 1024;
  const A factor = factors.of_query, projection = factors.projection;
  alignas(kLine) A buffer[kBlock];
  for (int64_t begin = 0; begin < dim; begin += kBlock) {
    const int64_t count = dim - begin < kBlock ? dim - begin : kBlock;
    A* out = buffer;
    if constexpr (sizeof(T) == sizeof(A)) out = grad + begin;
    const A* x = query + begin;
    const T* n = negative + begin;
    if (projection == A(0)) {
#pragma omp simd
      for (int64_t d = 0; d < count; ++d) out[d] = factor * x[d];
    } else {
#pragma omp simd
      for (int64_t d = 0; d < count; ++d) out[d] = factor * (x[d] - projection * to_float(n[d]));
    }
    if (out == buffer) store(buffer, count, grad + begin);
  }
}

constexpr int64_t kAhead = 8;  // rows of a table in flight

// Negative k of row i, which must be valid.
template <class T, bool kByIndex>
const T* negative_of(const QueryNegatives& args, int64_t i, int64_t k) {
  const T* negatives = static_cast<const T*>(args.negatives);
  if constexpr (!kByIndex) return negatives + (i * args.count + k) * args.dim;
  const int64_t row = index_at(args.index, args.wide_index, i * args.count + k);
  if (row < args.table_rows) return negatives + row * args.dim;
  return static_cast<const T*>(args.bank) + (row - args.table_rows) * args.dim;
}

template <class T, bool kByIndex>
void run(const QueryNegatives& args, int64_t begin, int64_t end, void* scratch) {
  using A = typename Accumulation<T>::type;
  A* query = static_cast<A*>(scratch);
  Negative<A>* negatives = reinterpret_cast<Negative<A>*>(query + args.dim);
  for (int64_t i = begin; i < end; ++i) {
    const QueryRow<A> row = query_row<A>(args, i);
    load(static_cast<const T*>(args.query) + i * args.dim, args.dim, query);

    NegativeSums<A> sums = NegativeSums<A>::identity();
    for (int64_t k = 0; k < args.count; ++k) {
      Negative<A>& negative = negatives[k];
      negative.score = A(-INFINITY);
      if (kByIndex && k + kAhead < args.count && is_valid(args, i * args.count + k + kAhead)) {
        prefetch_row(negative_of<T, kByIndex>(args, i, k + kAhead), args.dim);
      }
      if (is_valid(args, i * args.count + k)) {
        negative = dot_and_square(query, negative_of<T, kByIndex>(args, i, k), args.dim, row.normalise);
        negative.score = score_of(row, negative.dot, negative.square).score;
        sums.add(row, negative.score);
      }
      if (args.scores != nullptr) static_cast<A*>(args.scores)[i * args.count + k] = negative.score;
    }
    args.value[i] = value_of(row, sums);
    const SettledRow<A> settled = settle(row, args.value[i]);
    if (args.coefficient == nullptr) continue;

    A* grad_query = args.grad_query == nullptr ? nullptr : static_cast<A*>(args.grad_query) + i * args.dim;
    if (grad_query != nullptr) std::memset(grad_query, 0, size_t(args.dim) * sizeof(A));
    for (int64_t k = 0; k < args.count; ++k) {
      const int64_t at = i * args.count + k;
      T* grad = nullptr;
      A* of_query = nullptr;
      if (args.grad_negatives != nullptr && kByIndex) of_query = static_cast<A*>(args.grad_negatives) + at;
      if (args.grad_negatives != nullptr && !kByIndex) grad = static_cast<T*>(args.grad_negatives) + at * args.dim;
      if (!is_valid(args, at)) {
        if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, size_t(args.dim) * sizeof(T));
        if (of_query != nullptr) *of_query = A(0);
        continue;
      }
      const T* negative = negative_of<T, kByIndex>(args, i, k);
      const NegativeScore<A> score = score_of(row, negatives[k].dot, negatives[k].square);
      const A weight = weight_of(row, score.score, settled);
      const NegativeFactors<A> factors = factors_of(row, score, weight);
      sums.scale += weight * score.similarity;
      sums.bias += weight;
      if (grad_query != nullptr) {
        add_to_grad_query(negative, args.dim, row.scale * row.query_inverse_norm * factors.of_negative, grad_query);
      }
      if (grad != nullptr) write_grad_negative(query, negative, args.dim, factors, grad);
      if (of_query != nullptr) *of_query = factors.of_query;
    }
    static_cast<A*>(args.grad_scale)[i] = sums.scale;
    static_cast<A*>(args.grad_bias)[i] = sums.bias;
  }
}

}  // namespace

void query_negatives(const QueryNegatives& args, int64_t begin, int64_t end, void* scratch) {
  with_element(args.element, [&](auto zero) {
    using T = decltype(zero);
    return args.index == nullptr ? run<T, false>(args, begin, end, scratch) : run<T, true>(args, begin, end, scratch);
  });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
