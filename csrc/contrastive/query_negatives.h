// The scores of a query with negatives of its own, merged into its row's energy: arguments, and the arithmetic of one
// negative, on the CPU and on a GPU. The operator is defined in sslkernels/ops/own_negatives.py.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "contrastive/energy.h"
#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// Contiguous tensors. A is the accumulation type: double for double negatives, else float. Null: absent, or an output
// that is not asked for.
struct OwnNegatives {
  Element element;        // of query, negatives and grad_negatives
  const void* query;      // (rows, dim)
  const void* negatives;  // (rows, count, dim)
  int64_t rows;
  int64_t count;
  int64_t dim;
  const uint8_t* mask;             // (rows, count); null: all take part
  const void* query_inverse_norm;  // A (rows); null: nothing is normalised
  const void* logit_scale;         // A (1)
  const void* logit_bias;          // A (1)
  Energy energy;
  const void* reference;    // A (rows): log-sum-exp of the other candidates, or the threshold of the hinge
  const void* coefficient;  // A (rows); null: no gradients
  const void* smoothing;    // A (rows)
  bool final;               // the reference of the softmax counts these negatives already
  void* scores;             // A (rows, count)
  void* value;              // A (rows)
  void* grad_query;         // A (rows, dim)
  void* grad_negatives;     // (rows, count, dim)
  void* grad_scale;         // A (rows), as the next
  void* grad_bias;
};

namespace {  // one copy for each instruction set of the CPU

// Whether the weight of a negative depends on its own score alone.
SSLKERNELS_HD bool weights_are_apart(const OwnNegatives& own) { return own.energy != Energy::kSoftmax || own.final; }

SSLKERNELS_HD bool takes_part(const OwnNegatives& own, int64_t negative) {
  return own.mask == nullptr || own.mask[negative] != 0;
}

// What the negatives of a row have in common.
template <class A>
struct OwnRow {
  Energy energy;
  bool final;
  bool normalise;
  A scale;
  A bias;
  A query_inverse_norm;
  A reference;
  A coefficient;
  A smoothing;
};

template <class A>
SSLKERNELS_HD OwnRow<A> own_row(const OwnNegatives& own, int64_t i) {
  const auto at = [](const void* values, int64_t index, A otherwise) {
    return values == nullptr ? otherwise : static_cast<const A*>(values)[index];
  };
  return {own.energy,
          own.final,
          own.query_inverse_norm != nullptr,
          at(own.logit_scale, 0, A(1)),
          at(own.logit_bias, 0, A(0)),
          at(own.query_inverse_norm, i, A(1)),
          at(own.reference, i, own.energy == Energy::kSoftmax ? A(-INFINITY) : A(0)),
          at(own.coefficient, i, A(0)),
          at(own.smoothing, i, A(0))};
}

template <class A>
struct OwnScore {
  A similarity;
  A score;
  A inverse_norm;  // of the negative
  A projection;    // what of the negative is taken from the query in its gradient; 0 where it has no direction
};

// square: the negative's squared norm. NaN in either stays NaN.
template <class A>
SSLKERNELS_HD OwnScore<A> score_of(const OwnRow<A>& row, A dot, A square) {
  constexpr A kSmallest = A(1e-12);
  OwnScore<A> result{dot, A(0), A(1), A(0)};
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

// The sums of a row over its negatives.
template <class A>
struct OwnSums {
  A top;     // the softmax's largest score
  A energy;  // of the softmax, the sum of exp(score - top)
  A scale;   // gradients
  A bias;

  static SSLKERNELS_HD OwnSums identity() { return {A(-INFINITY), A(0), A(0), A(0)}; }

  SSLKERNELS_HD A anchor() const { return top == A(-INFINITY) ? A(0) : top; }

  SSLKERNELS_HD void add(const OwnRow<A>& row, A score) {
    if (row.energy == Energy::kSigmoid) {
      energy += (score > A(0) ? score : A(0)) + std::log1p(std::exp(-std::fabs(score)));
    } else if (row.energy == Energy::kHinge) {
      const A over = score - row.reference;
      energy += over < A(0) ? A(0) : over;
    } else if (score > top) {
      energy = relative_to(score) + A(1);
      top = score;
    } else {
      energy += std::exp(score - anchor());
    }
  }

  // The sums of no softmax have no top, and are added as they are.
  static SSLKERNELS_HD OwnSums combine(OwnSums a, OwnSums b) {
    const A top = a.top > b.top ? a.top : b.top;
    return {top, a.relative_to(top) + b.relative_to(top), a.scale + b.scale, a.bias + b.bias};
  }

  // The energy, when its top becomes `to`. What has no top is 0 or NaN.
  SSLKERNELS_HD A relative_to(A to) const {
    return top == to || top == A(-INFINITY) ? energy : energy * std::exp(top - to);
  }
};

template <class A>
SSLKERNELS_HD A value_of(const OwnRow<A>& row, const OwnSums<A>& sums) {
  if (row.energy != Energy::kSoftmax) return sums.energy;
  if (row.final) return row.reference;
  const A own = sums.anchor() + std::log(sums.energy);
  if (own == row.reference && std::isinf(own)) return own;
  return (own > row.reference ? own : row.reference) + std::log1p(std::exp(-std::fabs(own - row.reference)));
}

// The derivative with respect to the score, times the row's coefficient.
template <class A>
SSLKERNELS_HD A weight_of(const OwnRow<A>& row, A score, A value) {
  if (row.energy == Energy::kSigmoid) {
    const A e = std::exp(-std::fabs(score));
    return row.coefficient * ((score < A(0) ? e : A(1)) / (A(1) + e));
  }
  if (row.energy == Energy::kHinge) {
    return score > row.reference ? row.coefficient : score <= row.reference ? A(0) : score - row.reference;
  }
  return value == A(-INFINITY) ? A(0) : row.coefficient * std::exp(score - value) - row.smoothing;
}

// grad_query is scale * query_inverse_norm * sum(of_negative * negative);
// grad_negative is of_query * (query - projection * negative).
template <class A>
struct OwnFactors {
  A of_negative;
  A of_query;
  A projection;
};

template <class A>
SSLKERNELS_HD OwnFactors<A> factors_of(const OwnRow<A>& row, const OwnScore<A>& score, A weight) {
  const A of_negative = weight * score.inverse_norm;
  return {of_negative, row.scale * row.query_inverse_norm * of_negative, score.projection};
}

}  // namespace

// Of a thread, aligned as a double.
inline size_t own_negatives_scratch_bytes(const OwnNegatives& own) {
  return size_t(own.dim + 3 * own.count) * sizeof(double);
}

// The rows [begin, end).
SSLKERNELS_CPU_KERNELS(void own_negatives(const OwnNegatives& own, int64_t begin, int64_t end, void* scratch);)

struct DeviceLimits;

// How a block computes its row: the negatives in tiles, each negative by a team of threads.
struct OwnPlan {
  int tile;      // negatives
  int team;      // threads, a power of two, at most a warp
  int pitch;     // 16-byte groups of a negative in shared memory, however it is aligned
  bool held;     // a tile is held in shared memory, for the gradients
  bool aligned;  // every negative and its gradient start at multiples of 16 bytes
  int threads;
  int64_t shared_bytes;
};

OwnPlan plan_own_negatives(const OwnNegatives& own, const DeviceLimits& limits);
void launch_own_negatives(const OwnNegatives& own, void* stream);

}  // namespace sslkernels
