// Random streams on the CPU.
#pragma once

#include "../common/random_stream.h"
#include "isa.h"

namespace sslkernels {

// The groups of four columns [begin, end) of all rows.
#define SSLKERNELS_DECLARE(isa)                                                \
  namespace isa {                                                              \
  void random_stream(const RandomStream& numbers, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
