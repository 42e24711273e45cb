// From tensors to the arguments of the choice of a column, as bind.h.
#pragma once

#include "random/random_stream_bind.h"
#include "vocabulary/sample_rows.h"

namespace sslkernels {

inline SampleRows sample_rows_arguments(const torch::stable::Tensor& products, const OptionalTensor& bias,
                                        const torch::stable::Tensor& seed, const torch::stable::Tensor& row_ids,
                                        int64_t first_column, int64_t vocab, double scale,
                                        const torch::stable::Tensor& row_max, const torch::stable::Tensor& sum_exp,
                                        const torch::stable::Tensor& best, const torch::stable::Tensor& logprob,
                                        const torch::stable::Tensor& index) {
  check_matrix(products, "products");
  const int64_t rows = products.size(0), columns = products.size(1);
  const auto type = accumulation_type(products);
  STD_TORCH_CHECK(first_column % 4 == 0 && first_column + columns <= vocab, "sslkernels: columns out of range");
  if (bias) check_vector(*bias, vocab, type, "bias");
  check_vector(row_max, rows, type, "row_max");
  check_vector(sum_exp, rows, type, "sum_exp");
  check_vector(best, rows, type, "best");
  check_vector(logprob, rows, type, "logprob");
  check_vector(index, rows, torch::headeronly::ScalarType::Long, "index");
  return {element_of(products),
          products.const_data_ptr(),
          products.stride(0),
          rows,
          columns,
          first_column,
          vocab,
          pointer(bias),
          scale,
          row_ids_pointer(row_ids, rows),
          seed_pointer(seed),
          row_max.mutable_data_ptr(),
          sum_exp.mutable_data_ptr(),
          best.mutable_data_ptr(),
          logprob.mutable_data_ptr(),
          index.mutable_data_ptr<int64_t>()};
}

}  // namespace sslkernels
