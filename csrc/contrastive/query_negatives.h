// Per-query negatives: the scores of a query with its own negatives, merged into its row's energy. Arguments, and the
// arithmetic of one negative, for CPU and GPU. The operator is defined in sslkernels/contrastive/query_negatives.py.
// `stream` is a cudaStream_t.
#pragma once

#include <cmath>
#include <cstdint>

#include "contrastive/energy.h"
#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/index.h"

namespace sslkernels {

// Contiguous tensors. A is the accumulation type: double for double negatives, else float. Null: absent, or an output
// that is not wanted.
struct QueryNegatives {
  Element element;        // type of query, negatives and grad_negatives
  const void* query;      // (rows, dim)
  const void* negatives;  // (rows, count, dim), or with an index (table_rows, dim)
  int64_t rows;
  int64_t count;
  int64_t dim;
  // (rows, count): which row of `negatives`, followed by `bank`, a negative is; -1: none. Null: negatives have memory
  // of their own.
  const void* index;
  bool wide_index;   // int64, else int32
  const void* bank;  // (bank_rows, dim)
  int64_t table_rows;
  int64_t bank_rows;
  const uint8_t* mask;             // (rows, count); null: all are valid
  const void* query_inverse_norm;  // A (rows); null: nothing is normalised
  const void* logit_scale;         // A (1)
  const void* logit_bias;          // A (1)
  Energy energy;
  const double* reference;  // (rows): log-sum-exp of the other candidates, or the threshold of the hinge
  const void* coefficient;  // A (rows); null: no gradients
  const void* smoothing;    // A (rows)
  bool final;               // the reference of the softmax already includes these negatives
  void* scores;             // A (rows, count)
  double* value;            // (rows)
  void* grad_query;         // A (rows, dim)
  void* grad_negatives;     // (rows, count, dim); with an index, A (rows, count): of_query in NegativeFactors
  void* grad_scale;         // A (rows), like the next
  void* grad_bias;
};

namespace {  // one copy for each instruction set of the CPU

// Whether the weight of a negative depends on its own score alone.
SSLKERNELS_HD bool weights_are_apart(const QueryNegatives& args) {
  return args.energy != Energy::kSoftmax || args.final;
}

SSLKERNELS_HD bool is_valid(const QueryNegatives& args, int64_t negative) {
  if (args.mask != nullptr && args.mask[negative] == 0) return false;
  return args.index == nullptr || index_at(args.index, args.wide_index, negative) != -1;
}

// Values that the negatives of a row share.
template <class A>
struct QueryRow {
  Energy energy;
  bool final;
  bool normalise;
  A scale;
  A bias;
  A query_inverse_norm;
  double reference;
  A coefficient;
  A smoothing;
};

template <class A>
SSLKERNELS_HD QueryRow<A> query_row(const QueryNegatives& args, int64_t i) {
  const auto at = [](const void* values, int64_t index, A otherwise) {
    return values == nullptr ? otherwise : static_cast<const A*>(values)[index];
  };
  const double absent = args.energy == Energy::kSoftmax ? -INFINITY : 0;
  const double reference = args.reference == nullptr ? absent : args.reference[i];
  return {args.energy,
          args.final,
          args.query_inverse_norm != nullptr,
          at(args.logit_scale, 0, A(1)),
          at(args.logit_bias, 0, A(0)),
          at(args.query_inverse_norm, i, A(1)),
          reference,
          at(args.coefficient, i, A(0)),
          at(args.smoothing, i, A(0))};
}

template <class A>
struct NegativeScore {
  A similarity;
  A score;
  A inverse_norm;
  // multiple of the negative that its gradient subtracts from the query; 0 if its norm is below kSmallest
  A projection;
};

// square: the negative's squared norm. NaN in either argument is propagated.
template <class A>
SSLKERNELS_HD NegativeScore<A> score_of(const QueryRow<A>& row, A dot, A square) {
  constexpr A kSmallest = A(1e-12);
  NegativeScore<A> result{dot, A(0), A(1), A(0)};
  if (row.normalise) {
    const A norm = std::sqrt(square);
    result.inverse_norm = A(1) / (norm < kSmallest ? kSmallest : norm);
    const A along = result.inverse_norm * dot;
    result.similarity = row.query_inverse_norm * along;
    result.projection = norm < kSmallest ? A(0) : result.inverse_norm * along;
  }
  result.score = row.scale * result.similarity + row.bias;
  return result;
}

// Sums over the negatives of a row.
template <class A>
struct NegativeSums {
  A top;     // largest score (softmax)
  A energy;  // softmax: the sum of exp(score - top)
  A scale;   // gradients
  A bias;

  static SSLKERNELS_HD NegativeSums identity() { return {A(-INFINITY), A(0), A(0), A(0)}; }

  SSLKERNELS_HD A anchor() const { return top == A(-INFINITY) ? A(0) : top; }

  SSLKERNELS_HD void add(const QueryRow<A>& row, A score) {
    if (row.energy == Energy::kSigmoid) {
      energy += (score > A(0) ? score : A(0)) + std::log1p(std::exp(-std::fabs(score)));
    } else if (row.energy == Energy::kHinge) {
      const A over = score - A(row.reference);
      energy += over < A(0) ? A(0) : over;
    } else if (score > top) {
      energy = relative_to(score) + A(1);
      top = score;
    } else {
      energy += std::exp(score - anchor());
    }
  }

  // Energies other than the softmax have no top and are simply added.
  static SSLKERNELS_HD NegativeSums combine(NegativeSums a, NegativeSums b) {
    const A top = a.top > b.top ? a.top : b.top;
    return {top, a.relative_to(top) + b.relative_to(top), a.scale + b.scale, a.bias + b.bias};
  }

  // The energy relative to a new top `to`. Without a top it is 0 or NaN.
  SSLKERNELS_HD A relative_to(A to) const {
    return top == to || top == A(-INFINITY) ? energy : energy * std::exp(top - to);
  }
};

template <class A>
SSLKERNELS_HD double value_of(const QueryRow<A>& row, const NegativeSums<A>& sums) {
  if (row.energy != Energy::kSoftmax) return sums.energy;
  if (row.final) return row.reference;
  const double own = double(sums.anchor()) + double(std::log(sums.energy));
  if (own == row.reference && std::isinf(own)) return own;
  return (own > row.reference ? own : row.reference) + std::log1p(std::exp(-std::fabs(A(own - row.reference))));
}

// The value of a row as its weights take it, and its coefficient times what the rounding took from them.
template <class A>
struct SettledRow {
  A value;
  A coefficient;
};

template <class A>
SSLKERNELS_HD SettledRow<A> settle(const QueryRow<A>& row, double value) {
  const A rounded = A(value);
  if (row.energy != Energy::kSoftmax || double(rounded) == value) return {rounded, row.coefficient};
  return {rounded, row.coefficient * std::exp(A(double(rounded) - value))};
}

// The derivative with respect to the score, times the row's coefficient.
template <class A>
SSLKERNELS_HD A weight_of(const QueryRow<A>& row, A score, const SettledRow<A>& settled) {
  if (row.energy == Energy::kSigmoid) {
    const A e = std::exp(-std::fabs(score));
    return row.coefficient * ((score < A(0) ? e : A(1)) / (A(1) + e));
  }
  if (row.energy == Energy::kHinge) {
    const A over = score - A(row.reference);
    return over > A(0) ? row.coefficient : over <= A(0) ? A(0) : over;
  }
  if (settled.value == A(-INFINITY)) return A(0);
  return settled.coefficient * std::exp(score - settled.value) - row.smoothing;
}

// grad_query = scale * query_inverse_norm * sum(of_negative * negative) and grad_negative = of_query * (query -
// projection * negative).
template <class A>
struct NegativeFactors {
  A of_negative;
  A of_query;
  A projection;
};

template <class A>
SSLKERNELS_HD NegativeFactors<A> factors_of(const QueryRow<A>& row, const NegativeScore<A>& score, A weight) {
  const A of_negative = weight * score.inverse_norm;
  return {of_negative, row.scale * row.query_inverse_norm * of_negative, score.projection};
}

// Scratch per thread, aligned as double.
inline int64_t query_negatives_scratch_bytes(const QueryNegatives& args) {
  return (args.dim + 3 * args.count) * int64_t(sizeof(double));
}

}  // namespace

// Rows [begin, end).
SSLKERNELS_CPU_KERNELS(void query_negatives(const QueryNegatives& args, int64_t begin, int64_t end, void* scratch);)

struct DeviceLimits;

// How a block computes its row: in tiles of negatives, with a team of threads per negative.
struct QueryNegativesPlan {
  int tile;      // negatives per tile
  int team;      // threads per negative: a power of two, at most a warp
  int pitch;     // 16-byte groups per negative in shared memory, at any alignment
  bool cached;   // a tile is cached in shared memory for the gradients
  bool aligned;  // every negative and its gradient start at multiples of 16 bytes
  int threads;
  int64_t shared_bytes;
};

QueryNegativesPlan plan_query_negatives(const QueryNegatives& args, const DeviceLimits& limits);
void launch_query_negatives(const QueryNegatives& args, void* stream);

}  // namespace sslkernels
