// Own negatives of rows of queries, on the CPU.
#pragma once

#include <cstddef>

#include "../common/own_negatives.h"
#include "isa.h"

namespace sslkernels {

// Of a thread, aligned as a double.
inline size_t own_negatives_scratch_bytes(const OwnNegatives& own) {
  return size_t(own.dim + 3 * own.count) * sizeof(double);
}

// The rows [begin, end).
#define SSLKERNELS_DECLARE(isa)                                                           \
  namespace isa {                                                                         \
  void own_negatives(const OwnNegatives& own, int64_t begin, int64_t end, void* scratch); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
