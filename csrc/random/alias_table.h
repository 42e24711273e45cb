// Indices from a fixed distribution by Walker's alias method. `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/host_device.h"

namespace sslkernels {

// A bucket of the table is its own index for `threshold` of 2^32 fractions and `alias` for the others.
struct AliasBucket {
  uint32_t threshold;
  int32_t alias;
};

struct AliasDraw {
  const AliasBucket* buckets;  // (size)
  int64_t size;                // less than 2^31
  const int64_t* row_ids;      // (rows); null: row i has id i
  const int64_t* seed;
  int64_t rows;
  int64_t columns;
  int64_t* out;  // contiguous (rows, columns)
};

namespace {  // one copy for each instruction set of the CPU

// The words of samples 0 and 1 are a number in [0, 1) of 64 bits. Its product with the size is a bucket and a fraction.
SSLKERNELS_HD int64_t alias_index(const AliasDraw& draw, uint32_t high, uint32_t low) {
  const uint64_t size = uint64_t(draw.size);
  const uint64_t product = uint64_t(high) * size + ((uint64_t(low) * size) >> 32);
  const AliasBucket bucket = draw.buckets[product >> 32];
  return uint32_t(product) < bucket.threshold ? int64_t(product >> 32) : int64_t(bucket.alias);
}

}  // namespace

// Groups of four columns [begin, end), numbered through all rows.
SSLKERNELS_CPU_KERNELS(void alias_draw(const AliasDraw& draw, int64_t begin, int64_t end);)

void launch_alias_draw(const AliasDraw& draw, void* stream);

}  // namespace sslkernels
