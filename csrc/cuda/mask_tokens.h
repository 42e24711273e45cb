// The masking of tokens on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/mask_tokens.h"

namespace sslkernels {

// Ranges of special ids that travel as a kernel parameter.
constexpr int kInlineRanges = 64;

// tokens.rule.ranges is memory of the host, read before this returns. Where there are more than kInlineRanges,
// `device_ranges` is memory of the device for as many: it is filled from kernel parameters, so that nothing is copied
// from the host by then, nor waited for, and a captured graph holds the list.
void launch_mask_tokens(const MaskTokens& tokens, int64_t* device_ranges, void* stream);

}  // namespace sslkernels
