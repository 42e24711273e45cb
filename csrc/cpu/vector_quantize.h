// The code of each row of an input, from tiles of products of the rows with the codes of a codebook, on the CPU.
#pragma once

#include "../common/vector_quantize.h"
#include "isa.h"

namespace sslkernels {

constexpr int64_t kCodeGroup = 1024;  // codes that are summarised together: of code_blocks
constexpr int64_t kCodeLanes = 32;    // blocks of a group

inline int64_t code_blocks(int64_t codes) { return (codes + kCodeGroup - 1) / kCodeGroup * kCodeLanes; }

#define SSLKERNELS_DECLARE(isa)                                                                              \
  namespace isa {                                                                                            \
  void code_tile(const CodeTile& tile, int64_t begin, int64_t end);                                          \
  void code_block_norms(const CodeScores& scores, void* block_norm);                                         \
  void best_codes(const CodeScores& scores, const void* block_norm, int64_t begin, int64_t end, void* work); \
  void gather_codes(const CodeGather& gather, int64_t begin, int64_t end, void* work);                       \
  void code_difference(const CodeDifference& difference, int64_t begin, int64_t end, void* work);            \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
