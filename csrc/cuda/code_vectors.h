// Rows of vectors whose element is an argument of the launch: N neighbouring columns at a time, as numbers of type A.
#pragma once

#include "../common/vector_quantize.h"
#include "columns.h"
#include "packed_columns.h"

namespace sslkernels {

constexpr int kVectorThreads = 256;

// The words of N elements; by 16 bytes at most.
template <int N, class T>
struct Chunk {
  static constexpr int kBytes = N * int(sizeof(T)), kPiece = kBytes < 16 ? kBytes : 16;
  using Piece = Together<uint32_t, kPiece / 4>;
  Piece pieces[kBytes / kPiece];

  __device__ __forceinline__ uint32_t& word(int w) { return pieces[w / (kPiece / 4)].at[w % (kPiece / 4)]; }
  static __device__ __forceinline__ bool fits(const T* row, int column, int dim) {
    return column + N <= dim && reinterpret_cast<uint64_t>(row + column) % kPiece == 0;
  }
};

// Zeros beyond the end of the row.
template <int N, class T, class A>
__device__ __forceinline__ void load_chunk(const T* row, int column, int dim, A (&out)[N]) {
  using Words = Chunk<N, T>;
  if (!Words::fits(row, column, dim)) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = column + k < dim ? A(to_float(row[column + k])) : A(0);
    return;
  }
  Words chunk = *reinterpret_cast<const Words*>(row + column);
#pragma unroll
  for (int w = 0; w < Words::kBytes / 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      float low, high;
      unpack(chunk.word(w), T{}, low, high);
      out[2 * w] = low;
      out[2 * w + 1] = high;
    } else if constexpr (sizeof(T) == 4) {
      out[w] = bit_cast<float>(chunk.word(w));
    } else if (w % 2 == 0) {
      out[w / 2] = A(bit_cast<double>(uint64_t(chunk.word(w)) | uint64_t(chunk.word(w + 1)) << 32));
    }
  }
}

template <int N, class T, class A>
__device__ __forceinline__ void store_chunk(const A (&values)[N], T* row, int column, int dim) {
  using Words = Chunk<N, T>;
  if (!Words::fits(row, column, dim)) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (column + k < dim) from_float(values[k], row + column + k);
    }
    return;
  }
  Words chunk;
#pragma unroll
  for (int w = 0; w < Words::kBytes / 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      chunk.word(w) = pack(float(values[2 * w]), float(values[2 * w + 1]), T{});
    } else if constexpr (sizeof(T) == 4) {
      chunk.word(w) = bit_cast<uint32_t>(float(values[w]));
    } else {
      chunk.word(w) = uint32_t(bit_cast<uint64_t>(double(values[w / 2])) >> (w % 2 * 32));
    }
  }
  *reinterpret_cast<Words*>(row + column) = chunk;
}

// visit(row) with a pointer to elements of that type. float does not meet double: see is_double of the arguments.
template <class A, class Visit>
__device__ __forceinline__ void with_row(Element element, const void* data, int64_t at, Visit visit) {
  switch (element) {
    case Element::kFloat:
      return visit(static_cast<const float*>(data) + at);
    case Element::kDouble:
      if constexpr (sizeof(A) == sizeof(double)) visit(static_cast<const double*>(data) + at);
      return;
    case Element::kBFloat16:
      return visit(static_cast<const BFloat16*>(data) + at);
    case Element::kHalf:
      return visit(static_cast<const Half*>(data) + at);
  }
}

template <int N, class A>
__device__ __forceinline__ void load_vector(const CodeVectors& vectors, int64_t row, int column, A (&out)[N]) {
  const int dim = int(vectors.dim);
  with_row<A>(vectors.element, vectors.data, row * vectors.dim,
              [&](const auto* from) { load_chunk(from, column, dim, out); });
}

template <int N, class A>
__device__ __forceinline__ void store_vector(const A (&values)[N], Element element, void* out, int64_t row, int64_t dim,
                                             int column) {
  with_row<A>(element, out, row * dim, [&](const auto* to) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
    store_chunk(values, const_cast<T*>(to), column, int(dim));
  });
}

// The row of a thread, which a team of lanes of a warp shares, N columns each at a time.
template <int N>
struct VectorPlace {
  int64_t row;
  int column;  // the first
  int step;    // to the next
  int team;

  explicit __device__ __forceinline__ VectorPlace(int team)
      : row(int64_t(blockIdx.x) * (int(blockDim.x) / team) + int(threadIdx.x) / team),
        column(int(threadIdx.x) % team * N),
        step(team * N),
        team(team) {}

  // Over the team, by every thread of the warp.
  template <class A>
  __device__ __forceinline__ A sum(A value) const {
    for (int away = team / 2; away > 0; away /= 2) value += shuffle_xor(value, away);
    return value;
  }
};

// launch_for(A, N): N columns of the widest element are 16 bytes.
template <class Launch>
void with_columns(bool is_double, int64_t widest_bytes, Launch launch_for) {
  if (is_double) return launch_for(double(), std::integral_constant<int, 2>());
  if (widest_bytes == 4) return launch_for(float(), std::integral_constant<int, 4>());
  return launch_for(float(), std::integral_constant<int, 8>());
}

// launch of a team a row.
template <class Arguments>
void launch_over_rows(const char* name, void (*kernel)(Arguments, int), int64_t rows, int64_t dim, int columns,
                      const Arguments& arguments, void* stream) {
  check_dim(dim);
  int team = 1;
  while (team < kWarpSize && team * columns < dim) team *= 2;
  const LaunchShape shape{ceil_div(rows, kVectorThreads / team), kVectorThreads, 0, 1};
  launch(name, kernel, shape, stream, arguments, team);
}

}  // namespace sslkernels
