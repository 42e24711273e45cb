// Cross-entropy of rows of logits on the CPU.
#pragma once

#include "../common/cross_entropy_rows.h"
#include "isa.h"

namespace sslkernels {

// The rows [begin, end).
#define SSLKERNELS_DECLARE(isa)                                                          \
  namespace isa {                                                                        \
  void cross_entropy_rows_fwd(const CrossEntropyRows& rows, int64_t begin, int64_t end); \
  void cross_entropy_rows_bwd(const CrossEntropyRows& rows, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
