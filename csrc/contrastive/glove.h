// glove_loss: arguments of its kernels and launchers. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/index.h"

namespace sslkernels {

// The loss of a pair is weight * error^2 with error = <u, v> + b + c - target, its slope 2 * weight * error. All arrays
// are contiguous; A is the accumulation type. Null: absent.
struct Glove {
  Element element;             // type of tables and biases
  const void* center_weight;   // (center_rows, dim): u
  const void* context_weight;  // (context_rows, dim): v
  const void* center_bias;     // (center_rows): b
  const void* context_bias;    // (context_rows): c
  int64_t center_rows;
  int64_t context_rows;
  int64_t dim;
  const void* center;   // (count)
  const void* context;  // (count)
  bool wide_index;      // int64, else int32
  int64_t count;
  const void* target;  // A (count): the logarithm of the pair's count
  const void* weight;  // A (count)
  void* loss;          // A (count)
  void* slope;         // A (count): derivative of the loss with respect to the score
};

// Pairs [begin, end). Every index must be in range.
SSLKERNELS_CPU_KERNELS(void glove_fwd(const Glove& pairs, int64_t begin, int64_t end);)

// A pair with an index out of range has NaN loss and slope; its rows are not read.
void launch_glove_fwd(const Glove& pairs, void* stream);

}  // namespace sslkernels
