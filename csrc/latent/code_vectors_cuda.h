// Rows of vectors whose element type is a runtime argument: N neighbouring columns at a time, as numbers of type A.
#pragma once

#include <algorithm>

#include "core/cuda/columns.h"
#include "core/cuda/packed_columns.h"
#include "core/cuda/teams.h"
#include "latent/vector_quantize.h"

namespace sslkernels {

constexpr int kVectorThreads = 256;

// Pads with zeros beyond the end of the row.
template <int N, class T, class A>
__device__ __forceinline__ void load_chunk(const T* row, int column, int dim, A (&out)[N]) {
  T elements[N];
  load_values(row, column, dim, elements);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = A(to_float(elements[k]));
}

template <int N, class T, class A>
__device__ __forceinline__ void store_chunk(const A (&values)[N], T* row, int column, int dim) {
  T elements[N];
#pragma unroll
  for (int k = 0; k < N; ++k) from_float(values[k], &elements[k]);
  store_values(elements, row, column, dim);
}

// Calls visit(T{}) with the element type. N columns of the widest type in use are 16 bytes: see with_columns.
template <int N, class Visit>
__device__ __forceinline__ void with_type(Element element, Visit visit) {
  switch (element) {
    case Element::kFloat:
      if constexpr (N * sizeof(float) <= 16) visit(float());
      return;
    case Element::kDouble:
      if constexpr (N * sizeof(double) <= 16) visit(double());
      return;
    case Element::kBFloat16:
      return visit(BFloat16());
    case Element::kHalf:
      return visit(Half());
  }
}

template <int N, class A>
__device__ __forceinline__ void load_vector(const CodeVectors& vectors, int64_t row, int column, A (&out)[N]) {
  with_type<N>(vectors.element, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(vectors.data) + row * vectors.dim;
    load_chunk(from, column, int(vectors.dim), out);
  });
}

template <int N, class A>
__device__ __forceinline__ void store_vector(const A (&values)[N], Element element, void* out, int64_t row, int64_t dim,
                                             int column) {
  with_type<N>(element, [&](auto type) {
    store_chunk(values, static_cast<decltype(type)*>(out) + row * dim, column, int(dim));
  });
}

// A thread's position: some lanes of a warp, or all, share a row.
template <int N>
using VectorPlace = TeamPlace<N, false>;

// Over the lanes that share a row; called by every thread of the warp.
template <int N, class A>
__device__ __forceinline__ A sum_of_row(const VectorPlace<N>& place, A value) {
  return over_lanes(value, place.lanes, [](A a, A b) { return a + b; });
}

// launch_for(A, N): N columns of the widest element are 16 bytes.
template <class Launch>
void with_columns(bool is_double, int64_t widest_bytes, Launch launch_for) {
  if (is_double) return launch_for(double(), std::integral_constant<int, 2>());
  if (widest_bytes == 4) return launch_for(float(), std::integral_constant<int, 4>());
  return launch_for(float(), std::integral_constant<int, 8>());
}

// Launches one team per row, at most a warp.
template <class Arguments>
void launch_over_rows(const char* name, void (*kernel)(Arguments, int), int64_t rows, int64_t dim, int columns,
                      const Arguments& arguments, void* stream) {
  check_dim(dim);
  const int team = power_of_2(std::min<int64_t>(ceil_div(dim, columns), kWarpSize));
  launch(name, kernel, shape_of_teams(rows, team, kVectorThreads, 1, 0), stream, arguments, team);
}

}  // namespace sslkernels
