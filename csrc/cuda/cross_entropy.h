// Cross-entropy of rows of logits on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/cross_entropy_rows.h"

namespace sslkernels {

struct DeviceLimits;

void launch_cross_entropy_rows_fwd(const CrossEntropyRows& rows, void* stream);
void launch_cross_entropy_rows_bwd(const CrossEntropyRows& rows, void* stream);

// Whether something is computed on the logits before they are compared.
inline bool is_transformed(const CrossEntropyRows& rows) {
  return rows.bias != nullptr || rows.options.logit_scale != 1 || rows.options.softcap != 0;
}

// How a row is shared by blocks, and whether the forward holds it in shared memory for the gradient.
struct RowPlan {
  bool held;
  int cluster;  // blocks of a row that reduce it together
  int parts;    // blocks of a row that write its gradient apart from one another
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
