// From tensors to the arguments of the masking kernels, as bind.h.
#pragma once

#include "random/random_stream_bind.h"
#include "vocabulary/mask_tokens.h"

namespace sslkernels {

inline void check_like(const torch::stable::Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(),
                  "sslkernels: ", name, " must be contiguous, of the shape of input_ids");
}

// `ranges` is read by the host, wherever the tokens are.
inline MaskRule mask_rule(const torch::stable::Tensor& ranges, int64_t select, int64_t stay, int64_t enter,
                          int64_t to_mask, int64_t to_random, int64_t mask_id, int64_t allowed, int64_t ignore_index) {
  check_vector(ranges, ranges.numel() / 2 * 2, torch::headeronly::ScalarType::Long, "ranges");
  STD_TORCH_CHECK(ranges.is_cpu(), "sslkernels: ranges must be on the CPU");
  return {uint64_t(select),  uint64_t(stay),      uint64_t(enter),
          uint64_t(to_mask), uint64_t(to_random), mask_id,
          allowed,           ignore_index,        ranges.const_data_ptr<int64_t>(),
          ranges.numel() / 2};
}

inline MaskTokens mask_tokens_arguments(const torch::stable::Tensor& input_ids, const torch::stable::Tensor& seed,
                                        const OptionalTensor& special_mask, const OptionalTensor& word_ids,
                                        const OptionalTensor& row_ids, const torch::stable::Tensor& output_ids,
                                        const torch::stable::Tensor& labels, bool chained, const MaskRule& rule) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(input_ids.dim() == 2, "sslkernels: input_ids must have 2 dimensions");
  const int64_t rows = input_ids.size(0), columns = input_ids.size(1);
  check_like(input_ids, rows, columns, "input_ids");
  check_like(output_ids, rows, columns, "output_ids");
  check_like(labels, rows, columns, "labels");
  MaskTokens tokens{};
  tokens.wide_ids = is_wide(input_ids, "input_ids");
  STD_TORCH_CHECK(
      output_ids.scalar_type() == input_ids.scalar_type() && labels.scalar_type() == input_ids.scalar_type(),
      "sslkernels: the outputs must have the dtype of input_ids");
  if (special_mask) {
    check_like(*special_mask, rows, columns, "special_mask");
    STD_TORCH_CHECK(special_mask->scalar_type() == ScalarType::Bool, "sslkernels: special_mask must be bool");
  }
  if (word_ids) {
    check_like(*word_ids, rows, columns, "word_ids");
    tokens.wide_words = is_wide(*word_ids, "word_ids");
  }
  tokens.input_ids = input_ids.const_data_ptr();
  tokens.special_mask = static_cast<const uint8_t*>(pointer(special_mask));
  tokens.word_ids = pointer(word_ids);
  tokens.row_ids = row_ids_pointer(row_ids, rows);
  tokens.seed = seed_pointer(seed);
  tokens.rows = rows;
  tokens.columns = columns;
  tokens.output_ids = output_ids.mutable_data_ptr();
  tokens.labels = labels.mutable_data_ptr();
  tokens.chained = chained;
  tokens.rule = rule;
  return tokens;
}

}  // namespace sslkernels
