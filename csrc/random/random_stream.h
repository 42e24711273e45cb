// Random streams: one number for each column of each row.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

enum class Stream { kBits, kUniform, kExponential, kGumbel, kNormal };

struct RandomStream {
  const int64_t* row_ids;  // (rows); null: row i has id i
  const int64_t* seed;
  int64_t rows;
  int64_t columns;
  int64_t sample;
  Stream stream;
  Element element;  // type of `out`, except for kBits, which are 32-bit words
  void* out;        // contiguous (rows, columns)
};

// Groups of four columns [begin, end), numbered through all rows.
SSLKERNELS_CPU_KERNELS(void random_stream(const RandomStream& numbers, int64_t begin, int64_t end);)

void launch_random_stream(const RandomStream& numbers, void* stream);

}  // namespace sslkernels
