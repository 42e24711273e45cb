// From tensors to the arguments of the random streams, as bind.h.
#pragma once

#include "core/bind.h"
#include "random/random_stream.h"

namespace sslkernels {

inline const int64_t* seed_pointer(const torch::stable::Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
                  "sslkernels: seed must be one int64");
  return seed.const_data_ptr<int64_t>();
}

inline const int64_t* row_ids_pointer(const OptionalTensor& row_ids, int64_t rows) {
  if (!row_ids) return nullptr;
  check_vector(*row_ids, rows, torch::headeronly::ScalarType::Long, "row_ids");
  return row_ids->const_data_ptr<int64_t>();
}

// stream: of the enumeration Stream.
inline RandomStream random_stream_arguments(const torch::stable::Tensor& seed, const OptionalTensor& row_ids,
                                            int64_t sample, int64_t stream, const torch::stable::Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "sslkernels: out must be a contiguous matrix");
  STD_TORCH_CHECK(stream >= 0 && stream <= int64_t(Stream::kNormal), "sslkernels: unknown stream ", stream);
  const bool bits = Stream(stream) == Stream::kBits;
  STD_TORCH_CHECK(!bits || out.scalar_type() == torch::headeronly::ScalarType::Int, "sslkernels: bits are int32");
  return {
      row_ids_pointer(row_ids, out.size(0)),    seed_pointer(seed),    out.size(0), out.size(1), sample, Stream(stream),
      bits ? Element::kFloat : element_of(out), out.mutable_data_ptr()};
}

}  // namespace sslkernels
