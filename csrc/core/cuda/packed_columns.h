// Columns of one thread, kept packed as in memory and unpacked a part at a time to save registers.
#pragma once

#include <cstring>

#include "core/cuda/device.h"

namespace sslkernels {

// Calls visit(i) for `count` parts in turn so that they share registers: the loop is not unrolled, else the compiler
// would work on all parts at once.
template <class Visit>
__device__ __forceinline__ void for_each_part(int count, Visit visit) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) visit(i);
}

// Part `part` of N elements, W per part. Written with selects, because indexing by a runtime value would put the array
// in local memory.
template <class A, int N, int W>
__device__ __forceinline__ void get_part(const A (&from)[N], int part, A (&to)[W]) {
  static_assert(N % W == 0, "get_part: whole parts");
#pragma unroll
  for (int k = 0; k < W; ++k) {
    to[k] = from[k];
#pragma unroll
    for (int p = 1; p < N / W; ++p) to[k] = part == p ? from[p * W + k] : to[k];
  }
}

template <class A, int N, int W>
__device__ __forceinline__ void set_part(const A (&from)[W], int part, A (&to)[N]) {
  static_assert(N % W == 0, "set_part: whole parts");
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = N == W || k / W == part ? from[k % W] : to[k];
}

// N neighbouring columns of a row, padded with zeros beyond its end. Half precision takes half the registers of floats.
template <class T, int N>
struct PackedColumns {
  static constexpr int kWords = N * int(sizeof(T)) / int(sizeof(Words));
  static constexpr int kEach = int(sizeof(Words) / sizeof(T));
  Words words[kWords] = {};

  // For columns that are not read again.
  __device__ __forceinline__ void load(const T* row, int column, int columns) {
    const T* from = row + column;
    if (column + N <= columns && reinterpret_cast<uint64_t>(from) % sizeof(Words) == 0) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = load_words_last(from + w * kEach);
    } else {
      T values[N];
#pragma unroll
      for (int k = 0; k < N; ++k) values[k] = column + k < columns ? from[k] : T{};
      std::memcpy(words, values, sizeof(words));
    }
  }
  __device__ __forceinline__ void store(T* row, int column, int columns) const {
    T* to = row + column;
    if (column + N <= columns && reinterpret_cast<uint64_t>(to) % sizeof(Words) == 0) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) store_words(to + w * kEach, words[w]);
    } else {
      T values[N];
      std::memcpy(values, words, sizeof(words));
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (column + k < columns) to[k] = values[k];
      }
    }
  }
  // W columns, as in get_part and set_part.
  template <class A, int W>
  __device__ __forceinline__ void get(int part, A (&out)[W]) const {
    if constexpr (sizeof(T) == 2) {
      static_assert(N == 8 && W % 2 == 0, "get: whole words of four");
      uint32_t pairs[W / 2];
      get_part(words[0].at, part, pairs);
#pragma unroll
      for (int w = 0; w < W / 2; ++w) unpack(pairs[w], T{}, out[2 * w], out[2 * w + 1]);
    } else {
      A all[N];
      std::memcpy(all, words, sizeof(words));
      get_part(all, part, out);
    }
  }
  template <class A, int W>
  __device__ __forceinline__ void set(int part, const A (&values)[W]) {
    if constexpr (sizeof(T) == 2) {
      static_assert(N == 8 && W % 2 == 0, "set: whole words of four");
      uint32_t pairs[W / 2];
#pragma unroll
      for (int w = 0; w < W / 2; ++w) pairs[w] = pack(values[2 * w], values[2 * w + 1], T{});
      set_part(pairs, part, words[0].at);
    } else {
      A all[N];
      std::memcpy(all, words, sizeof(words));
      set_part(values, part, all);
      std::memcpy(words, all, sizeof(words));
    }
  }
  template <class A>
  __device__ __forceinline__ void set_all(const A (&values)[N]) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int w = 0; w < N / 2; ++w) words[0].at[w] = pack(values[2 * w], values[2 * w + 1], T{});
    } else {
      std::memcpy(words, values, sizeof(words));
    }
  }
};

// W neighbouring numbers of a row in one access if they are aligned, padded with zeros beyond its end.
template <class A, int W>
struct alignas(W * sizeof(A)) Together {
  A at[W];
};

template <class A, int W>
__device__ __forceinline__ void load_values(const A* row, int column, int columns, A (&out)[W]) {
  using All = Together<A, W>;
  const A* from = row + column;
  if (column + W <= columns && reinterpret_cast<uint64_t>(from) % sizeof(All) == 0) {
    const All all = *reinterpret_cast<const All*>(from);
#pragma unroll
    for (int k = 0; k < W; ++k) out[k] = all.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) out[k] = column + k < columns ? from[k] : A{};
  }
}

template <class A, int W>
__device__ __forceinline__ void store_values(const A (&values)[W], A* row, int column, int columns) {
  using All = Together<A, W>;
  A* to = row + column;
  if (column + W <= columns && reinterpret_cast<uint64_t>(to) % sizeof(All) == 0) {
    All all;
#pragma unroll
    for (int k = 0; k < W; ++k) all.at[k] = values[k];
    *reinterpret_cast<All*>(to) = all;
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (column + k < columns) to[k] = values[k];
    }
  }
}

}  // namespace sslkernels
