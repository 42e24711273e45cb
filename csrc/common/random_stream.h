// The arguments of the random streams: one number for each column of each row.
#pragma once

#include <cstdint>

#include "element.h"

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

}  // namespace sslkernels
