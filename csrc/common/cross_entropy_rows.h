// The arguments of the row kernels of cross-entropy, on the CPU and on a GPU.
#pragma once

#include <cstdint>

#include "row_loss.h"

namespace sslkernels {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// A is the accumulation type: double for double logits, else float. `grad` may be `logits`. Null: absent.
struct CrossEntropyRows {
  Element element;  // of logits and grad
  const void* logits;
  int64_t logits_stride;
  int64_t count;
  int64_t vocab;
  const int64_t* target;
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

}  // namespace sslkernels
