// Cross-entropy of rows of logits on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/cross_entropy_rows.h"

namespace sslkernels {

void launch_cross_entropy_rows_fwd(const CrossEntropyRows& rows, void* stream);
void launch_cross_entropy_rows_bwd(const CrossEntropyRows& rows, void* stream);

}  // namespace sslkernels
