// From tensors to the arguments of the kernels of vector_quantize, as bind.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "core/bind.h"
#include "latent/code_search.h"

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

// products (a.rows, b.rows) = a b^T in A, by torch; inside a parallel region of a CPU with one thread.
template <class A>
void multiply_vectors(const CodeVectors& a, const CodeVectors& b, A* products, int64_t pitch,
                      const torch::stable::Device& device) {
  using torch::headeronly::ScalarType;
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
  (void)torch::stable::detail::to<torch::stable::Tensor>(result);  // owns what is `out`
}

inline CodeSearch code_search_arguments(const torch::stable::Tensor& input, const torch::stable::Tensor& codebook,
                                        int64_t metric, double matmul_rounding, const OptionalTensor& center,
                                        bool as_given, int64_t tile_rows, int64_t tile_codes,
                                        const torch::stable::Tensor& index, const torch::stable::Tensor& score) {
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
  const bool halves = search.input.element == search.codebook.element && bytes_of(search.input.element) == 2;
  STD_TORCH_CHECK(!as_given || (halves && !center), "sslkernels: only half precision is multiplied as it is given");
  search.center = pointer(center);
  search.as_given = as_given;
  search.tile_rows = tile_rows;
  search.tile_codes = tile_codes;
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
