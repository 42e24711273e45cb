#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "core/bind.h"
#include "latent/code_search.h"

namespace sslkernels {

inline CodeVectors parse_code_vectors(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), "sslkernels: ", name,
                  " must be contiguous, of 2 dimensions");
  return {element_of(tensor), tensor.const_data_ptr(), tensor.size(0), tensor.size(1)};
}

inline ScalarType type_of_products(const CodeVectors& input, const CodeVectors& codebook) {
  STD_TORCH_CHECK(input.dim == codebook.dim, "sslkernels: input and codebook must have the same dim");
  const bool is_double = input.element == Element::kDouble || codebook.element == Element::kDouble;
  return is_double ? ScalarType::Double : ScalarType::Float;
}

// products (a.rows, b.rows) = a b^T in A, by torch; single-threaded inside a parallel region of a CPU.
template <class A>
void multiply_vectors(const CodeVectors& a, const CodeVectors& b, A* products, int64_t pitch,
                      const torch::stable::Device& device) {
  using torch::stable::detail::from;
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  constexpr ScalarType kProducts = sizeof(A) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
  const auto matrix = [&](const void* data, ScalarType type, std::array<int64_t, 2> sizes,
                          std::array<int64_t, 2> strides) {
    return from(
        torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), 2}, {strides.data(), 2}, device, type));
  };
  const ScalarType type = kTypes[int(a.element)];
  const StableIValue rows = matrix(a.data, type, {a.rows, a.dim}, {a.dim, 1});
  const StableIValue codes = matrix(b.data, type, {b.dim, b.rows}, {1, b.dim});
  const StableIValue out = matrix(products, kProducts, {a.rows, b.rows}, {pitch, 1});
  StableIValue result;
  if (type == kProducts) {
    std::array<StableIValue, 3> stack{rows, codes, out};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    result = stack[0];
  } else {
    std::array<StableIValue, 4> stack{rows, codes, from(kProducts), out};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    result = stack[0];
  }
  (void)torch::stable::detail::to<Tensor>(result);  // takes ownership of the returned handle, an alias of `out`
}

inline void parse_tiles(CodeSearch& search, int64_t metric, double matmul_rounding, int64_t tile_rows,
                        int64_t tile_codes) {
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "sslkernels: unknown metric ", metric);
  STD_TORCH_CHECK(tile_rows > 0 && tile_codes > 0, "sslkernels: tiles must have rows and codes");
  search.metric = CodeMetric(metric);
  search.matmul_rounding = matmul_rounding;
  search.tile_rows = tile_rows;
  search.tile_codes = tile_codes;
}

inline CodeSearch parse_search_codes(const Tensor& input, const Tensor& codebook, int64_t metric,
                                     double matmul_rounding, const OptionalTensor& center, bool as_given,
                                     int64_t tile_rows, int64_t tile_codes, const Tensor& index, const Tensor& score) {
  CodeSearch search{};
  search.input = parse_code_vectors(input, "input");
  search.codebook = parse_code_vectors(codebook, "codebook");
  parse_tiles(search, metric, matmul_rounding, tile_rows, tile_codes);
  const bool halves = search.input.element == search.codebook.element && bytes_of(search.input.element) == 2;
  STD_TORCH_CHECK(!as_given || (halves && !center && input.is_cuda()),
                  "sslkernels: only half precision on a GPU is multiplied as it is given");
  search.center = readable(center, {search.input.dim}, type_of_products(search.input, search.codebook), "center");
  search.as_given = as_given;
  search.index = writable<int64_t>(index, {search.input.rows}, ScalarType::Long, "index");
  search.score = writable<double>(score, {search.input.rows}, ScalarType::Double, "score");
  return search;
}

inline CodeGather parse_gather_codes(const Tensor& input, const Tensor& codebook, const Tensor& index,
                                     const Tensor& score, const Tensor& values, const Tensor& distance) {
  CodeGather gather{};
  gather.input = parse_code_vectors(input, "input");
  gather.codebook = parse_code_vectors(codebook, "codebook");
  const int64_t rows = gather.input.rows;
  const auto type = type_of_products(gather.input, gather.codebook);
  gather.is_double = type == ScalarType::Double;
  gather.index = readable<int64_t>(index, {rows}, ScalarType::Long, "index");
  check_indices(index, rows, gather.codebook.rows, "index");
  gather.score = readable<double>(score, {rows}, ScalarType::Double, "score");
  gather.values = writable(values, {rows, gather.input.dim}, input.scalar_type(), "values");
  gather.distance = writable(distance, {rows}, type, "distance");
  return gather;
}

// The whole forward pass on a CPU: search, values, the mean squared difference of rows and codes, and usage.
struct RowQuantization {
  CodeSearch search;
  CodeGather gather;
  bool is_double;    // A
  void* commitment;  // A (1)
  int64_t* usage;    // (codes)
};

inline RowQuantization parse_quantize_rows(const Tensor& input, const Tensor& codebook, int64_t metric,
                                           double matmul_rounding, int64_t tile_rows, int64_t tile_codes,
                                           const Tensor& values, const Tensor& index, const Tensor& commitment,
                                           const Tensor& usage) {
  RowQuantization all{};
  all.search.input = all.gather.input = parse_code_vectors(input, "input");
  all.search.codebook = all.gather.codebook = parse_code_vectors(codebook, "codebook");
  parse_tiles(all.search, metric, matmul_rounding, tile_rows, tile_codes);
  const CodeVectors& rows = all.search.input;
  const auto type = type_of_products(rows, all.search.codebook);
  all.is_double = type == ScalarType::Double;
  all.search.index = writable<int64_t>(index, {rows.rows}, ScalarType::Long, "index");
  all.gather.index = all.search.index;
  all.gather.values = writable(values, {rows.rows, rows.dim}, input.scalar_type(), "values");
  all.commitment = writable(commitment, {}, type, "commitment");
  all.usage = writable<int64_t>(usage, {all.search.codebook.rows}, ScalarType::Long, "usage");
  return all;
}

inline CodeDifference parse_code_difference(const Tensor& coefficient, const Tensor& input, const Tensor& codebook,
                                            const Tensor& index, const Tensor& out) {
  CodeDifference difference{};
  difference.input = parse_code_vectors(input, "input");
  difference.codebook = parse_code_vectors(codebook, "codebook");
  const int64_t rows = difference.input.rows;
  const auto type = type_of_products(difference.input, difference.codebook);
  difference.is_double = type == ScalarType::Double;
  difference.index = readable<int64_t>(index, {rows}, ScalarType::Long, "index");
  check_indices(index, rows, difference.codebook.rows, "index");
  difference.coefficient = readable(coefficient, {}, type, "coefficient");
  difference.out_element = element_of(out);
  difference.out = writable(out, {rows, difference.input.dim}, out.scalar_type(), "out");
  return difference;
}

}  // namespace sslkernels
