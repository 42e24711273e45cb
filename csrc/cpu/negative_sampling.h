// Loss, slopes and directions of negative_sampling_loss on the CPU.
#pragma once

#include "../common/negative_sampling.h"
#include "isa.h"

namespace sslkernels {

// The pairs [begin, end). Every index is in its range.
#define SSLKERNELS_DECLARE(isa)                                                          \
  namespace isa {                                                                        \
  void negative_sampling_fwd(const NegativeSampling& pairs, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
