// Column sums of a matrix on a GPU: the gradient of a bias. `stream` is a cudaStream_t.
#pragma once

#include "core/element.h"

namespace sslkernels {

// A is the accumulation type: double for double values, else float.
struct ColumnSums {
  Element element;
  const void* values;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  void* partials;  // A (column_sums_row_blocks, columns)
  void* total;     // A (columns)
  bool add;        // to the values of `total`
};

int64_t column_sums_row_blocks(const ColumnSums& sums);
void launch_column_sums(const ColumnSums& sums, void* stream);

}  // namespace sslkernels
