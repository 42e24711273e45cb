// The masking of tokens on the CPU.
#pragma once

#include "../common/mask_tokens.h"
#include "isa.h"

namespace sslkernels {

// mask_tokens: the groups of four columns [begin, end) of all rows; mask_tokens_chained: whole rows.
#define SSLKERNELS_DECLARE(isa)                                                   \
  namespace isa {                                                                 \
  void mask_tokens(const MaskTokens& tokens, int64_t begin, int64_t end);         \
  void mask_tokens_chained(const MaskTokens& tokens, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
