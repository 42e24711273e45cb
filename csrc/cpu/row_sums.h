// Rows of a table, weighted and added up by index, on the CPU: the gradient of a gather.
#pragma once

#include "../common/row_sums.h"
#include "isa.h"

namespace sslkernels {

// sort_rows: a stable counting sort. order holds the entries by key, those of row r at [starts[r], starts[r + 1]); of
// entries whose key is out of range it says nothing.
// weighted_row_sums: the rows of `out` that end at the positions [begin, end) of the work, each by one thread: the sums
// do not depend on how it is split. An entry whose source row is out of range counts as NaN.
#define SSLKERNELS_DECLARE(isa)                                                                                \
  namespace isa {                                                                                              \
  void sort_rows(const void* keys, bool wide, int64_t entries, int64_t rows, int64_t* order, int64_t* starts); \
  void weighted_row_sums(const WeightedRowSums& sums, int64_t begin, int64_t end);                             \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
