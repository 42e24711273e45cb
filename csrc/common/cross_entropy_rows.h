// The arguments of the row kernels of cross-entropy, on the CPU and on a GPU.
#pragma once

#include <cstdint>

#include "element.h"
#include "row_loss.h"

namespace sslkernels {

// A is the accumulation type: double for double logits, else float. `grad` may be `logits`. Null: absent.
struct CrossEntropyRows {
  Element element;  // of logits and grad
  const void* logits;
  int64_t logits_stride;
  int64_t count;
  int64_t vocab;
  const void* target;
  bool wide_target;         // int64 targets, else int32
  const void* bias;         // A (vocab)
  const void* weight;       // A (vocab)
  const void* weight_sum;   // A (1); null: vocab
  const void* coefficient;  // A (count), multiplies the gradient of each row
  void* loss;               // A (count), as the next three; the backward reads row_max, sum_exp and logprob
  void* row_max;
  void* sum_exp;
  void* logprob;
  int64_t* prediction;  // null: no statistics
  void* entropy;        // A (count)
  void* grad;
  int64_t grad_stride;
  RowOptions options;
};

namespace {  // one copy for each instruction set of the CPU

SSLKERNELS_HD int64_t target_of(const CrossEntropyRows& rows, int64_t i) {
  return rows.wide_target ? static_cast<const int64_t*>(rows.target)[i] : static_cast<const int32_t*>(rows.target)[i];
}

}  // namespace
}  // namespace sslkernels
