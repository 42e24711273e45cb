#pragma once

#include "random/random_stream_bind.h"
#include "vocabulary/sample_rows.h"

namespace sslkernels {

inline SampleRows parse_sample_rows(const Tensor& products, const OptionalTensor& bias, const Tensor& seed,
                                    const Tensor& row_ids, int64_t first_column, int64_t vocab, const Tensor& scale,
                                    int64_t draw, const Tensor& row_max, const Tensor& sum_exp, const Tensor& best,
                                    const Tensor& logprob, const Tensor& index) {
  check_matrix(products, "products");
  const auto type = accumulation_type(products);
  SampleRows sample{};
  sample.element = element_of(products);
  sample.products = products.const_data_ptr();
  sample.stride = products.stride(0);
  sample.rows = products.size(0);
  sample.columns = products.size(1);
  STD_TORCH_CHECK(first_column % 4 == 0 && first_column + sample.columns <= vocab, "sslkernels: columns out of range");
  sample.first_column = first_column;
  sample.vocab = vocab;
  sample.bias = readable(bias, {vocab}, type, "bias");
  sample.scale = readable(scale, {sample.rows}, type, "scale");
  sample.draw = draw;
  sample.row_ids = parse_row_ids(row_ids, sample.rows);
  sample.seed = parse_seed(seed);
  sample.row_max = writable(row_max, {sample.rows}, type, "row_max");
  sample.sum_exp = writable(sum_exp, {sample.rows}, type, "sum_exp");
  sample.best = writable(best, {sample.rows}, type, "best");
  sample.logprob = writable(logprob, {sample.rows}, type, "logprob");
  sample.index = writable<int64_t>(index, {sample.rows}, ScalarType::Long, "index");
  return sample;
}

}  // namespace sslkernels
