#pragma once

#include "random/random_stream_bind.h"
#include "vocabulary/corrupt_spans.h"

namespace sslkernels {

inline CorruptSpans parse_corrupt_spans(const Tensor& input_ids, const Tensor& seed, const Tensor& sentinels,
                                        const OptionalTensor& row_ids, const Tensor& output_ids, const Tensor& labels,
                                        int64_t noise, int64_t spans, bool has_eos, int64_t eos_id) {
  STD_TORCH_CHECK(input_ids.dim() == 2, "sslkernels: input_ids must have 2 dimensions");
  const auto type = input_ids.scalar_type();
  CorruptSpans corrupt{};
  corrupt.rows = input_ids.size(0);
  corrupt.columns = input_ids.size(1);
  corrupt.noise = noise;
  corrupt.spans = spans;
  STD_TORCH_CHECK(spans >= 1 && spans <= noise && spans <= corrupt.columns - noise && corrupt.columns < INT32_MAX,
                  "sslkernels: each span must have a token, and one before it");
  corrupt.wide_ids = is_wide(input_ids, "input_ids");
  corrupt.input_ids = readable(input_ids, {corrupt.rows, corrupt.columns}, type, "input_ids");
  corrupt.sentinels = readable<int64_t>(sentinels, {spans}, ScalarType::Long, "sentinels");
  corrupt.row_ids = parse_row_ids(row_ids, corrupt.rows);
  corrupt.seed = parse_seed(seed);
  corrupt.has_eos = has_eos;
  corrupt.eos_id = eos_id;
  corrupt.output_ids = writable(output_ids, {corrupt.rows, corrupt.output_columns()}, type, "output_ids");
  corrupt.labels = writable(labels, {corrupt.rows, corrupt.label_columns()}, type, "labels");
  return corrupt;
}

}  // namespace sslkernels
