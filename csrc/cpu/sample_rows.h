// The choice of a column by Gumbel noise on the CPU.
#pragma once

#include "../common/sample_rows.h"
#include "isa.h"

namespace sslkernels {

// The rows [begin, end) of a tile.
#define SSLKERNELS_DECLARE(isa)                                           \
  namespace isa {                                                         \
  void sample_rows(const SampleRows& sample, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
