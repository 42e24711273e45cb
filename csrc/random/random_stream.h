// The arguments of the random streams: one number for each column of each row.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

enum class Stream { kBits, kUniform, kExponential, kGumbel, kNormal };

struct RandomStream {
  const int64_t* row_ids;  // (rows), or null: the row is its number
  const int64_t* seed;
  int64_t rows;
  int64_t columns;
  int64_t sample;
  Stream stream;
  Element element;  // of `out`, but of kBits, which are 32-bit words
  void* out;        // contiguous (rows, columns)
};

// The groups of four columns [begin, end) of all rows.
SSLKERNELS_CPU_KERNELS(void random_stream(const RandomStream& numbers, int64_t begin, int64_t end);)

void launch_random_stream(const RandomStream& numbers, void* stream);

}  // namespace sslkernels
