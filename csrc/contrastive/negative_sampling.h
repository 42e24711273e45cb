// negative_sampling_loss: arguments of its kernels and launchers, and the loss and slope of one score. `stream` is a
// cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/index.h"

namespace sslkernels {

// All arrays are contiguous; A is the accumulation type. Null: absent.
struct NegativeSampling {
  Element element;             // type of the two tables
  const void* center_weight;   // (center_rows, dim)
  const void* context_weight;  // (context_rows, dim)
  int64_t center_rows;
  int64_t context_rows;
  int64_t dim;
  const void* center;     // (count)
  const void* context;    // (count)
  const void* negatives;  // (count, negative_count); -1: none
  bool wide_index;        // int64, else int32
  int64_t count;
  int64_t negative_count;
  bool exclude_positive;  // leaves out a negative that equals the context of its pair
  void* loss;             // A (count)
  void* slopes;           // A (count, 1 + negative_count): derivatives of the loss with respect to the scores
  void* direction;        // A (count, dim): derivative of the loss with respect to the center's row
};

namespace {  // one copy for each instruction set of the CPU

template <class A>
struct ScoreTerm {
  A loss;
  A slope;
};

// -logsigmoid(score) for a positive, -logsigmoid(-score) for a negative. Math provides exp(x) for x <= 0 and log1p(x)
// for x in [0, 1].
template <class Math, class A>
SSLKERNELS_HD ScoreTerm<A> score_term(A score, bool positive) {
  const A x = positive ? -score : score;
  const A e = Math::exp(x > A(0) ? -x : x);
  const A sigmoid = (x > A(0) ? A(1) : e) / (A(1) + e);
  return {(x > A(0) ? x : A(0)) + Math::log1p(e), positive ? -sigmoid : sigmoid};
}

}  // namespace

// Pairs [begin, end). Every index must be in range, or -1 in negatives.
SSLKERNELS_CPU_KERNELS(void negative_sampling_fwd(const NegativeSampling& pairs, int64_t begin, int64_t end);)

// A pair with an index out of range has NaN loss, slopes and direction; its rows are not read.
void launch_negative_sampling_fwd(const NegativeSampling& pairs, void* stream);

}  // namespace sslkernels
