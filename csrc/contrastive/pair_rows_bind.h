#pragma once

#include <limits>

#include "contrastive/pair_rows.h"
#include "core/bind.h"

namespace sslkernels {

inline InverseNorms parse_inverse_norms(const Tensor& values, const Tensor& norm) {
  check_matrix(values, "values");
  InverseNorms args{};
  args.element = element_of(values);
  args.rows = values.size(0);
  args.dim = values.size(1);
  args.values = readable(values, {args.rows, args.dim}, values.scalar_type(), "values");
  args.norm = writable(norm, {args.rows}, accumulation_type(values), "norm");
  return args;
}

inline PositiveScores parse_positive_scores(const Tensor& query, const Tensor& key, const OptionalTensor& query_norm,
                                            const OptionalTensor& key_norm, const OptionalTensor& positive,
                                            const Tensor& scale, const OptionalTensor& bias, const Tensor& u,
                                            const Tensor& score) {
  check_matrix(query, "query");
  check_matrix(key, "key");
  STD_TORCH_CHECK(query_norm.has_value() == key_norm.has_value(), "sslkernels: norms go together");
  const auto type = accumulation_type(query);
  PositiveScores args{};
  args.element = element_of(query);
  args.rows = query.size(0);
  args.keys = key.size(0);
  args.dim = query.size(1);
  args.query = readable(query, {args.rows, args.dim}, query.scalar_type(), "query");
  args.key = readable(key, {args.keys, args.dim}, query.scalar_type(), "key");
  args.query_norm = readable(query_norm, {args.rows}, type, "query_norm");
  args.key_norm = readable(key_norm, {args.keys}, type, "key_norm");
  args.positive = readable<int64_t>(positive, {args.rows}, ScalarType::Long, "positive");
  args.scale = readable(scale, {1}, type, "scale");
  args.bias = readable(bias, {1}, type, "bias");
  args.u = writable(u, {args.rows}, type, "u");
  args.score = writable(score, {args.rows}, type, "score");
  return args;
}

inline NormsAndScores parse_norms_and_scores(const Tensor& query, const Tensor& key, const Tensor& scale,
                                             const OptionalTensor& bias, const Tensor& query_norm,
                                             const Tensor& key_norm, const Tensor& u, const Tensor& score) {
  check_matrix(query, "query");
  check_matrix(key, "key");
  const auto type = accumulation_type(query);
  NormsAndScores args{};
  args.element = element_of(query);
  args.rows = query.size(0);
  args.keys = key.size(0);
  args.dim = query.size(1);
  args.query = readable(query, {args.rows, args.dim}, query.scalar_type(), "query");
  args.key = readable(key, {args.keys, args.dim}, query.scalar_type(), "key");
  args.scale = readable(scale, {1}, type, "scale");
  args.bias = readable(bias, {1}, type, "bias");
  args.query_norm = writable(query_norm, {args.rows}, type, "query_norm");
  args.key_norm = writable(key_norm, {args.keys}, type, "key_norm");
  args.u = writable(u, {args.rows}, type, "u");
  args.score = writable(score, {args.rows}, type, "score");
  return args;
}

// Vectors of columns may have more entries than there are pairs.
inline int64_t size_of(const OptionalTensor& tensor, int64_t rows) {
  const int64_t size = tensor && tensor->dim() == 1 ? tensor->size(0) : rows;
  return size < rows ? rows : size;
}

inline PairLosses parse_pair_losses(
    const OptionalTensor& max, const Tensor& sum, const OptionalTensor& active, const OptionalTensor& score_sum,
    const OptionalTensor& positive_sum, const Tensor& score, const Tensor& u, const OptionalTensor& positive,
    const OptionalTensor& positives, const OptionalTensor& candidates, const OptionalTensor& weight,
    const OptionalTensor& share, const OptionalTensor& smoothing, int64_t energy, double half, double label_smoothing,
    bool ids_positive, const OptionalTensor& others, const OptionalTensor& reference, const OptionalTensor& settled,
    const OptionalTensor& loss, const Tensor& score_gradient, const Tensor& dot, const Tensor& total) {
  STD_TORCH_CHECK(energy >= 0 && energy <= 2, "sslkernels: unknown energy ", energy);
  const auto type = score.scalar_type();
  const bool softmax = energy == int64_t(Energy::kSoftmax);
  STD_TORCH_CHECK(max.has_value() == softmax, "sslkernels: softmax has maxima");
  STD_TORCH_CHECK(!weight || energy != int64_t(Energy::kHinge) || active, "sslkernels: hinge needs active");
  STD_TORCH_CHECK(!loss || !softmax || !ids_positive || (positive_sum && positives), "sslkernels: no positive_sum");
  STD_TORCH_CHECK(!loss || !softmax || label_smoothing == 0 || (score_sum && candidates), "sslkernels: no score_sum");
  PairLosses args{};
  args.element = element_of(score);
  args.energy = Energy(energy);
  const int64_t rows = args.rows = score.size(0);
  args.max = readable(max, {size_of(max, rows)}, type, "max");
  args.sum = readable<double>(sum, {size_of(sum, rows)}, ScalarType::Double, "sum");
  args.active = readable<double>(active, {size_of(active, rows)}, ScalarType::Double, "active");
  args.score_sum = readable<double>(score_sum, {size_of(score_sum, rows)}, ScalarType::Double, "score_sum");
  args.positive_sum = readable<double>(positive_sum, {size_of(positive_sum, rows)}, ScalarType::Double, "positive_sum");
  args.score = readable(score, {rows}, type, "score");
  args.u = readable(u, {rows}, type, "u");
  args.positive = readable<int64_t>(positive, {rows}, ScalarType::Long, "positive");
  args.positives = readable<int64_t>(positives, {size_of(positives, rows)}, ScalarType::Long, "positives");
  args.candidates = readable<int64_t>(candidates, {size_of(candidates, rows)}, ScalarType::Long, "candidates");
  args.weight = readable(weight, {size_of(weight, rows)}, type, "weight");
  args.share = readable(share, {size_of(share, rows)}, type, "share");
  args.smoothing = readable(smoothing, {size_of(smoothing, rows)}, type, "smoothing");
  args.half = half;
  args.label_smoothing = label_smoothing;
  args.ids_positive = ids_positive;
  args.others = writable<double>(others, {rows}, ScalarType::Double, "others");
  args.references = size_of(reference, rows);
  args.reference = writable(reference, {args.references}, type, "reference");
  args.settled = writable(settled, {args.references}, type, "weight");
  STD_TORCH_CHECK(!settled || (weight && reference), "sslkernels: a weight to write needs weight and reference");
  args.loss = writable(loss, {rows}, type, "loss");
  args.score_gradient = writable(score_gradient, {rows}, type, "score_gradient");
  args.dot = writable<double>(dot, {rows}, ScalarType::Double, "dot");
  args.total = writable<double>(total, {rows}, ScalarType::Double, "total");
  return args;
}

inline FeatureGradients parse_finish_gradients(const Tensor& total, const Tensor& values, const OptionalTensor& norm,
                                               const OptionalTensor& partner, const OptionalTensor& partner_norm,
                                               const OptionalTensor& index, const OptionalTensor& score_gradient,
                                               const OptionalTensor& extra, const Tensor& scale, const Tensor& out) {
  check_matrix(values, "values");
  STD_TORCH_CHECK(partner.has_value() == score_gradient.has_value(), "sslkernels: partner and score_gradient");
  STD_TORCH_CHECK(!partner || norm.has_value() == partner_norm.has_value(), "sslkernels: norms go together");
  const auto type = accumulation_type(values);
  FeatureGradients args{};
  args.element = element_of(values);
  args.out_element = element_of(out);
  args.rows = values.size(0);
  args.dim = values.size(1);
  args.total_element = element_of(total);
  const auto total_type = total.scalar_type() == values.scalar_type() ? values.scalar_type() : type;
  args.total = readable(total, {args.rows, args.dim}, total_type, "total");
  args.values = readable(values, {args.rows, args.dim}, values.scalar_type(), "values");
  args.norm = readable(norm, {args.rows}, type, "norm");
  if (partner) {
    args.partners = partner->size(0);
    args.score_rows = score_gradient->size(0);
    args.partner = readable(*partner, {args.partners, args.dim}, values.scalar_type(), "partner");
    args.partner_norm = readable(partner_norm, {args.partners}, type, "partner_norm");
    args.score_gradient = readable(*score_gradient, {args.score_rows}, type, "score_gradient");
    args.index = readable<int64_t>(index, {args.rows}, ScalarType::Long, "index");
  }
  args.extra = readable(extra, {args.rows, args.dim}, type, "extra");
  args.scale = readable(scale, {1}, type, "scale");
  args.out = writable(out, {args.rows, args.dim}, out.scalar_type(), "out");
  return args;
}

}  // namespace sslkernels
