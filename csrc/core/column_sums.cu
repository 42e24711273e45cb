// Column sums in a fixed order: each block sums a block of rows into a partial result, and a second kernel adds the
// partial results of a column. The matrix is read once.
#include <algorithm>

#include "core/column_sums.h"
#include "core/cuda/launch.h"
#include "core/cuda/words.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowsAtOnce = 4;  // per warp, in flight

template <class T>
constexpr int kTile = kWarpSize * Groups<T>::kSize;  // columns per block

// Grid: tiles of columns x blocks of rows. A warp takes every kWarps-th row of its block.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    column_sums_kernel(const __grid_constant__ ColumnSums sums, int tiles, int64_t rows_of_block) {
  using A = typename Accumulation<T>::type;
  constexpr int kSize = Groups<T>::kSize;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int64_t block = int64_t(blockIdx.x) / tiles;
  const int64_t first = int64_t(blockIdx.x) % tiles * kTile<T>;
  const int64_t column = first + lane * kSize;
  const int64_t begin = block * rows_of_block;
  const int64_t end = begin + rows_of_block < sums.rows ? begin + rows_of_block : sums.rows;
  const T* values = static_cast<const T*>(sums.values) + column;

  const bool aligned = reinterpret_cast<uint64_t>(values) % 16 == 0 && sums.stride % kSize == 0;

  A own[kSize] = {};
  if (aligned && column + kSize <= sums.columns) {
    for (int64_t row = begin + warp; row < end; row += kWarps * kRowsAtOnce) {
      Words words[kRowsAtOnce] = {};  // zeros beyond the last row
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (row + r * kWarps < end) words[r] = load_words_last(values + (row + r * kWarps) * sums.stride);
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        A part[kSize];
        unpack_group<T>(words[r], part);
#pragma unroll
        for (int k = 0; k < kSize; ++k) own[k] += part[k];
      }
    }
  } else {
    for (int64_t row = begin + warp; row < end; row += kWarps) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (column + k < sums.columns) own[k] += A(to_float(values[row * sums.stride + k]));
      }
    }
  }

  A* warp_sums = reinterpret_cast<A*>(shared_memory());  // (kWarps, kTile)
#pragma unroll
  for (int k = 0; k < kSize; ++k) warp_sums[(warp * kSize + k) * kWarpSize + lane] = own[k];
  __syncthreads();
  A* partial = static_cast<A*>(sums.partials) + block * sums.columns + first;
  for (int c = int(threadIdx.x); c < kTile<T> && first + c < sums.columns; c += kThreads) {
    A sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[(w * kSize + c % kSize) * kWarpSize + c / kSize];
    partial[c] = sum;
  }
}

// Grid: one thread per column.
template <class A>
__global__ void __launch_bounds__(kThreads)
    column_sums_finish_kernel(const __grid_constant__ ColumnSums sums, int64_t row_blocks) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= sums.columns) return;
  const A* partials = static_cast<const A*>(sums.partials) + column;
  A* total = static_cast<A*>(sums.total) + column;
  A sum = sums.add ? *total : A(0);
  for (int64_t block = 0; block < row_blocks; ++block) sum += partials[block * sums.columns];
  *total = sum;
}

template <class T>
void launch_for(const ColumnSums& sums, void* stream) {
  using A = typename Accumulation<T>::type;
  const int64_t tiles = ceil_div(sums.columns, kTile<T>), row_blocks = column_sums_row_blocks(sums);
  const LaunchShape partial{tiles * row_blocks, kThreads, kWarps * kTile<T> * int64_t(sizeof(A)), 1};
  launch("column_sums_kernel", column_sums_kernel<T>, partial, stream, sums, int(tiles),
         ceil_div(sums.rows, row_blocks));
  const LaunchShape finish{ceil_div(sums.columns, kThreads), kThreads, 0, 1};
  launch("column_sums_finish_kernel", column_sums_finish_kernel<A>, finish, stream, sums, row_blocks);
}

}  // namespace

// Enough blocks to fill the device several times, with at least 64 rows each.
int64_t column_sums_row_blocks(const ColumnSums& sums) {
  const int64_t tiles = ceil_div(sums.columns, kTile<BFloat16>);
  const int64_t wanted = ceil_div(16 * device_limits().processors, std::max<int64_t>(tiles, 1));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(sums.rows / 64, 1));
}

void launch_column_sums(const ColumnSums& sums, void* stream) {
  with_element(sums.element, [&](auto zero) { launch_for<decltype(zero)>(sums, stream); });
}

}  // namespace sslkernels
