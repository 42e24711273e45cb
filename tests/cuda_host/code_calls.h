// Calls of the vector_quantize kernels.
#pragma once

#include <cmath>
#include <cstring>

#include "fields.h"
#include "latent/code_search.h"
#include "latent/vector_quantize.h"
#include "protocol.h"

namespace cuda_host {

inline sslkernels::CodeVectors vectors_of(const Call& call, const std::string& key) {
  return {static_cast<sslkernels::Element>(call.integer(key + "_element")), call.array(key),
          call.integer(key + "_rows"), call.integer("dim")};
}

inline double element_at(const sslkernels::CodeVectors& vectors, int64_t at) {
  using sslkernels::to_float;
  switch (vectors.element) {
    case sslkernels::Element::kFloat:
      return static_cast<const float*>(vectors.data)[at];
    case sslkernels::Element::kDouble:
      return static_cast<const double*>(vectors.data)[at];
    case sslkernels::Element::kBFloat16:
      return to_float(static_cast<const sslkernels::BFloat16*>(vectors.data)[at]);
    default:
      return to_float(static_cast<const sslkernels::Half*>(vectors.data)[at]);
  }
}

// A Device whose products are wrong by up to `error` times the norms of their factors, with random sign.
struct CodeSearchOnHost {
  static constexpr bool kGain = true;
  static constexpr int64_t kPitch = 4;
  double error;
  std::vector<Array> buffers;

  template <class A>
  A* buffer(int64_t count) {
    if (count == 0) return nullptr;
    buffers.emplace_back(count * sizeof(A));
    std::memset(buffers.back().data(), 0xff, buffers.back().bytes());
    return buffers.back().as<A>();
  }
  template <class A>
  A* products(int64_t, int64_t count) {
    return buffer<A>(count);
  }
  void code_tile(const sslkernels::CodeTile& tile) { sslkernels::launch_code_tile(tile, nullptr); }
  void best_codes(const sslkernels::CodeScores& scores) { sslkernels::launch_best_codes(scores, nullptr); }
  template <class A>
  void multiply(const sslkernels::CodeVectors& a, const sslkernels::CodeVectors& b, A* products, int64_t pitch) {
    uint32_t random = 1;
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int64_t j = 0; j < b.rows; ++j) {
        double sum = 0, square_a = 0, square_b = 0;
        for (int64_t d = 0; d < a.dim; ++d) {
          const double x = element_at(a, i * a.dim + d), y = element_at(b, j * a.dim + d);
          sum += x * y;
          square_a += x * x;
          square_b += y * y;
        }
        random = random * 1664525u + 1013904223u;
        const double most = error * std::sqrt(square_a) * std::sqrt(square_b);
        products[i * pitch + j] = A(sum + (random >> 31 ? most : -most));
      }
    }
  }
};

struct CodeSearchCall : sslkernels::CodeSearch {
  explicit CodeSearchCall(const Call& call) : CodeSearch{} {
    input = vectors_of(call, "input");
    codebook = vectors_of(call, "codebook");
    FIELDS(call, metric, matmul_rounding, center, as_given, tile_rows, tile_codes, index, score);
  }
};

struct CodeGatherCall : sslkernels::CodeGather {
  explicit CodeGatherCall(const Call& call) : CodeGather{} {
    input = vectors_of(call, "input");
    codebook = vectors_of(call, "codebook");
    FIELDS(call, index, score, values, distance, is_double);
  }
};

struct CodeDifferenceCall : sslkernels::CodeDifference {
  explicit CodeDifferenceCall(const Call& call) : CodeDifference{} {
    input = vectors_of(call, "input");
    codebook = vectors_of(call, "codebook");
    FIELDS(call, index, coefficient, out_element, out, is_double);
  }
};

inline void search_codes(const Call& call) {
  const CodeSearchCall search(call);
  CodeSearchOnHost host{call.real("error"), {}};
  if (call.integer("is_double") != 0) {
    sslkernels::search_in_tiles<double>(search, 0, search.input.rows, host);
  } else {
    sslkernels::search_in_tiles<float>(search, 0, search.input.rows, host);
  }
}

}  // namespace cuda_host
