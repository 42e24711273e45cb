#pragma once

#include "core/bind.h"
#include "random/random_stream.h"

namespace sslkernels {

inline const int64_t* parse_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "sslkernels: seed must be one int64");
  return seed.const_data_ptr<int64_t>();
}

inline const int64_t* parse_row_ids(const OptionalTensor& row_ids, int64_t rows) {
  return readable<int64_t>(row_ids, {rows}, ScalarType::Long, "row_ids");
}

// `stream` is a value of the enumeration Stream.
inline RandomStream parse_random_stream(const Tensor& seed, const OptionalTensor& row_ids, int64_t sample,
                                        int64_t stream, const Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "sslkernels: out must be a contiguous matrix");
  STD_TORCH_CHECK(stream >= 0 && stream <= int64_t(Stream::kNormal), "sslkernels: unknown stream ", stream);
  const bool bits = Stream(stream) == Stream::kBits;
  STD_TORCH_CHECK(!bits || out.scalar_type() == ScalarType::Int, "sslkernels: bits are int32");
  RandomStream numbers{};
  numbers.row_ids = parse_row_ids(row_ids, out.size(0));
  numbers.seed = parse_seed(seed);
  numbers.rows = out.size(0);
  numbers.columns = out.size(1);
  numbers.sample = sample;
  numbers.stream = Stream(stream);
  numbers.element = bits ? Element::kFloat : element_of(out);
  numbers.out = out.mutable_data_ptr();
  return numbers;
}

}  // namespace sslkernels
