// From tensors to the arguments of the kernels of vector_quantize, as bind.h.
#pragma once

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

inline CodeTile code_tile_arguments(const torch::stable::Tensor& source, const OptionalTensor& center, bool unit,
                                    const OptionalTensor& tile, const torch::stable::Tensor& norm,
                                    const OptionalTensor& half_square) {
  CodeTile arguments{};
  arguments.source = code_vectors(source, "source");
  const auto type = norm.scalar_type();
  arguments.is_double = element_of(norm) == Element::kDouble;
  check_vector(norm, source.size(0), type, "norm");
  STD_TORCH_CHECK(type == accumulation_type(norm), "sslkernels: norm must be float32 or float64");
  if (center) check_vector(*center, source.size(1), type, "center");
  if (half_square) check_vector(*half_square, source.size(0), type, "half_square");
  STD_TORCH_CHECK(tile || (!center && !unit && source.scalar_type() == type), "sslkernels: a tile is needed");
  if (tile) {
    code_vectors(*tile, "tile");
    STD_TORCH_CHECK(tile->size(0) == source.size(0) && tile->size(1) == source.size(1) && tile->scalar_type() == type,
                    "sslkernels: tile must have the shape of source and the dtype of norm");
  }
  arguments.center = pointer(center);
  arguments.unit = unit;
  arguments.tile = tile ? tile->mutable_data_ptr() : nullptr;
  arguments.norm = norm.mutable_data_ptr();
  arguments.half_square = half_square ? half_square->mutable_data_ptr() : nullptr;
  return arguments;
}

inline CodeScores code_scores_arguments(const torch::stable::Tensor& input, const torch::stable::Tensor& codebook,
                                        int64_t metric, double matmul_rounding, int64_t first_code,
                                        const torch::stable::Tensor& products, const torch::stable::Tensor& input_norm,
                                        const torch::stable::Tensor& code_norm, const OptionalTensor& code_half_square,
                                        const torch::stable::Tensor& bound, const torch::stable::Tensor& best,
                                        const torch::stable::Tensor& index) {
  using torch::headeronly::ScalarType;
  CodeScores scores{};
  scores.input = code_vectors(input, "input");
  scores.codebook = code_vectors(codebook, "codebook");
  const auto type = type_of_products(scores.input, scores.codebook);
  scores.is_double = type == ScalarType::Double;
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "sslkernels: unknown metric ", metric);
  scores.metric = CodeMetric(metric);
  scores.matmul_rounding = matmul_rounding;
  code_vectors(products, "products");
  scores.first_code = first_code;
  scores.codes = products.size(1);
  STD_TORCH_CHECK(products.size(0) == scores.input.rows && products.scalar_type() == type && first_code >= 0 &&
                      first_code + scores.codes <= scores.codebook.rows,
                  "sslkernels: products must be of the input and of codes of the codebook");
  check_vector(input_norm, scores.input.rows, type, "input_norm");
  check_vector(code_norm, scores.codes, type, "code_norm");
  if (code_half_square) check_vector(*code_half_square, scores.codes, type, "code_half_square");
  check_vector(bound, scores.input.rows, type, "bound");
  check_vector(best, scores.input.rows, ScalarType::Double, "best");
  check_vector(index, scores.input.rows, ScalarType::Long, "index");
  scores.products = products.const_data_ptr();
  scores.input_norm = input_norm.const_data_ptr();
  scores.code_norm = code_norm.const_data_ptr();
  scores.code_half_square = pointer(code_half_square);
  scores.bound = bound.mutable_data_ptr();
  scores.best = best.mutable_data_ptr<double>();
  scores.index = index.mutable_data_ptr<int64_t>();
  return scores;
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
