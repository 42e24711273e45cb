// The kernels of vector_quantize on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/vector_quantize.h"

namespace sslkernels {

// A unit tile is not made here: the scores of a cosine have a gain.
void launch_code_tile(const CodeTile& tile, void* stream);

// Rows of products start at multiples of 16 bytes, and so do the arrays of numbers of codes, whose last 16 bytes are
// read whole.
void launch_best_codes(const CodeScores& scores, void* stream);

void launch_gather_codes(const CodeGather& gather, void* stream);
void launch_code_difference(const CodeDifference& difference, void* stream);

}  // namespace sslkernels
