// The calls of the kernels of vector_quantize.
#pragma once

#include <cmath>
#include <cstring>

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

// Searches with products that are wrong by `error` of the norms of their factors, one way or the other.
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

inline void search_codes(const Call& call) {
  const sslkernels::CodeSearch search{vectors_of(call, "input"),
                                      vectors_of(call, "codebook"),
                                      static_cast<sslkernels::CodeMetric>(call.integer("metric")),
                                      call.real("matmul_rounding"),
                                      call.array("center"),
                                      call.integer("as_given") != 0,
                                      call.integer("tile_rows"),
                                      call.integer("tile_codes"),
                                      call.array<int64_t>("index"),
                                      call.array<double>("score")};
  CodeSearchOnHost host{call.real("error"), {}};
  if (call.integer("is_double") != 0) {
    sslkernels::search_in_tiles<double>(search, 0, search.input.rows, host);
  } else {
    sslkernels::search_in_tiles<float>(search, 0, search.input.rows, host);
  }
}

inline void gather_codes(const Call& call) {
  sslkernels::launch_gather_codes(
      {vectors_of(call, "input"), vectors_of(call, "codebook"), call.array<int64_t>("index"),
       call.array<double>("score"), call.array("values"), call.array("distance"), call.integer("is_double") != 0},
      nullptr);
}

inline void code_difference(const Call& call) {
  sslkernels::launch_code_difference(
      {vectors_of(call, "input"), vectors_of(call, "codebook"), call.array<int64_t>("index"), call.array("coefficient"),
       static_cast<sslkernels::Element>(call.integer("out_element")), call.array("out"),
       call.integer("is_double") != 0},
      nullptr);
}

}  // namespace cuda_host
