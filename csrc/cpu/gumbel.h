// Gumbel-softmax over rows on the CPU.
#pragma once

#include "../common/gumbel.h"
#include "isa.h"

namespace sslkernels {

// The rows [begin, end), or the chunks. `scratch` has a number of the accumulation type for each column.
#define SSLKERNELS_DECLARE(isa)                                                                    \
  namespace isa {                                                                                  \
  void gumbel_rows_fwd(const GumbelForward& forward, int64_t begin, int64_t end, void* scratch);   \
  void gumbel_rows_bwd(const GumbelBackward& backward, int64_t begin, int64_t end, void* scratch); \
  void probability_sums(const ProbabilitySums& sums, int64_t begin, int64_t end);                  \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
