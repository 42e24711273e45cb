// The rows of a contrastive loss, before and after the tiles of scores.
#include <cmath>
#include <limits>

#include "contrastive/pair_rows.h"
#include "core/cpu/element.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 512;

inline int64_t at_most(int64_t left, int64_t block) { return left < block ? left : block; }

inline const void* row_of(Element element, const void* values, int64_t row, int64_t dim) {
  return static_cast<const char*>(values) + row * dim * bytes_of(element);
}
inline void* row_of(Element element, void* values, int64_t row, int64_t dim) {
  return static_cast<char*>(values) + row * dim * bytes_of(element);
}

template <class A>
A entry(const void* values, int64_t i) {
  return static_cast<const A*>(values)[i];
}

template <class A>
A dot_product(Element element, const void* left, const void* right, int64_t dim) {
  A sum = 0;
  with_elements<A>(element, left, 0, [&](auto* x) {
    const auto* y = static_cast<decltype(x)>(right);
    A part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t d = 0; d < dim; ++d) part += A(to_float(x[d])) * A(to_float(y[d]));
    sum = part;
  });
  return sum;
}

template <class A>
A softplus(A x) {
  return (x > A(0) ? x : A(0)) + std::log1p(std::exp(-std::fabs(x)));
}

template <class A>
A sigmoid(A x) {
  const A e = std::exp(-std::fabs(x));
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

template <class A>
double log_add_exp(double a, A b) {
  if (a == b) return a + 0.6931471805599453094;  // also for infinities
  return (a > b ? a : double(b)) + std::log1p(std::exp(-std::fabs(A(a - b))));
}

template <class A>
A inverse_norm_of(A square) {
  const A norm = std::sqrt(square);
  return A(1) / (norm < A(kNormEps) ? A(kNormEps) : norm);
}

template <class A>
void inverse_norms_of(const InverseNorms& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const void* row = row_of(args.element, args.values, i, args.dim);
    static_cast<A*>(args.norm)[i] = inverse_norm_of(dot_product<A>(args.element, row, row, args.dim));
  }
}

template <class A>
void positive_scores_of(const PositiveScores& args, int64_t begin, int64_t end) {
  const A scale = entry<A>(args.scale, 0);
  const A bias = args.bias == nullptr ? A(0) : entry<A>(args.bias, 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t key = args.positive == nullptr ? i : args.positive[i];
    A u = key >= 0 || key == kNoPositive ? A(0) : std::numeric_limits<A>::quiet_NaN();
    if (key >= 0 && key < args.keys) {
      u = dot_product<A>(args.element, row_of(args.element, args.query, i, args.dim),
                         row_of(args.element, args.key, key, args.dim), args.dim);
      if (args.query_norm != nullptr) u *= entry<A>(args.query_norm, i) * entry<A>(args.key_norm, key);
    }
    static_cast<A*>(args.u)[i] = u;
    static_cast<A*>(args.score)[i] = scale * u + bias;
  }
}

// The norms of query i and key i, and the score of the pair, from one read of both.
template <class A>
void norms_and_scores_of(const NormsAndScores& args, int64_t begin, int64_t end) {
  const A scale = entry<A>(args.scale, 0);
  const A bias = args.bias == nullptr ? A(0) : entry<A>(args.bias, 0);
  for (int64_t i = begin; i < end; ++i) {
    const void* query = row_of(args.element, args.query, i, args.dim);
    const void* key = row_of(args.element, args.key, i, args.dim);
    A query_square = 0, key_square = 0, product = 0;
    if (i < args.rows && i < args.keys) {
      with_elements<A>(args.element, query, 0, [&](auto* x) {
        const auto* y = static_cast<decltype(x)>(key);
        A xx = 0, yy = 0, xy = 0;
#pragma omp simd reduction(+ : xx, yy, xy)
        for (int64_t d = 0; d < args.dim; ++d) {
          const A left = A(to_float(x[d])), right = A(to_float(y[d]));
          xx += left * left;
          yy += right * right;
          xy += left * right;
        }
        query_square = xx, key_square = yy, product = xy;
      });
    } else if (i < args.rows) {
      query_square = dot_product<A>(args.element, query, query, args.dim);
    } else {
      key_square = dot_product<A>(args.element, key, key, args.dim);
    }
    const A query_norm = inverse_norm_of(query_square), key_norm = inverse_norm_of(key_square);
    if (i < args.keys) static_cast<A*>(args.key_norm)[i] = key_norm;
    if (i >= args.rows) continue;
    const A u = i < args.keys ? product * (query_norm * key_norm) : A(0);
    static_cast<A*>(args.query_norm)[i] = query_norm;
    static_cast<A*>(args.u)[i] = u;
    static_cast<A*>(args.score)[i] = scale * u + bias;
  }
}

template <class A>
struct RowLoss {
  A loss;
  A slope;  // gradient of the positive's score
};

template <class A>
RowLoss<A> softmax_row(const PairLosses& args, int64_t i, bool counted) {
  const A score = entry<A>(args.score, i), e = A(args.label_smoothing);
  const double others = args.sum[i] == 0 ? -std::numeric_limits<double>::infinity()
                                         : double(entry<A>(args.max, i)) + std::log(args.sum[i]);
  const bool wants_lse = args.reference != nullptr || args.ids_positive || e > A(0);
  const double lse = wants_lse ? log_add_exp(others, score) : 0;
  if (args.others != nullptr) args.others[i] = others;
  // Without a positive every exponential is 0.
  const A reference = counted ? A(lse) : std::numeric_limits<A>::infinity();
  if (args.reference != nullptr) static_cast<A*>(args.reference)[i] = reference;
  if (args.settled != nullptr) {
    const A weight = entry<A>(args.weight, i);
    const bool rounded = counted && double(reference) != lse;
    static_cast<A*>(args.settled)[i] = rounded ? weight * std::exp(A(double(reference) - lse)) : weight;
  }
  RowLoss<A> row{A(0), A(0)};
  if (args.loss != nullptr) {
    row.loss = softplus(A(others - score));
    if (args.ids_positive) row.loss = A(lse - (args.positive_sum[i] + score) / double(args.positives[i]));
    if (e > A(0)) {
      row.loss = (A(1) - e) * row.loss + e * A(lse - (args.score_sum[i] + score) / double(args.candidates[i]));
    }
  }
  if (args.weight != nullptr) {
    const A weight = entry<A>(args.weight, i);
    const A share = args.share == nullptr ? (A(1) - e) * weight : entry<A>(args.share, i);
    // The difference of the probability and its target, without cancellation for a confident pair.
    row.slope = (weight - share) - (weight != A(0) ? weight * sigmoid(A(others - score)) : A(0));
    if (args.smoothing != nullptr) row.slope -= entry<A>(args.smoothing, i);
  }
  return row;
}

template <class A>
void losses_of(const PairLosses& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const bool counted = args.positive == nullptr || args.positive[i] != kNoPositive;
    const A weight = args.weight == nullptr ? A(0) : entry<A>(args.weight, i);
    RowLoss<A> row{A(0), A(0)};
    if (args.energy == Energy::kSoftmax) {
      row = softmax_row<A>(args, i, counted);
    } else if (args.energy == Energy::kSigmoid) {
      const A cost = -entry<A>(args.score, i);
      row.loss = A(args.sum[i]) + (counted ? softplus(cost) : A(0));
      if (args.weight != nullptr) row.slope = -weight * (counted ? sigmoid(cost) : A(0));
    } else {
      row.loss = A(args.sum[i]);
      if (args.weight != nullptr) row.slope = -weight * A(args.active[i]);
    }
    if (args.loss != nullptr && (counted || args.energy == Energy::kSigmoid)) {
      static_cast<A*>(args.loss)[i] += A(args.half) * row.loss;
    }
    if (args.weight == nullptr) continue;
    static_cast<A*>(args.score_gradient)[i] += row.slope;
    if (row.slope != A(0)) args.dot[i] += row.slope * entry<A>(args.u, i);
    args.total[i] += row.slope;
  }
}

template <class A>
void finish_row(const FeatureGradients& args, int64_t i) {
  const void* total = row_of(args.total_element, args.total, i, args.dim);
  const A* extra = args.extra == nullptr ? nullptr : static_cast<const A*>(args.extra) + i * args.dim;
  const void* values = row_of(args.element, args.values, i, args.dim);
  void* out = row_of(args.out_element, args.out, i, args.dim);
  const A scale = entry<A>(args.scale, 0);
  const A norm = args.norm == nullptr ? A(0) : entry<A>(args.norm, i);
  const bool projects = args.norm != nullptr && norm * A(kNormEps) < A(1);  // a norm that was clamped is a constant

  A factor = args.partner == nullptr || i >= args.score_rows ? A(0) : entry<A>(args.score_gradient, i);
  const int64_t partner = args.index == nullptr ? i : args.index[i];
  const bool has_partner = partner >= 0 && partner < args.partners;
  if (factor != A(0) && has_partner && args.norm != nullptr) factor *= norm * entry<A>(args.partner_norm, partner);

  alignas(kLine) A t[kBlock], x[kBlock], y[kBlock];
  const auto before_projection = [&](int64_t begin, int64_t count) {
    load_any(args.total_element, total, begin, count, t);
    if (factor != A(0)) {
      if (has_partner) {
        load_any(args.element, row_of(args.element, args.partner, partner, args.dim), begin, count, y);
      } else {
        for (int64_t d = 0; d < count; ++d) y[d] = A(1);  // the factor is NaN
      }
#pragma omp simd
      for (int64_t d = 0; d < count; ++d) t[d] += factor * y[d];
    }
#pragma omp simd
    for (int64_t d = 0; d < count; ++d) t[d] *= scale;
    if (extra != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < count; ++d) t[d] += extra[begin + d];
    }
  };
  A along = 0;
  for (int64_t begin = 0; begin < args.dim; begin += kBlock) {
    const int64_t count = at_most(args.dim - begin, kBlock);
    before_projection(begin, count);
    if (projects) {
      load_any(args.element, values, begin, count, x);
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t d = 0; d < count; ++d) part += t[d] * x[d];
      along += part;
    } else {
      store_any(args.out_element, t, begin, count, out);
    }
  }
  if (!projects) return;
  along *= norm * norm;
  for (int64_t begin = 0; begin < args.dim; begin += kBlock) {
    const int64_t count = at_most(args.dim - begin, kBlock);
    if (args.dim > kBlock) {  // the block of before holds another part of the row
      before_projection(begin, count);
      load_any(args.element, values, begin, count, x);
    }
#pragma omp simd
    for (int64_t d = 0; d < count; ++d) t[d] -= along * x[d];
    store_any(args.out_element, t, begin, count, out);
  }
}

}  // namespace

void inverse_norms(const InverseNorms& args, int64_t begin, int64_t end) {
  const auto run = args.element == Element::kDouble ? inverse_norms_of<double> : inverse_norms_of<float>;
  run(args, begin, end);
}

void positive_scores(const PositiveScores& args, int64_t begin, int64_t end) {
  const auto run = args.element == Element::kDouble ? positive_scores_of<double> : positive_scores_of<float>;
  run(args, begin, end);
}

void norms_and_scores(const NormsAndScores& args, int64_t begin, int64_t end) {
  const auto run = args.element == Element::kDouble ? norms_and_scores_of<double> : norms_and_scores_of<float>;
  run(args, begin, end);
}

void pair_losses(const PairLosses& args, int64_t begin, int64_t end) {
  const auto run = args.element == Element::kDouble ? losses_of<double> : losses_of<float>;
  run(args, begin, end);
}

void finish_gradients(const FeatureGradients& args, int64_t begin, int64_t end) {
  const auto run = args.element == Element::kDouble ? finish_row<double> : finish_row<float>;
  for (int64_t i = begin; i < end; ++i) run(args, i);
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
