// The kernels around the code search: the factors of its products, the gather of codes by index, and the gradient of
// distances. A team of lanes has a row. Element types are runtime arguments, except the accumulation type: otherwise
// there would be sixteen kernels of each.
#include <algorithm>
#include <type_traits>

#include "latent/code_vectors_cuda.h"
#include "latent/vector_quantize.h"

namespace sslkernels {
namespace {

template <class A, int N>
__global__ void __launch_bounds__(kVectorThreads, sizeof(A) == 8 ? 2 : 4)
    code_tile_kernel(const __grid_constant__ CodeTile tile, int team) {
  const int dim = int(tile.source.dim);
  const VectorPlace<N> place(tile.source.rows, dim, team);
  [[maybe_unused]] A* out = static_cast<A*>(tile.tile);
  double sum = 0;
  for (int chunk = place.lane; chunk < place.chunks; chunk += place.step) {
    const int column = chunk * N;
    A x[N];
    load_vector(tile.source, place.row, column, x);
    if constexpr (N * sizeof(A) <= 16) {  // otherwise only the norm is wanted
      if (tile.center != nullptr) {
        A center[N];
        load_chunk(static_cast<const A*>(tile.center), column, dim, center);
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] -= center[k];
      }
      if (out != nullptr) store_chunk(x, out + place.row * dim, column, dim);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sum += double(x[k]) * double(x[k]);
  }
  sum = sum_of_row(place, sum);
  if (!place.first()) return;
  A norm = rounded_up_norm<A>(sum);
  if (tile.gain != nullptr) static_cast<A*>(tile.gain)[place.row] = gain_of<A>(sum, &norm);
  if (tile.half_square != nullptr) static_cast<A*>(tile.half_square)[place.row] = A(sum / 2);
  static_cast<A*>(tile.norm)[place.row] = norm;
}

template <class A, int N>
__global__ void __launch_bounds__(kVectorThreads, sizeof(A) == 8 ? 2 : 4)
    gather_codes_kernel(const __grid_constant__ CodeGather gather, int team) {
  const int dim = int(gather.input.dim);
  const VectorPlace<N> place(gather.input.rows, dim, team);
  const int64_t code = place.in_range ? gather.index[place.row] : 0;
  const double score = place.in_range ? gather.score[place.row] : 0;
  A sum = 0;
  for (int chunk = place.lane; chunk < place.chunks; chunk += place.step) {
    const int column = chunk * N;
    A x[N], values[N];
    load_vector(gather.codebook, code, column, values);
    load_vector(gather.input, place.row, column, x);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sum += (x[k] - values[k]) * (x[k] - values[k]);
      values[k] = score == score ? values[k] : A(NAN);
    }
    store_vector(values, gather.input.element, gather.values, place.row, dim, column);
  }
  sum = sum_of_row(place, sum);
  if (place.first()) static_cast<A*>(gather.distance)[place.row] = score == score ? sum : A(NAN);
}

template <class A, int N>
__global__ void __launch_bounds__(kVectorThreads, sizeof(A) == 8 ? 2 : 4)
    code_difference_kernel(const __grid_constant__ CodeDifference difference, int team) {
  const int dim = int(difference.input.dim);
  const VectorPlace<N> place(difference.input.rows, dim, team);
  if (!place.in_range) return;
  const int64_t code = difference.index[place.row];
  const A coefficient = *static_cast<const A*>(difference.coefficient);
  for (int chunk = place.lane; chunk < place.chunks; chunk += place.step) {
    const int column = chunk * N;
    A x[N], values[N];
    load_vector(difference.codebook, code, column, values);
    load_vector(difference.input, place.row, column, x);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = coefficient * (x[k] - values[k]);
    store_vector(values, difference.out_element, difference.out, place.row, dim, column);
  }
}

int64_t widest(Element a, Element b) { return std::max(bytes_of(a), bytes_of(b)); }

}  // namespace

void launch_code_tile(const CodeTile& tile, void* stream) {
  if (tile.unit) fail("the CUDA kernels have no unit tiles");
  const bool makes = tile.tile != nullptr || tile.center != nullptr;
  const int64_t bytes = makes ? widest(tile.source.element, Element::kFloat) : bytes_of(tile.source.element);
  with_columns(tile.is_double, bytes, [&](auto type, auto columns) {
    launch_over_rows("code_tile_kernel", code_tile_kernel<decltype(type), columns>, tile.source.rows, tile.source.dim,
                     columns, tile, stream);
  });
}

void launch_gather_codes(const CodeGather& gather, void* stream) {
  const int64_t bytes = widest(gather.input.element, gather.codebook.element);
  with_columns(gather.is_double, bytes, [&](auto type, auto columns) {
    launch_over_rows("gather_codes_kernel", gather_codes_kernel<decltype(type), columns>, gather.input.rows,
                     gather.input.dim, columns, gather, stream);
  });
}

void launch_code_difference(const CodeDifference& difference, void* stream) {
  const int64_t bytes =
      std::max(widest(difference.input.element, difference.codebook.element), bytes_of(difference.out_element));
  with_columns(difference.is_double, bytes, [&](auto type, auto columns) {
    launch_over_rows("code_difference_kernel", code_difference_kernel<decltype(type), columns>, difference.input.rows,
                     difference.input.dim, columns, difference, stream);
  });
}

}  // namespace sslkernels
