// The CPU implementations of the operators of joint embeddings, over torch's thread pool.

#include "core/cpu/bind.h"

#include "contrastive/negative_sampling.h"
#include "contrastive/negative_sampling_bind.h"
#include "contrastive/query_negatives.h"
#include "contrastive/query_negatives_bind.h"
#include "contrastive/score_tiles.h"
#include "contrastive/score_tiles_bind.h"
#include "core/segment_sums.h"

namespace sslkernels {
namespace {

using torch::stable::Tensor;

void own_negatives(Tensor query, Tensor negatives, OptionalTensor mask, OptionalTensor query_inverse_norm,
                   Tensor logit_scale, OptionalTensor logit_bias, int64_t energy, OptionalTensor reference,
                   OptionalTensor coefficient, OptionalTensor smoothing, bool final, Tensor scores, Tensor value,
                   Tensor grad_query, Tensor grad_negatives, Tensor grad_scale, Tensor grad_bias) {
  const OwnNegatives own = own_negatives_arguments(query, negatives, mask, query_inverse_norm, logit_scale, logit_bias,
                                                   energy, reference, coefficient, smoothing, final, scores, value,
                                                   grad_query, grad_negatives, grad_scale, grad_bias);
  if (own.grad_negatives != nullptr) advise_output(grad_negatives);
  torch::stable::parallel_for(0, own.rows, row_grain(own.count * own.dim), [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_of(int64_t(own_negatives_scratch_bytes(own)));
    SSLKERNELS_CALL_ISA(own_negatives, own, begin, end, scratch.get());
  });
}

void pair_row_sums(Tensor products, OptionalTensor row_norm, OptionalTensor column_norm, Tensor scale,
                   OptionalTensor bias, int64_t energy, OptionalTensor row_positive, OptionalTensor column_positive,
                   OptionalTensor row_self, OptionalTensor column_self, OptionalTensor row_id, OptionalTensor column_id,
                   bool ids_positive, OptionalTensor threshold, OptionalTensor positive_score,
                   OptionalTensor cosine_row_norm, OptionalTensor cosine_column_norm, OptionalTensor max, Tensor sum,
                   OptionalTensor active, OptionalTensor score_sum, OptionalTensor positive_sum, OptionalTensor spread,
                   OptionalTensor beaten) {
  const PairScores scores = pair_scores(products, row_norm, column_norm, scale, bias, energy, row_positive,
                                        column_positive, row_self, column_self, row_id, column_id, ids_positive);
  const auto type = accumulation_type(products);
  const int64_t rows = scores.rows;
  check_optional(threshold, rows, type, "threshold");
  check_optional(positive_score, rows, type, "positive_score");
  check_optional(cosine_row_norm, rows, type, "cosine_row_norm");
  check_optional(cosine_column_norm, scores.columns, type, "cosine_column_norm");
  check_optional(max, rows, type, "max");
  check_optional(beaten, rows, torch::headeronly::ScalarType::Long, "beaten");
  STD_TORCH_CHECK(max.has_value() == (scores.energy == Energy::kSoftmax), "sslkernels: softmax has maxima");
  STD_TORCH_CHECK(threshold.has_value() == (scores.energy == Energy::kHinge), "sslkernels: hinge has thresholds");
  STD_TORCH_CHECK(!beaten || positive_score, "sslkernels: beaten needs positive_score");
  STD_TORCH_CHECK(!spread || (cosine_row_norm && cosine_column_norm), "sslkernels: spread needs norms");
  PairRowSums sums{};
  sums.max = max ? max->mutable_data_ptr() : nullptr;
  sums.sum = sums_of(sum, rows, "sum");
  sums.active = sums_of(active, rows, "active");
  sums.score_sum = sums_of(score_sum, rows, "score_sum");
  sums.positive_sum = sums_of(positive_sum, rows, "positive_sum");
  sums.spread = sums_of(spread, rows, "spread");
  sums.beaten = beaten ? static_cast<int64_t*>(beaten->mutable_data_ptr()) : nullptr;
  sums.threshold = pointer(threshold);
  sums.positive_score = pointer(positive_score);
  sums.row_norm = pointer(cosine_row_norm);
  sums.column_norm = pointer(cosine_column_norm);
  torch::stable::parallel_for(0, rows, row_grain(scores.columns), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(pair_row_sums, scores, sums, begin, end);
  });
}

void pair_column_sums(Tensor products, OptionalTensor row_norm, OptionalTensor column_norm, Tensor scale,
                      OptionalTensor bias, int64_t energy, OptionalTensor row_positive, OptionalTensor column_positive,
                      OptionalTensor row_self, OptionalTensor column_self, OptionalTensor row_id,
                      OptionalTensor column_id, bool ids_positive, OptionalTensor threshold, OptionalTensor max,
                      Tensor sum, OptionalTensor active, OptionalTensor score_sum, OptionalTensor positive_sum) {
  const PairScores scores = pair_scores(products, row_norm, column_norm, scale, bias, energy, row_positive,
                                        column_positive, row_self, column_self, row_id, column_id, ids_positive);
  const auto type = accumulation_type(products);
  const int64_t columns = scores.columns;
  check_optional(threshold, columns, type, "threshold");
  check_optional(max, columns, type, "max");
  STD_TORCH_CHECK(max.has_value() == (scores.energy == Energy::kSoftmax), "sslkernels: softmax has maxima");
  STD_TORCH_CHECK(threshold.has_value() == (scores.energy == Energy::kHinge), "sslkernels: hinge has thresholds");
  STD_TORCH_CHECK(active.has_value() || !threshold, "sslkernels: a threshold needs active");
  PairColumnSums sums{};
  sums.max = max ? max->mutable_data_ptr() : nullptr;
  sums.sum = sums_of(sum, columns, "sum");
  sums.active = sums_of(active, columns, "active");
  sums.score_sum = sums_of(score_sum, columns, "score_sum");
  sums.positive_sum = sums_of(positive_sum, columns, "positive_sum");
  sums.threshold = pointer(threshold);
  const int64_t blocks = (columns + kPairColumns - 1) / kPairColumns;
  torch::stable::parallel_for(0, blocks, row_grain(scores.rows * kPairColumns), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(pair_column_sums, scores, sums, begin, end);
  });
}

void pair_gradient(Tensor products, OptionalTensor row_norm, OptionalTensor column_norm, Tensor scale,
                   OptionalTensor bias, int64_t energy, OptionalTensor row_positive, OptionalTensor column_positive,
                   OptionalTensor row_self, OptionalTensor column_self, OptionalTensor row_id, OptionalTensor column_id,
                   bool ids_positive, OptionalTensor row_weight, OptionalTensor row_reference, OptionalTensor row_share,
                   OptionalTensor row_smoothing, OptionalTensor column_weight, OptionalTensor column_reference,
                   OptionalTensor column_share, OptionalTensor column_smoothing, Tensor dot, Tensor total) {
  const PairScores scores = pair_scores(products, row_norm, column_norm, scale, bias, energy, row_positive,
                                        column_positive, row_self, column_self, row_id, column_id, ids_positive);
  const auto type = accumulation_type(products);
  PairGradient gradient{};
  gradient.row = pair_side(row_weight, row_reference, row_share, row_smoothing, scores.rows, type, scores);
  gradient.column =
      pair_side(column_weight, column_reference, column_share, column_smoothing, scores.columns, type, scores);
  STD_TORCH_CHECK(scores.energy != Energy::kSigmoid || !column_weight, "sslkernels: sigmoid has no column side");
  gradient.dot = sums_of(dot, scores.rows, "dot");
  gradient.total = sums_of(total, scores.rows, "total");
  torch::stable::parallel_for(0, scores.rows, row_grain(scores.columns), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(pair_gradient, scores, gradient, begin, end);
  });
}

void negative_sampling_fwd(Tensor center, Tensor context, Tensor negatives, Tensor center_weight, Tensor context_weight,
                           Tensor loss, OptionalTensor slopes, OptionalTensor direction, bool exclude_positive) {
  const NegativeSampling pairs = negative_sampling_arguments(center, context, negatives, center_weight, context_weight,
                                                             loss, slopes, direction, exclude_positive);
  advise_output(direction);
  const int64_t grain = row_grain((pairs.negative_count + 1) * pairs.dim);
  torch::stable::parallel_for(0, pairs.count, grain, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(negative_sampling_fwd, pairs, begin, end);
  });
}

void sort_rows(Tensor keys, Tensor order, Tensor starts) {
  using torch::headeronly::ScalarType;
  check_vector(keys, keys.numel(), keys.scalar_type(), "keys");
  check_vector(order, keys.numel(), ScalarType::Long, "order");
  check_vector(starts, starts.numel(), ScalarType::Long, "starts");
  STD_TORCH_CHECK(starts.numel() > 0, "sslkernels: starts must have one element more than there are rows");
  SSLKERNELS_CALL_ISA(sort_rows, keys.const_data_ptr(), is_wide(keys, "keys"), keys.numel(), starts.numel() - 1,
                      order.mutable_data_ptr<int64_t>(), starts.mutable_data_ptr<int64_t>());
}

void weighted_row_sums(Tensor starts, Tensor order, Tensor coefficient, Tensor source, OptionalTensor source_index,
                       Tensor out, int64_t entries_of_source) {
  const WeightedRowSums sums =
      row_sums_arguments(starts, order, coefficient, source, source_index, out, entries_of_source);
  advise_output(out);
  const int64_t work = sums.starts[sums.rows] + sums.rows;
  torch::stable::parallel_for(0, work, row_grain(sums.dim), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(weighted_row_sums, sums, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  m.impl("own_negatives", TORCH_BOX(&own_negatives));
  m.impl("pair_row_sums", TORCH_BOX(&pair_row_sums));
  m.impl("pair_column_sums", TORCH_BOX(&pair_column_sums));
  m.impl("pair_gradient", TORCH_BOX(&pair_gradient));
  m.impl("negative_sampling_fwd", TORCH_BOX(&negative_sampling_fwd));
  m.impl("sort_rows", TORCH_BOX(&sort_rows));
  m.impl("weighted_row_sums", TORCH_BOX(&weighted_row_sums));
}

}  // namespace sslkernels
