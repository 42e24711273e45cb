// Sums over the rows and the columns of a tile of pair scores, and their gradient in place, on the CPU.
#pragma once

#include "../common/pair_scores.h"
#include "isa.h"

namespace sslkernels {

// Columns of a block of pair_column_sums, which is given blocks [begin_block, end_block).
constexpr int64_t kPairColumns = 256;

#define SSLKERNELS_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                                      \
  void pair_row_sums(const PairScores& scores, const PairRowSums& sums, int64_t begin, int64_t end);                   \
  void pair_column_sums(const PairScores& scores, const PairColumnSums& sums, int64_t begin_block, int64_t end_block); \
  void pair_gradient(const PairScores& scores, const PairGradient& gradient, int64_t begin, int64_t end);              \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
