// From tensors to the arguments of the kernels of vector_quantize, as bind.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "bind.h"
#include "cpu/vector_quantize.h"

namespace sslkernels {

inline CodeVectors code_vectors(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), "sslkernels: ", name,
                  " must be contiguous, of 2 dimensions");
  return {element_of(tensor), tensor.const_data_ptr(), tensor.size(0), tensor.size(1)};
}

inline torch::headeronly::ScalarType type_of_products(const CodeVectors& input, const CodeVectors& codebook) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(input.dim == codebook.dim, "sslkernels: input and codebook must have the same dim");
  const bool is_double = input.element == Element::kDouble || codebook.element == Element::kDouble;
  return is_double ? ScalarType::Double : ScalarType::Float;
}

// out (rows, columns) = a (rows, dim) b (columns, dim)^T, by torch, which inside a parallel region uses one thread.
template <class A>
void multiply(const A* a, const A* b, int64_t rows, int64_t columns, int64_t dim, A* out) {
  using torch::headeronly::ScalarType;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const auto matrix = [&](const A* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) {
    const ScalarType type = sizeof(A) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
    return torch::stable::from_blob(const_cast<A*>(data), {sizes.data(), 2}, {strides.data(), 2}, cpu, type);
  };
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(matrix(a, {rows, dim}, {dim, 1})), from(matrix(b, {dim, columns}, {1, dim})),
                                    from(matrix(out, {rows, columns}, {columns, 1}))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // owns the result, which is `out`
}

// The search of some rows by one thread: tile by tile a matmul, then what best_codes makes of its products.
struct CodeSearch {
  CodeVectors input;
  CodeVectors codebook;
  CodeMetric metric;
  double matmul_rounding;
  const void* center;
  int64_t tile_rows;
  int64_t tile_codes;
  int64_t* index;
  double* score;

  static CodeVectors rows_of(const CodeVectors& vectors, int64_t first, int64_t last) {
    constexpr int64_t kSizes[] = {4, 8, 2, 2};
    const char* data = static_cast<const char*>(vectors.data) + first * vectors.dim * kSizes[int(vectors.element)];
    return {vectors.element, data, last - first, vectors.dim};
  }

  template <class A>
  void run(int64_t begin, int64_t end) const {
    const bool is_double = sizeof(A) == sizeof(double), unit = metric == CodeMetric::kCosine;
    const auto is_factor = [&](const CodeVectors& vectors) {
      return vectors.element == (is_double ? Element::kDouble : Element::kFloat) && center == nullptr;
    };
    const int64_t dim = input.dim, blocks = code_blocks(tile_codes);
    std::vector<A> products(tile_rows * tile_codes), bound(end - begin, -std::numeric_limits<A>::infinity());
    std::vector<A> row_tile(is_factor(input) ? 0 : tile_rows * dim), row_norm(tile_rows), block_norm(blocks);
    std::vector<A> code_tile(is_factor(codebook) && !unit ? 0 : tile_codes * dim), code_norm(tile_codes);
    std::vector<A> half_square(metric == CodeMetric::kSquaredDistance ? tile_codes : 0);
    std::vector<double> work(2 * dim + blocks);
    const auto null_if_empty = [](std::vector<A>& values) { return values.empty() ? nullptr : values.data(); };
    std::fill(index + begin, index + end, -1);
    std::fill(score + begin, score + end, -std::numeric_limits<double>::infinity());

    for (int64_t first = 0; first < codebook.rows; first += tile_codes) {
      const CodeVectors codes = rows_of(codebook, first, std::min(first + tile_codes, codebook.rows));
      const CodeTile factor{
          codes, is_double, center, unit, null_if_empty(code_tile), code_norm.data(), null_if_empty(half_square)};
      SSLKERNELS_CALL_ISA(code_tile, factor, 0, codes.rows);
      for (int64_t row = begin; row < end; row += tile_rows) {
        const CodeVectors rows = rows_of(input, row, std::min(row + tile_rows, end));
        const CodeTile other{rows, is_double, center, false, null_if_empty(row_tile), row_norm.data(), nullptr};
        SSLKERNELS_CALL_ISA(code_tile, other, 0, rows.rows);
        multiply(static_cast<const A*>(row_tile.empty() ? rows.data : row_tile.data()),
                 static_cast<const A*>(code_tile.empty() ? codes.data : code_tile.data()), rows.rows, codes.rows, dim,
                 products.data());
        const CodeScores scores{is_double,          metric,
                                matmul_rounding,    rows,
                                codebook,           first,
                                codes.rows,         products.data(),
                                row_norm.data(),    code_norm.data(),
                                factor.half_square, bound.data() + (row - begin),
                                score + row,        index + row};
        if (row == begin) SSLKERNELS_CALL_ISA(code_block_norms, scores, block_norm.data());
        SSLKERNELS_CALL_ISA(best_codes, scores, block_norm.data(), 0, rows.rows, work.data());
      }
    }
  }
};

inline CodeSearch code_search_arguments(const torch::stable::Tensor& input, const torch::stable::Tensor& codebook,
                                        int64_t metric, double matmul_rounding, const OptionalTensor& center,
                                        int64_t tile_rows, int64_t tile_codes, const torch::stable::Tensor& index,
                                        const torch::stable::Tensor& score) {
  using torch::headeronly::ScalarType;
  CodeSearch search{};
  search.input = code_vectors(input, "input");
  search.codebook = code_vectors(codebook, "codebook");
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "sslkernels: unknown metric ", metric);
  STD_TORCH_CHECK(tile_rows > 0 && tile_codes > 0, "sslkernels: tiles must have rows and codes");
  search.metric = CodeMetric(metric);
  search.matmul_rounding = matmul_rounding;
  if (center) check_vector(*center, search.input.dim, type_of_products(search.input, search.codebook), "center");
  check_vector(index, search.input.rows, ScalarType::Long, "index");
  check_vector(score, search.input.rows, ScalarType::Double, "score");
  search.center = pointer(center);
  search.tile_rows = std::min(tile_rows, std::max<int64_t>(search.input.rows, 1));
  search.tile_codes = std::min(tile_codes, search.codebook.rows);
  search.index = index.mutable_data_ptr<int64_t>();
  search.score = score.mutable_data_ptr<double>();
  return search;
}

inline CodeGather code_gather_arguments(const torch::stable::Tensor& input, const torch::stable::Tensor& codebook,
                                        const torch::stable::Tensor& index, const torch::stable::Tensor& score,
                                        const torch::stable::Tensor& values, const torch::stable::Tensor& distance) {
  using torch::headeronly::ScalarType;
  CodeGather gather{};
  gather.input = code_vectors(input, "input");
  gather.codebook = code_vectors(codebook, "codebook");
  const auto type = type_of_products(gather.input, gather.codebook);
  const CodeVectors out = code_vectors(values, "values");
  STD_TORCH_CHECK(out.rows == gather.input.rows && out.dim == gather.input.dim && out.element == gather.input.element,
                  "sslkernels: values must have the shape and dtype of input");
  check_vector(index, out.rows, ScalarType::Long, "index");
  check_vector(score, out.rows, ScalarType::Double, "score");
  check_vector(distance, out.rows, type, "distance");
  gather.is_double = type == ScalarType::Double;
  gather.index = index.const_data_ptr<int64_t>();
  gather.score = score.const_data_ptr<double>();
  gather.values = values.mutable_data_ptr();
  gather.distance = distance.mutable_data_ptr();
  return gather;
}

inline CodeDifference code_difference_arguments(const torch::stable::Tensor& coefficient,
                                                const torch::stable::Tensor& input,
                                                const torch::stable::Tensor& codebook,
                                                const torch::stable::Tensor& index, const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  CodeDifference difference{};
  difference.input = code_vectors(input, "input");
  difference.codebook = code_vectors(codebook, "codebook");
  const auto type = type_of_products(difference.input, difference.codebook);
  const CodeVectors written = code_vectors(out, "out");
  STD_TORCH_CHECK(written.rows == difference.input.rows && written.dim == difference.input.dim,
                  "sslkernels: out must have the shape of input");
  check_vector(index, written.rows, ScalarType::Long, "index");
  check_vector(coefficient, written.rows, type, "coefficient");
  difference.is_double = type == ScalarType::Double;
  difference.index = index.const_data_ptr<int64_t>();
  difference.coefficient = coefficient.const_data_ptr();
  difference.out_element = written.element;
  difference.out = out.mutable_data_ptr();
  return difference;
}

}  // namespace sslkernels
