// Column sums of a matrix: the gradient of a bias. `stream` is a cudaStream_t.
#pragma once

#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// A is the accumulation type: double for double values, else float.
struct ColumnSums {
  Element element;
  const void* values;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  void* partials;  // A (column_sums_row_blocks, columns), on a GPU
  void* total;     // A (columns)
  bool add;        // to the values of `total`
};

constexpr int64_t kColumnSumsBlock = 1024;  // columns of a task on a CPU

// Blocks [begin, end) of columns.
SSLKERNELS_CPU_KERNELS(void column_sums(const ColumnSums& sums, int64_t begin, int64_t end);)

int64_t column_sums_row_blocks(const ColumnSums& sums);
void launch_column_sums(const ColumnSums& sums, void* stream);

}  // namespace sslkernels
