// Groups of four columns, one per thread: their address, their Philox number, and access by 16 bytes if the memory is
// aligned.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/cuda/launch.h"
#include "random/noise.h"
#include "random/philox.h"
#include "random/random_stream.h"

namespace sslkernels {
namespace {

constexpr int kGroup = 4;      // columns of a group
constexpr int kThreads = 256;  // per block, at most
template <class T>
constexpr int kEach = int(sizeof(Words) / sizeof(T));  // elements per 16-byte access

struct ColumnGroup {
  int64_t offset;   // offset of its first column in the tensors
  int count;        // columns: kGroup, fewer at the end of a row, 0 beyond
  uint64_t number;  // for Philox
};

SSLKERNELS_HD int64_t groups_of_row(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

template <class Arguments>
__device__ __forceinline__ ColumnGroup group_of_row(const Arguments& arguments, int64_t row, int64_t group) {
  const int64_t columns = arguments.columns, left = columns - kGroup * group;
  const int64_t row_id = arguments.row_ids == nullptr ? row : arguments.row_ids[row];
  return {row * columns + kGroup * group,
          left >= kGroup ? kGroup
          : left > 0     ? int(left)
                         : 0,
          uint64_t(row_id) * uint64_t(groups_of_row(columns)) + uint64_t(group)};
}

// Group `index` of all rows, numbered through.
template <class Arguments>
__device__ __forceinline__ ColumnGroup group_of_all(const Arguments& arguments, int64_t index) {
  const int64_t groups = groups_of_row(arguments.columns);
  if (index >= arguments.rows * groups) return {0, 0, 0};
  if (arguments.columns % kGroup == 0 && arguments.row_ids == nullptr) return {kGroup * index, kGroup, uint64_t(index)};
  const bool narrow = ((index | groups) >> 32) == 0;
  const int64_t row = narrow ? int64_t(uint32_t(index) / uint32_t(groups)) : index / groups;
  return group_of_row(arguments, row, index - row * groups);
}

__device__ __forceinline__ int64_t thread_of_grid() {
  return int64_t(blockIdx.x) * int64_t(blockDim.x) + int64_t(threadIdx.x);
}

__device__ __forceinline__ void draw_words(uint64_t seed, uint64_t group, uint64_t draw, uint32_t (&out)[kGroup]) {
  const PhiloxWords words = philox_words(seed, group, draw);
  out[0] = words.w0;
  out[1] = words.w1;
  out[2] = words.w2;
  out[3] = words.w3;
}

// Whether N elements at `pointer` can be accessed by 16 bytes.
template <int N, class T>
__device__ __forceinline__ bool in_words(const T* pointer) {
  return N * sizeof(T) % sizeof(Words) == 0 && reinterpret_cast<uint64_t>(pointer) % sizeof(Words) == 0;
}

// Loads the first `count` of N elements and pads with zeros.
template <int N, class T>
__device__ __forceinline__ void load_group(const T* from, int count, T (&out)[N]) {
  if (count == N && in_words<N>(from)) {
#pragma unroll
    for (int w = 0; w < int(sizeof(out) / sizeof(Words)); ++w) {
      const Words words = load_words_last(from + w * kEach<T>);
      std::memcpy(out + w * kEach<T>, &words, sizeof(words));
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = k < count ? from[k] : T(0);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_group(const T (&values)[N], int count, T* to) {
  if (count == N && in_words<N>(to)) {
#pragma unroll
    for (int w = 0; w < int(sizeof(values) / sizeof(Words)); ++w) {
      Words words;
      std::memcpy(&words, values + w * kEach<T>, sizeof(words));
      store_words(to + w * kEach<T>, words);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < count) to[k] = values[k];
    }
  }
}

// The four numbers of a group, for every stream except kBits.
template <Stream kStream>
__device__ __forceinline__ void draw_values(uint64_t seed, uint64_t group, uint64_t draw, float (&out)[kGroup]) {
  uint32_t words[kGroup];
  draw_words(seed, group, draw, words);
  if constexpr (kStream == Stream::kNormal) {
    normals_of_words(words[0], words[1], &out[0], &out[1]);
    normals_of_words(words[2], words[3], &out[2], &out[3]);
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      out[k] = kStream == Stream::kUniform       ? unit_interval(words[k])
               : kStream == Stream::kExponential ? exponential_of_word(words[k])
                                                 : gumbel_of_word(words[k]);
    }
  }
}

inline int whole_warps(int64_t threads) { return int(ceil_div(threads, kWarpSize) * kWarpSize); }

// One thread per `each` groups of all rows.
inline LaunchShape shape_of_groups(int64_t rows, int64_t columns, int each = 1) {
  const int64_t wanted = ceil_div(rows * groups_of_row(columns), each);
  const int threads = whole_warps(std::clamp<int64_t>(wanted, 1, kThreads));
  return {ceil_div(wanted, threads), threads, 0, 1};
}

}  // namespace
}  // namespace sslkernels
