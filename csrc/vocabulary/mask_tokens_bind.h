#pragma once

#include "random/random_stream_bind.h"
#include "vocabulary/mask_tokens.h"

namespace sslkernels {

// The host reads `ranges` wherever the tokens are.
inline MaskTokens parse_mask_tokens(const Tensor& input_ids, const Tensor& seed, const OptionalTensor& special_mask,
                                    const OptionalTensor& word_ids, const OptionalTensor& row_ids, const Tensor& ranges,
                                    const Tensor& output_ids, const Tensor& labels, int64_t select, int64_t stay,
                                    int64_t enter, int64_t to_mask, int64_t to_random, int64_t mask_id, int64_t allowed,
                                    int64_t ignore_index, bool chained) {
  STD_TORCH_CHECK(input_ids.dim() == 2, "sslkernels: input_ids must have 2 dimensions");
  STD_TORCH_CHECK(ranges.is_cpu(), "sslkernels: ranges must be on the CPU");
  const auto type = input_ids.scalar_type();
  MaskTokens tokens{};
  tokens.rows = input_ids.size(0);
  tokens.columns = input_ids.size(1);
  const Shape shape{tokens.rows, tokens.columns};
  tokens.wide_ids = is_wide(input_ids, "input_ids");
  tokens.input_ids = readable(input_ids, shape, type, "input_ids");
  tokens.special_mask = readable<uint8_t>(special_mask, shape, ScalarType::Bool, "special_mask");
  if (word_ids) {
    tokens.wide_words = is_wide(*word_ids, "word_ids");
    tokens.word_ids = readable(*word_ids, shape, word_ids->scalar_type(), "word_ids");
  }
  tokens.row_ids = parse_row_ids(row_ids, tokens.rows);
  tokens.seed = parse_seed(seed);
  tokens.output_ids = writable(output_ids, shape, type, "output_ids");
  tokens.labels = writable(labels, shape, type, "labels");
  tokens.chained = chained;
  const int64_t range_count = ranges.numel() / 2;
  tokens.rule = {
      uint64_t(select),  uint64_t(stay),      uint64_t(enter),
      uint64_t(to_mask), uint64_t(to_random), mask_id,
      allowed,           ignore_index,        readable<int64_t>(ranges, {2 * range_count}, ScalarType::Long, "ranges"),
      range_count};
  return tokens;
}

}  // namespace sslkernels
