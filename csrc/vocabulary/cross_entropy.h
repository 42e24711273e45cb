// Cross-entropy of rows of logits: arguments of its kernels and launchers. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "vocabulary/row_loss.h"

namespace sslkernels {

// A is the accumulation type: double for double logits, else float. `grad` may alias `logits`. Null: absent.
struct CrossEntropyRows {
  Element element;  // type of logits and grad
  const void* logits;
  int64_t logits_stride;
  int64_t count;
  int64_t vocab;
  const void* target;
  bool wide_target;         // int64 targets, else int32
  const void* bias;         // A (vocab)
  const void* weight;       // A (vocab)
  const void* weight_sum;   // A (1); null: vocab
  const void* coefficient;  // A (count): factor of each row's gradient
  void* loss;               // A (count), like the next three; backward reads row_max, sum_exp and logprob
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

// Rows [begin, end).
SSLKERNELS_CPU_KERNELS(void cross_entropy_rows_fwd(const CrossEntropyRows& rows, int64_t begin, int64_t end);
                       void cross_entropy_rows_bwd(const CrossEntropyRows& rows, int64_t begin, int64_t end);)

struct DeviceLimits;

void launch_cross_entropy_rows_fwd(const CrossEntropyRows& rows, void* stream);
void launch_cross_entropy_rows_bwd(const CrossEntropyRows& rows, void* stream);

// Whether the logits are transformed (bias, scale or softcap) before they are compared.
inline bool is_transformed(const CrossEntropyRows& rows) {
  return rows.bias != nullptr || rows.options.logit_scale != 1 || rows.options.softcap != 0;
}

// How blocks share a row, and whether the forward caches it in shared memory for the gradient.
struct RowPlan {
  bool cached;
  int cluster;  // blocks that reduce a row together
  int parts;    // blocks that write the gradient of a row independently
  int threads;
  int64_t shared_bytes;
};

RowPlan plan_rows_fwd(const CrossEntropyRows& rows, int64_t scratch_bytes, const DeviceLimits& limits);
RowPlan plan_rows_bwd(const CrossEntropyRows& rows);

template <class T>
void launch_rows_fwd(const CrossEntropyRows& rows, void* stream);
template <class T>
void launch_rows_bwd(const CrossEntropyRows& rows, void* stream);

}  // namespace sslkernels
