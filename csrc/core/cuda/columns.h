// Access to N neighbouring columns of a row whose length need not be a multiple of N, by 16 bytes if they are aligned.
#pragma once

#include "core/cuda/launch.h"
#include "core/cuda/words.h"

namespace sslkernels {

// Columns are 32-bit, even one tile beyond the last.
inline void check_dim(int64_t dim) {
  if (dim > int64_t(1) << 30) fail("the CUDA kernels take rows of at most 2^30 columns");
}

// Pads with zeros beyond the end of the row.
template <int N, class T, class A>
__device__ __forceinline__ void load_columns(const T* row, int column, int dim, A (&out)[N]) {
  if (column + N <= dim) {
    load_elements(row + column, out);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = column + k < dim ? A(to_float(row[column + k])) : A(0);
  }
}

template <int N, class T, class A>
__device__ __forceinline__ void store_columns(const A (&values)[N], T* row, int column, int dim) {
  if (column + N <= dim) {
    store_elements(values, row + column);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (column + k < dim) from_float(values[k], row + column + k);
    }
  }
}

}  // namespace sslkernels
