// The search of the best codes over tiles of rows and codes: one walk for every device, which multiplies and compares.
#pragma once

#include <algorithm>

#include "latent/vector_quantize.h"

namespace sslkernels {

struct CodeSearch {
  CodeVectors input;
  CodeVectors codebook;
  CodeMetric metric;
  double matmul_rounding;
  const void* center;
  bool as_given;  // input and codebook, of one half-precision type, are multiplied without conversion
  int64_t tile_rows;
  int64_t tile_codes;
  int64_t* index;
  double* score;
};

inline CodeVectors rows_of(const CodeVectors& vectors, int64_t first, int64_t last) {
  const char* data = static_cast<const char*>(vectors.data) + first * vectors.dim * bytes_of(vectors.element);
  return {vectors.element, data, last - first, vectors.dim};
}

// Searches for the rows [begin, end). A Device has `A* buffer(count)`, memory that lives until the end of the search,
// null for 0; `A* products(dim, count)`, the buffer of the products or null; the kernels `code_tile` and `best_codes`;
// `multiply(a, b, products, pitch)` with products (a.rows, b.rows) in A; kGain, whether a cosine is a gain instead of a
// division of the codes; and kPitch: the pitch of the products and the capacity of per-code arrays are multiples of it.
template <class A, class Device>
void search_in_tiles(const CodeSearch& search, int64_t begin, int64_t end, Device& device) {
  if (begin >= end) return;
  const bool is_double = sizeof(A) == sizeof(double), cosine = search.metric == CodeMetric::kCosine;
  const bool unit = cosine && !Device::kGain, gain = cosine && Device::kGain;
  const Element element = is_double ? Element::kDouble : Element::kFloat;
  const auto is_factor = [&](const CodeVectors& vectors) {
    return search.as_given || (vectors.element == element && search.center == nullptr);
  };
  const int64_t dim = search.input.dim, tile_rows = std::min(search.tile_rows, end - begin);
  const int64_t tile_codes = std::min(search.tile_codes, search.codebook.rows);
  const auto pitch_of = [](int64_t codes) { return (codes + Device::kPitch - 1) / Device::kPitch * Device::kPitch; };
  const auto buffer = [&](int64_t count) { return device.template buffer<A>(count); };
  const int64_t room = pitch_of(tile_codes);
  A* products = device.template products<A>(dim, tile_rows * room);
  A* bound = buffer(end - begin);
  A* row_tile = buffer(is_factor(search.input) ? 0 : tile_rows * dim);
  A* row_norm = buffer(tile_rows);
  A* code_tile = buffer(is_factor(search.codebook) && !unit ? 0 : tile_codes * dim);
  A* code_norm = buffer(room);
  A* half_square = buffer(search.metric == CodeMetric::kSquaredDistance ? room : 0);
  A* code_gain = buffer(gain ? room : 0);
  const auto factor = [&](const CodeTile& made) {
    return made.tile == nullptr ? made.source : CodeVectors{element, made.tile, made.source.rows, dim};
  };

  for (int64_t first = 0; first < search.codebook.rows; first += tile_codes) {
    const CodeVectors codes = rows_of(search.codebook, first, std::min(first + tile_codes, search.codebook.rows));
    const CodeTile of_codes{codes, is_double, search.center, unit, code_tile, code_norm, half_square, code_gain};
    device.code_tile(of_codes);
    for (int64_t row = begin; row < end; row += tile_rows) {
      const CodeVectors rows = rows_of(search.input, row, std::min(row + tile_rows, end));
      const CodeTile of_rows{rows, is_double, search.center, false, row_tile, row_norm, nullptr, nullptr};
      const int64_t pitch = pitch_of(codes.rows);
      device.code_tile(of_rows);
      device.multiply(factor(of_rows), factor(of_codes), products, pitch);
      device.best_codes({is_double, search.metric, search.matmul_rounding, rows, search.codebook, first, codes.rows,
                         products, pitch, row_norm, code_norm, half_square, code_gain, bound + (row - begin),
                         search.score + row, search.index + row});
    }
  }
}

}  // namespace sslkernels
