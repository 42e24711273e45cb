// The work, entries and ends of rows, is cut into chunks of one size, so that neither a row with many entries nor many
// empty rows fall to one warp (merge-based SpMV, Merrill and Garland 2016). A chunk writes the rows that are entirely
// within it, zeros for empty ones. Its share of a row that continues in another chunk is a partial sum; a second kernel
// adds these in the order of the chunks. The sums depend on the entries alone.
#include "core/cuda/columns.h"
#include "core/cuda/launch.h"
#include "core/segment_sums.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunk = 64;  // entries and ends of rows

template <class Out>
constexpr int kColumns = Groups<Out>::kSize;  // per lane
template <class Out>
constexpr int kTile = kWarpSize * kColumns<Out>;  // per warp

// A chunk covers the work from `entry` of `row` to before `last_entry` of `last_row`; rows - 1 is the last row of all.
struct Chunk {
  int64_t row, entry, last_row, last_entry;
  bool continued;  // `row` begins in an earlier chunk
  bool continues;  // `last_row` begins here or earlier and ends in a later chunk

  __device__ __forceinline__ Chunk(const WeightedRowSums& sums, int64_t chunk) {
    const int64_t total = sums.starts[sums.rows] + sums.rows;
    const int64_t begin = chunk * kChunk < total ? chunk * kChunk : total;
    const int64_t end = begin + kChunk < total ? begin + kChunk : total;
    row = rows_before(sums, begin);
    entry = begin - row;
    last_row = rows_before(sums, end);
    last_entry = end - last_row;
    continued = row < sums.rows && entry > sums.starts[row];
    continues = last_row < sums.rows && last_entry > sums.starts[last_row] && end > begin;
  }
  __device__ __forceinline__ bool begins_last_row() const { return last_row != row || !continued; }
};

// Partial sums per chunk: its share of the row that it continues, and of the row that it begins and later chunks
// continue.
template <class A>
__device__ __forceinline__ A* partial(void* partials, int64_t chunk, bool begun, int64_t dim) {
  return static_cast<A*>(partials) + (2 * chunk + begun) * dim;
}

// Grid: one warp per chunk and tile of columns.
template <class Source, class Out>
__global__ void __launch_bounds__(kThreads, sizeof(Out) == 8 ? 2 : 4)
    weighted_row_sums_kernel(const __grid_constant__ WeightedRowSums sums, void* partials, int64_t chunks, int tiles) {
  using A = typename Accumulation<Out>::type;
  constexpr int N = kColumns<Out>;
  constexpr int kAtOnce = N == 8 ? 2 : 4;  // rows in flight
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / kWarpSize;
  const int64_t at = unit / tiles, dim = sums.dim;
  const int column = int(unit % tiles) * kTile<Out> + lane * N;
  if (at >= chunks) return;
  const Chunk chunk(sums, at);
  const Source* source = static_cast<const Source*>(sums.source);

  A sum[N] = {};
  int64_t row = chunk.row;
  const auto end_row = [&] {
    if (row == chunk.row && chunk.continued) {
      store_columns(sum, partial<A>(partials, at, false, dim), column, int(dim));
    } else {
      store_columns(sum, static_cast<Out*>(sums.out) + row * dim, column, int(dim));
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = 0;
    ++row;
  };
  for (int64_t first = chunk.entry; first < chunk.last_entry; first += kWarpSize) {
    const int count = chunk.last_entry - first < kWarpSize ? int(chunk.last_entry - first) : kWarpSize;
    int64_t own_row = 0;
    A own_weight = 0;
    if (lane < count) {
      const int64_t entry = sums.order[first + lane];
      own_row = source_row(sums, entry);
      own_weight = static_cast<const A*>(sums.coefficient)[entry];
      if (!in_range(own_row, sums.source_rows)) {
        own_row = 0;
        own_weight = A(NAN);
      }
    }
    int64_t row_end = row < sums.rows ? sums.starts[row + 1] : 0;
    for (int t = 0; t < count; t += kAtOnce) {
      A values[kAtOnce][N];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t from = shuffle(own_row, t + j < count ? t + j : t);
        load_columns(source + from * dim, column, int(dim), values[j]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (t + j >= count) break;
        while (row_end <= first + t + j) {
          end_row();
          row_end = sums.starts[row + 1];
        }
        const A weight = shuffle(own_weight, t + j);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += weight * values[j][k];
      }
    }
  }
  while (row < chunk.last_row) end_row();
  if (chunk.continues) store_columns(sum, partial<A>(partials, at, chunk.begins_last_row(), dim), column, int(dim));
}

// Grid: one block per chunk and tile of columns, for the row that begins in the chunk and ends in a later one.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    weighted_row_sums_finish_kernel(const __grid_constant__ WeightedRowSums sums, void* partials, int tiles) {
  using A = typename Accumulation<Out>::type;
  constexpr int N = kColumns<Out>;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int64_t at = int64_t(blockIdx.x) / tiles, dim = sums.dim;
  const int column = int(blockIdx.x) % tiles * kTile<Out> + lane * N;
  const Chunk chunk(sums, at);
  if (!chunk.continues || !chunk.begins_last_row()) return;
  const int64_t row = chunk.last_row, last = (sums.starts[row + 1] + row) / kChunk;

  A sum[N] = {};
  if (warp == 0) load_columns(partial<A>(partials, at, true, dim), column, int(dim), sum);
#pragma unroll 4
  for (int64_t other = at + 1 + warp; other <= last; other += kWarps) {
    A part[N];
    load_columns(partial<A>(partials, other, false, dim), column, int(dim), part);
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += part[k];
  }
  A* warp_sums = reinterpret_cast<A*>(shared_memory());  // (kWarps, N, kWarpSize)
#pragma unroll
  for (int k = 0; k < N; ++k) warp_sums[(warp * N + k) * kWarpSize + lane] = sum[k];
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < kWarps; ++w) {
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += warp_sums[(w * N + k) * kWarpSize + lane];
  }
  store_columns(sum, static_cast<Out*>(sums.out) + row * dim, column, int(dim));
}

int64_t chunks_of(const WeightedRowSums& sums) { return ceil_div(sums.entries + sums.rows, kChunk); }

template <class Source, class Out>
void launch_pair(const WeightedRowSums& sums, void* partials, void* stream) {
  using A = typename Accumulation<Out>::type;
  const int64_t chunks = chunks_of(sums), tiles = ceil_div(sums.dim, kTile<Out>);
  const LaunchShape shape{ceil_div(chunks * tiles, kWarps), kThreads, 0, 1};
  launch("weighted_row_sums_kernel", weighted_row_sums_kernel<Source, Out>, shape, stream, sums, partials, chunks,
         int(tiles));
  const LaunchShape finish{chunks * tiles, kThreads, kWarps * kTile<Out> * int64_t(sizeof(A)), 1};
  launch("weighted_row_sums_finish_kernel", weighted_row_sums_finish_kernel<Out>, finish, stream, sums, partials,
         int(tiles));
}

template <class Out>
void launch_for(const WeightedRowSums& sums, void* partials, void* stream) {
  using A = typename Accumulation<Out>::type;
  return sums.source_element == sums.out_element ? launch_pair<Out, Out>(sums, partials, stream)
                                                 : launch_pair<A, Out>(sums, partials, stream);
}

}  // namespace

int64_t row_sums_partials(const WeightedRowSums& sums) { return 2 * chunks_of(sums) * sums.dim; }

void launch_weighted_row_sums(const WeightedRowSums& sums, void* partials, void* stream) {
  check_dim(sums.dim);
  with_element(sums.out_element, [&](auto zero) { launch_for<decltype(zero)>(sums, partials, stream); });
}

}  // namespace sslkernels
