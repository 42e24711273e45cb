// A row of a tensor as aligned 16-byte words, and their conversion to numbers.
#pragma once

#include "core/cuda/device.h"

namespace sslkernels {

// Columns [begin, end) of a row that starts at `row`, in groups of one 16-byte word. Group g begins at column(g); the
// first and the last group may be partial: a row with any alignment is accessed by whole aligned words except at its
// ends. Columns are 32-bit, row offsets are 64-bit.
template <class T>
struct Groups {
  static constexpr int kSize = 16 / int(sizeof(T));

  int begin;
  int end;
  int first;  // column of group 0, at most begin; its address is a multiple of 16
  int count;

  __device__ __forceinline__ Groups(const T* row, int begin, int end) : begin(begin), end(end) {
    first = begin - int(reinterpret_cast<uint64_t>(row + begin) % 16 / sizeof(T));
    count = begin < end ? (end - first + kSize - 1) / kSize : 0;
  }
  __device__ __forceinline__ int column(int group) const { return first + group * kSize; }
  __device__ __forceinline__ bool whole(int group) const {
    return column(group) >= begin && column(group) + kSize <= end;
  }
  __device__ __forceinline__ bool contains(int column) const { return column >= begin && column < end; }
};

// The share of part `rank` of `size`, split between groups.
template <class T>
__device__ __forceinline__ Groups<T> part_of_row(const T* row, int columns, int rank, int size) {
  const Groups<T> all(row, 0, columns);
  const int share = (all.count + size - 1) / size;
  const int64_t begin = int64_t(all.first) + int64_t(rank) * share * Groups<T>::kSize;
  const int64_t end = begin + int64_t(share) * Groups<T>::kSize;
  const auto clamp = [=](int64_t column) { return int(column < 0 ? 0 : column > columns ? columns : column); };
  return Groups<T>(row, clamp(begin), clamp(end));
}

template <class T, class A>
__device__ __forceinline__ void unpack_group(const Words& words, A (&out)[Groups<T>::kSize]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      unpack(words.at[w], T{}, out[2 * w], out[2 * w + 1]);
    } else if constexpr (sizeof(T) == 4) {
      out[w] = bit_cast<float>(words.at[w]);
    } else if (w % 2 == 0) {
      out[w / 2] = bit_cast<double>(uint64_t(words.at[w]) | uint64_t(words.at[w + 1]) << 32);
    }
  }
}

template <class T, class A>
__device__ __forceinline__ Words pack_group(const A (&values)[Groups<T>::kSize]) {
  Words words;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      words.at[w] = pack(values[2 * w], values[2 * w + 1], T{});
    } else if constexpr (sizeof(T) == 4) {
      words.at[w] = bit_cast<uint32_t>(values[w]);
    } else {
      words.at[w] = uint32_t(bit_cast<uint64_t>(values[w / 2]) >> (w % 2 * 32));
    }
  }
  return words;
}

// N elements from `from` on, by 16 bytes if aligned.
template <int N, class T, class A>
__device__ __forceinline__ void load_elements(const T* from, A (&out)[N]) {
  constexpr int kSize = Groups<T>::kSize;
  static_assert(N % kSize == 0, "load_elements: whole groups");
  if (reinterpret_cast<uint64_t>(from) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += kSize) {
      A part[kSize];
      unpack_group<T>(load_words_cached(from + k), part);
#pragma unroll
      for (int j = 0; j < kSize; ++j) out[k + j] = part[j];
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = to_float(from[k]);
  }
}

template <int N, class T, class A>
__device__ __forceinline__ void store_elements(const A (&values)[N], T* to) {
  constexpr int kSize = Groups<T>::kSize;
  static_assert(N % kSize == 0, "store_elements: whole groups");
  if (reinterpret_cast<uint64_t>(to) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += kSize) {
      A part[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) part[j] = values[k + j];
      store_words(to + k, pack_group<T>(part));
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) from_float(values[k], to + k);
  }
}

}  // namespace sslkernels
