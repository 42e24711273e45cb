// The arguments of the kernels of negative_sampling_loss, and the loss and slope of one score.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/index.h"

namespace sslkernels {

// All arrays are contiguous; A is the accumulation type. Null: absent.
struct NegativeSampling {
  Element element;             // of the two tables
  const void* center_weight;   // (center_rows, dim)
  const void* context_weight;  // (context_rows, dim)
  int64_t center_rows;
  int64_t context_rows;
  int64_t dim;
  const void* center;     // (count)
  const void* context;    // (count)
  const void* negatives;  // (count, negative_count)
  bool wide_index;        // int64, else int32
  int64_t count;
  int64_t negative_count;
  bool exclude_positive;  // a negative that is the context of its pair is left out
  void* loss;             // A (count)
  void* slopes;           // A (count, 1 + negative_count): the derivatives of the loss in the scores
  void* direction;        // A (count, dim): the derivative of the loss in the row of the center
};

namespace {  // one copy for each instruction set of the CPU

template <class A>
struct ScoreTerm {
  A loss;
  A slope;
};

// -logsigmoid(score) of a positive, -logsigmoid(-score) of a negative. Math has exp(x) of x <= 0 and log1p(x) of x in
// [0, 1].
template <class Math, class A>
SSLKERNELS_HD ScoreTerm<A> score_term(A score, bool positive) {
  const A x = positive ? -score : score;
  const A e = Math::exp(x > A(0) ? -x : x);
  const A sigmoid = (x > A(0) ? A(1) : e) / (A(1) + e);
  return {(x > A(0) ? x : A(0)) + Math::log1p(e), positive ? -sigmoid : sigmoid};
}

}  // namespace

// The pairs [begin, end). Every index is in its range.
SSLKERNELS_CPU_KERNELS(void negative_sampling_fwd(const NegativeSampling& pairs, int64_t begin, int64_t end);)

// A pair with an index out of range has NaN for loss, slopes and direction; no table is read for it.
void launch_negative_sampling_fwd(const NegativeSampling& pairs, void* stream);

}  // namespace sslkernels
