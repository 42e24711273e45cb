// The operators of the namespace sslkernels_native, and their CPU implementations over torch's thread pool.
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <vector>

#include "bind.h"
#include "bind_energy.h"
#include "bind_gaussian.h"
#include "bind_gumbel.h"
#include "bind_mask_tokens.h"
#include "bind_negative_sampling.h"
#include "bind_own_negatives.h"
#include "bind_pair_scores.h"
#include "bind_sample_rows.h"
#include "bind_vector_quantize.h"
#include "cpu/cross_entropy.h"
#include "cpu/free_energy.h"
#include "cpu/gaussian.h"
#include "cpu/gumbel.h"
#include "cpu/mask_tokens.h"
#include "cpu/memory.h"
#include "cpu/negative_sampling.h"
#include "cpu/own_negatives.h"
#include "cpu/pair_scores.h"
#include "cpu/prediction_energy.h"
#include "cpu/random_stream.h"
#include "cpu/row_sums.h"
#include "cpu/sample_rows.h"
#include "cpu/scale_add.h"
#include "cpu/vector_quantize.h"

namespace sslkernels {
namespace {

using torch::stable::Tensor;

// Elements that are worth handing to another thread.
constexpr int64_t kGrain = 32768;

int64_t row_grain(int64_t columns) { return kGrain / (columns + 1) + 1; }

void cross_entropy_rows_fwd(Tensor logits, Tensor target, OptionalTensor bias, OptionalTensor weight,
                            OptionalTensor weight_sum, OptionalTensor coefficient, Tensor loss, Tensor row_max,
                            Tensor sum_exp, Tensor logprob, Tensor prediction, Tensor entropy, OptionalTensor grad,
                            int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                            double logit_scale, bool stats) {
  CrossEntropyRows rows =
      cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob, grad,
                         {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  add_forward_outputs(rows, logits, loss, prediction, entropy, stats);
  torch::stable::parallel_for(0, rows.count, row_grain(rows.vocab), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(cross_entropy_rows_fwd, rows, begin, end);
  });
}

void cross_entropy_rows_bwd(Tensor logits, Tensor target, OptionalTensor bias, OptionalTensor weight,
                            OptionalTensor weight_sum, Tensor coefficient, Tensor row_max, Tensor sum_exp,
                            Tensor logprob, Tensor grad, int64_t ignore_index, double label_smoothing, double z_loss,
                            double softcap, double logit_scale) {
  const CrossEntropyRows rows =
      cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob, grad,
                         {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  if (rows.grad != rows.logits) advise_huge_pages(rows.grad, grad.numel() * grad.element_size());
  torch::stable::parallel_for(0, rows.count, row_grain(rows.vocab), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(cross_entropy_rows_bwd, rows, begin, end);
  });
}

void random_stream(Tensor seed, OptionalTensor row_ids, int64_t sample, int64_t stream, Tensor out) {
  const RandomStream numbers = random_stream_arguments(seed, row_ids, sample, stream, out);
  advise_huge_pages(numbers.out, out.numel() * out.element_size());
  const int64_t groups = numbers.rows * ((numbers.columns + 3) / 4);
  torch::stable::parallel_for(0, groups, kGrain / 4, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(random_stream, numbers, begin, end);
  });
}

void advise_output(const OptionalTensor& tensor) {
  if (tensor) advise_huge_pages(tensor->mutable_data_ptr(), tensor->numel() * tensor->element_size());
}

// Tasks that are worth handing to another thread.
int64_t gaussian_grain(const Gaussian& inputs, bool has_sums) {
  const int64_t columns = inputs.columns < kGaussianChunk ? inputs.columns : kGaussianChunk;
  const int64_t task = gaussian_rows_of_task(inputs, has_sums) * columns * (inputs.samples > 1 ? inputs.samples : 1);
  return kGrain / task + 1;
}

void gaussian_fwd(Tensor mean, Tensor logvar, OptionalTensor prior_mean, OptionalTensor prior_logvar,
                  OptionalTensor row_ids, OptionalTensor seed, double free_bits, double low, double high,
                  OptionalTensor z, OptionalTensor kl, bool by_row, OptionalTensor statistics) {
  const Gaussian inputs =
      gaussian_arguments(mean, logvar, prior_mean, prior_logvar, row_ids, seed, free_bits, low, high);
  const GaussianForward forward = gaussian_forward(inputs, mean, z, kl, by_row, statistics, kGaussianChunk);
  advise_output(z);
  advise_output(kl);
  const bool sums = has_sums(forward);
  torch::stable::parallel_for(
      0, gaussian_tasks(inputs, sums), gaussian_grain(forward.inputs, sums),
      [&](int64_t begin, int64_t end) { SSLKERNELS_CALL_ISA(gaussian_fwd, forward, begin, end); });
}

void gaussian_bwd(Tensor mean, Tensor logvar, OptionalTensor prior_mean, OptionalTensor prior_logvar,
                  OptionalTensor row_ids, OptionalTensor seed, double free_bits, double low, double high,
                  OptionalTensor grad_z, OptionalTensor grad_kl, bool by_row, OptionalTensor grad_mean,
                  OptionalTensor grad_logvar, OptionalTensor grad_prior_mean, OptionalTensor grad_prior_logvar) {
  const Gaussian inputs =
      gaussian_arguments(mean, logvar, prior_mean, prior_logvar, row_ids, seed, free_bits, low, high);
  const GaussianBackward backward = gaussian_backward(inputs, mean, grad_z, grad_kl, by_row, grad_mean, grad_logvar,
                                                      grad_prior_mean, grad_prior_logvar);
  for (const OptionalTensor& gradient : {grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar}) {
    advise_output(gradient);
  }
  const bool sums = has_sums(backward);
  torch::stable::parallel_for(
      0, gaussian_tasks(inputs, sums), gaussian_grain(backward.inputs, sums),
      [&](int64_t begin, int64_t end) { SSLKERNELS_CALL_ISA(gaussian_bwd, backward, begin, end); });
}

// A row of the accumulation type for each thread.
template <class Run>
void over_gumbel_rows(const GumbelRows& rows, Run run) {
  torch::stable::parallel_for(0, rows.rows, row_grain(rows.columns), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(
        new double[rows.element == Element::kDouble ? rows.columns : (rows.columns + 1) / 2]);
    run(begin, end, scratch.get());
  });
}

void gumbel_rows_fwd(Tensor logits, OptionalTensor seed, OptionalTensor row_ids, int64_t first_row,
                     OptionalTensor inverse_tau, int64_t output, OptionalTensor y, OptionalTensor index, Tensor max,
                     Tensor sum, OptionalTensor best, OptionalTensor plain_max, OptionalTensor plain_sum) {
  const GumbelForward forward =
      gumbel_forward(gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, plain_max, plain_sum), logits,
                     output, y, index, best);
  if (y) advise_huge_pages(forward.y, y->numel() * y->element_size());
  over_gumbel_rows(forward.rows, [&](int64_t begin, int64_t end, void* scratch) {
    SSLKERNELS_CALL_ISA(gumbel_rows_fwd, forward, begin, end, scratch);
  });
}

void gumbel_rows_bwd(OptionalTensor grad, OptionalTensor uses, OptionalTensor mask, Tensor logits, OptionalTensor seed,
                     OptionalTensor row_ids, int64_t first_row, OptionalTensor inverse_tau, OptionalTensor max,
                     OptionalTensor sum, OptionalTensor plain_max, OptionalTensor plain_sum, Tensor grad_logits) {
  const GumbelBackward backward =
      gumbel_backward(gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, plain_max, plain_sum),
                      logits, grad, uses, mask, grad_logits);
  if (backward.grad != backward.grad_logits) {
    advise_huge_pages(backward.grad_logits, grad_logits.numel() * grad_logits.element_size());
  }
  over_gumbel_rows(backward.rows, [&](int64_t begin, int64_t end, void* scratch) {
    SSLKERNELS_CALL_ISA(gumbel_rows_bwd, backward, begin, end, scratch);
  });
}

void probability_sums(Tensor logits, Tensor plain_max, Tensor plain_sum, OptionalTensor mask, Tensor partial,
                      int64_t chunk_rows) {
  const GumbelRows rows = gumbel_rows(logits, {}, {}, 0, {}, {}, {}, plain_max, plain_sum);
  const ProbabilitySums sums = probability_arguments(rows, logits, mask, partial, chunk_rows);
  torch::stable::parallel_for(
      0, sums.chunks, row_grain(chunk_rows * sums.groups * rows.columns),
      [&](int64_t begin, int64_t end) { SSLKERNELS_CALL_ISA(probability_sums, sums, begin, end); });
}

void sample_rows(Tensor products, OptionalTensor bias, Tensor seed, Tensor row_ids, int64_t first_column, int64_t vocab,
                 double scale, Tensor row_max, Tensor sum_exp, Tensor best, Tensor logit, Tensor index) {
  const SampleRows sample = sample_rows_arguments(products, bias, seed, row_ids, first_column, vocab, scale, row_max,
                                                  sum_exp, best, logit, index);
  torch::stable::parallel_for(0, sample.rows, row_grain(sample.columns), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(sample_rows, sample, begin, end);
  });
}

void mask_tokens(Tensor input_ids, Tensor seed, OptionalTensor special_mask, OptionalTensor word_ids,
                 OptionalTensor row_ids, Tensor ranges, Tensor output_ids, Tensor labels, int64_t select, int64_t stay,
                 int64_t enter, int64_t to_mask, int64_t to_random, int64_t mask_id, int64_t allowed,
                 int64_t ignore_index, bool chained) {
  const MaskRule rule = mask_rule(ranges, select, stay, enter, to_mask, to_random, mask_id, allowed, ignore_index);
  const MaskTokens tokens =
      mask_tokens_arguments(input_ids, seed, special_mask, word_ids, row_ids, output_ids, labels, chained, rule);
  if (tokens.columns == 0) return;
  advise_huge_pages(tokens.output_ids, output_ids.numel() * output_ids.element_size());
  advise_huge_pages(tokens.labels, labels.numel() * labels.element_size());
  if (chained) {
    torch::stable::parallel_for(0, tokens.rows, row_grain(tokens.columns), [&](int64_t begin, int64_t end) {
      SSLKERNELS_CALL_ISA(mask_tokens_chained, tokens, begin, end);
    });
  } else {
    const int64_t groups = tokens.rows * ((tokens.columns + 3) / 4);
    torch::stable::parallel_for(0, groups, kGrain / 4, [&](int64_t begin, int64_t end) {
      SSLKERNELS_CALL_ISA(mask_tokens, tokens, begin, end);
    });
  }
}

void own_negatives(Tensor query, Tensor negatives, OptionalTensor mask, OptionalTensor query_inverse_norm,
                   Tensor logit_scale, OptionalTensor logit_bias, int64_t energy, OptionalTensor reference,
                   OptionalTensor coefficient, OptionalTensor smoothing, bool final, Tensor scores, Tensor value,
                   Tensor grad_query, Tensor grad_negatives, Tensor grad_scale, Tensor grad_bias) {
  const OwnNegatives own = own_negatives_arguments(query, negatives, mask, query_inverse_norm, logit_scale, logit_bias,
                                                   energy, reference, coefficient, smoothing, final, scores, value,
                                                   grad_query, grad_negatives, grad_scale, grad_bias);
  if (own.grad_negatives != nullptr) {
    advise_huge_pages(own.grad_negatives, grad_negatives.numel() * grad_negatives.element_size());
  }
  torch::stable::parallel_for(0, own.rows, row_grain(own.count * own.dim), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(own_negatives_scratch_bytes(own) / sizeof(double));
    SSLKERNELS_CALL_ISA(own_negatives, own, begin, end, scratch.data());
  });
}

void scale_add(Tensor input, OptionalTensor scale, Tensor out, bool add) {
  const ScaleAdd arguments = scale_add_arguments(input, scale, out, add);
  torch::stable::parallel_for(0, arguments.count, kGrain, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(scale_add, arguments, begin, end);
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
  if (direction) advise_huge_pages(pairs.direction, direction->numel() * direction->element_size());
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
  advise_huge_pages(sums.out, out.numel() * out.element_size());
  const int64_t work = sums.starts[sums.rows] + sums.rows;
  torch::stable::parallel_for(0, work, row_grain(sums.dim), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(weighted_row_sums, sums, begin, end);
  });
}

void search_codes(Tensor input, Tensor codebook, int64_t metric, double matmul_rounding, OptionalTensor center,
                  int64_t tile_rows, int64_t tile_codes, Tensor index, Tensor score) {
  const CodeSearch search =
      code_search_arguments(input, codebook, metric, matmul_rounding, center, tile_rows, tile_codes, index, score);
  const auto type = type_of_products(search.input, search.codebook);
  torch::stable::parallel_for(0, search.input.rows, search.tile_rows, [&](int64_t begin, int64_t end) {
    if (type == torch::headeronly::ScalarType::Double) {
      search.run<double>(begin, end);
    } else {
      search.run<float>(begin, end);
    }
  });
}

void gather_codes(Tensor input, Tensor codebook, Tensor index, Tensor score, Tensor values, Tensor distance) {
  const CodeGather gather = code_gather_arguments(input, codebook, index, score, values, distance);
  advise_huge_pages(gather.values, values.numel() * values.element_size());
  torch::stable::parallel_for(0, gather.input.rows, row_grain(gather.input.dim), [&](int64_t begin, int64_t end) {
    std::vector<double> work(2 * gather.input.dim);
    SSLKERNELS_CALL_ISA(gather_codes, gather, begin, end, work.data());
  });
}

void code_difference(Tensor coefficient, Tensor input, Tensor codebook, Tensor index, Tensor out) {
  const CodeDifference difference = code_difference_arguments(coefficient, input, codebook, index, out);
  advise_huge_pages(difference.out, out.numel() * out.element_size());
  torch::stable::parallel_for(0, difference.input.rows, row_grain(difference.input.dim),
                              [&](int64_t begin, int64_t end) {
                                std::vector<double> work(2 * difference.input.dim);
                                SSLKERNELS_CALL_ISA(code_difference, difference, begin, end, work.data());
                              });
}

void free_energy_fwd(Tensor energy, Tensor value, OptionalTensor lowest, OptionalTensor total, OptionalTensor winner,
                     double beta, bool minimum) {
  const FreeEnergy energies = free_energy_arguments(energy, value, lowest, total, winner, beta, minimum);
  const int64_t results = energies.outer * energies.inner;
  torch::stable::parallel_for(0, results, row_grain(energies.count), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(free_energy_fwd, energies, begin, end);
  });
}

void free_energy_bwd(Tensor grad_value, OptionalTensor energy, OptionalTensor lowest, OptionalTensor total,
                     OptionalTensor winner, Tensor grad, double beta) {
  const FreeEnergyGradient gradient = free_energy_gradient(grad_value, energy, lowest, total, winner, grad, beta);
  advise_huge_pages(gradient.grad, grad.numel() * grad.element_size());
  const int64_t results = gradient.energies.outer * gradient.energies.inner;
  torch::stable::parallel_for(0, results, row_grain(gradient.energies.count), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(free_energy_bwd, gradient, begin, end);
  });
}

void prediction_energy_fwd(Tensor prediction, Tensor target, Tensor value, OptionalTensor weights, double beta,
                           bool minimum) {
  const PredictionEnergy inputs = prediction_energy_arguments(prediction, target, value, weights, beta, minimum);
  const int64_t rows = inputs.batch * feature_parts(inputs), units = rows * candidate_parts(inputs);
  const Tensor parts = torch::stable::new_empty(value, {rows * inputs.count});
  void* data = parts.mutable_data_ptr();
  const int64_t features = std::min(inputs.dim, kFeaturePart), candidates = std::min(inputs.count, kCandidatePart);
  torch::stable::parallel_for(0, units, row_grain(candidates * features), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(prediction_energy_parts, inputs, data, begin, end);
  });
  const int64_t of_row = feature_parts(inputs) * inputs.count;
  torch::stable::parallel_for(0, inputs.batch, row_grain(of_row), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(prediction_energy_finish, inputs, data, begin, end);
  });
}

void prediction_energy_bwd(Tensor grad_value, Tensor prediction, Tensor target, Tensor weights,
                           OptionalTensor grad_prediction, OptionalTensor grad_target) {
  const PredictionEnergyGradient gradient =
      prediction_energy_gradient(grad_value, prediction, target, weights, grad_prediction, grad_target);
  const PredictionEnergy& inputs = gradient.inputs;
  if (grad_prediction) {
    advise_huge_pages(gradient.grad_prediction, grad_prediction->numel() * grad_prediction->element_size());
  }
  const int64_t grain = row_grain(inputs.count * std::min(inputs.dim, kFeaturePart));
  torch::stable::parallel_for(0, inputs.batch * feature_parts(inputs), grain, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(prediction_energy_bwd, gradient, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(sslkernels_native, m) {
  m.def(
      "cross_entropy_rows_fwd(Tensor logits, Tensor target, Tensor? bias, Tensor? weight, Tensor? weight_sum, "
      "Tensor? coefficient, Tensor(a!) loss, Tensor(b!) row_max, Tensor(c!) sum_exp, Tensor(d!) logprob, "
      "Tensor(e!) prediction, Tensor(f!) entropy, Tensor(g!)? grad, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap, float logit_scale, bool stats) -> ()");
  m.def(
      "cross_entropy_rows_bwd(Tensor logits, Tensor target, Tensor? bias, Tensor? weight, Tensor? weight_sum, "
      "Tensor coefficient, Tensor row_max, Tensor sum_exp, Tensor logprob, Tensor(a!) grad, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, float logit_scale) -> ()");
  m.def(
      "gumbel_rows_fwd(Tensor logits, Tensor? seed, Tensor? row_ids, int first_row, Tensor? inverse_tau, int output, "
      "Tensor(a!)? y, Tensor(b!)? index, Tensor(c!) max, Tensor(d!) sum, Tensor(e!)? best, Tensor(f!)? plain_max, "
      "Tensor(g!)? plain_sum) -> ()");
  m.def(
      "gumbel_rows_bwd(Tensor? grad, Tensor? uses, Tensor? mask, Tensor logits, Tensor? seed, Tensor? row_ids, "
      "int first_row, Tensor? inverse_tau, Tensor? max, Tensor? sum, Tensor? plain_max, Tensor? plain_sum, "
      "Tensor(a!) grad_logits) -> ()");
  m.def(
      "probability_sums(Tensor logits, Tensor plain_max, Tensor plain_sum, Tensor? mask, Tensor(a!) partial, "
      "int chunk_rows) -> ()");
  m.def(
      "sample_rows(Tensor products, Tensor? bias, Tensor seed, Tensor row_ids, int first_column, int vocab, float "
      "scale, "
      "Tensor(a!) row_max, Tensor(b!) sum_exp, Tensor(c!) best, Tensor(d!) logit, Tensor(e!) index) -> ()");
  m.def("random_stream(Tensor seed, Tensor? row_ids, int sample, int stream, Tensor(a!) out) -> ()");
  m.def(
      "gaussian_fwd(Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? row_ids, "
      "Tensor? seed, float free_bits, float low, float high, Tensor(a!)? z, Tensor(b!)? kl, bool by_row, "
      "Tensor(c!)? statistics) -> ()");
  m.def(
      "gaussian_bwd(Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? row_ids, "
      "Tensor? seed, float free_bits, float low, float high, Tensor? grad_z, Tensor? grad_kl, bool by_row, "
      "Tensor(a!)? grad_mean, Tensor(b!)? grad_logvar, Tensor(c!)? grad_prior_mean, "
      "Tensor(d!)? grad_prior_logvar) -> ()");
  m.def(
      "mask_tokens(Tensor input_ids, Tensor seed, Tensor? special_mask, Tensor? word_ids, Tensor? row_ids, "
      "Tensor ranges, Tensor(a!) output_ids, Tensor(b!) labels, int select, int stay, int enter, int to_mask, "
      "int to_random, int mask_id, int allowed, int ignore_index, bool chained) -> ()");
  m.def(
      "own_negatives(Tensor query, Tensor negatives, Tensor? mask, Tensor? query_inverse_norm, Tensor logit_scale, "
      "Tensor? logit_bias, int energy, Tensor? reference, Tensor? coefficient, Tensor? smoothing, bool final, "
      "Tensor(a!) scores, Tensor(b!) value, Tensor(c!) grad_query, Tensor(d!) grad_negatives, Tensor(e!) grad_scale, "
      "Tensor(f!) grad_bias) -> ()");
  m.def("scale_add(Tensor input, Tensor? scale, Tensor(a!) out, bool add) -> ()");
  m.def(
      "pair_row_sums(Tensor products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? threshold, Tensor? positive_score, Tensor? "
      "cosine_row_norm, Tensor? cosine_column_norm, Tensor(a!)? max, Tensor(b!) sum, Tensor(c!)? active, "
      "Tensor(d!)? score_sum, Tensor(e!)? positive_sum, Tensor(f!)? spread, Tensor(g!)? beaten) -> ()");
  m.def(
      "pair_column_sums(Tensor products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? threshold, Tensor(a!)? max, Tensor(b!) sum, "
      "Tensor(c!)? active, Tensor(d!)? score_sum, Tensor(e!)? positive_sum) -> ()");
  m.def(
      "pair_gradient(Tensor(a!) products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? row_weight, Tensor? row_reference, Tensor? "
      "row_share, Tensor? row_smoothing, Tensor? column_weight, Tensor? column_reference, Tensor? column_share, "
      "Tensor? column_smoothing, Tensor(b!) dot, Tensor(c!) total) -> ()");
  m.def(
      "negative_sampling_fwd(Tensor center, Tensor context, Tensor negatives, Tensor center_weight, "
      "Tensor context_weight, Tensor(a!) loss, Tensor(b!)? slopes, Tensor(c!)? direction, bool exclude_positive) -> "
      "()");
  m.def("sort_rows(Tensor keys, Tensor(a!) order, Tensor(b!) starts) -> ()");  // on a GPU torch's own sort will do
  m.def(
      "weighted_row_sums(Tensor starts, Tensor order, Tensor coefficient, Tensor source, Tensor? source_index, "
      "Tensor(a!) out, int entries_of_source) -> ()");
  m.def(
      "search_codes(Tensor input, Tensor codebook, int metric, float matmul_rounding, Tensor? center, int tile_rows, "
      "int tile_codes, Tensor(a!) index, Tensor(b!) score) -> ()");
  m.def(
      "gather_codes(Tensor input, Tensor codebook, Tensor index, Tensor score, Tensor(a!) values, "
      "Tensor(b!) distance) -> ()");
  m.def("code_difference(Tensor coefficient, Tensor input, Tensor codebook, Tensor index, Tensor(a!) out) -> ()");
  m.def(
      "free_energy_fwd(Tensor energy, Tensor(a!) value, Tensor(b!)? lowest, Tensor(c!)? total, Tensor(d!)? winner, "
      "float beta, bool minimum) -> ()");
  m.def(
      "free_energy_bwd(Tensor grad_value, Tensor? energy, Tensor? lowest, Tensor? total, Tensor? winner, "
      "Tensor(a!) grad, float beta) -> ()");
  m.def(
      "prediction_energy_fwd(Tensor prediction, Tensor target, Tensor(a!) value, Tensor(b!)? weights, float beta, "
      "bool minimum) -> ()");
  m.def(
      "prediction_energy_bwd(Tensor grad_value, Tensor prediction, Tensor target, Tensor weights, "
      "Tensor(a!)? grad_prediction, Tensor(b!)? grad_target) -> ()");
  m.def("column_sums(Tensor values, Tensor(a!) total, bool add) -> ()");  // on a CPU torch's own sum will do
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  m.impl("cross_entropy_rows_fwd", TORCH_BOX(&cross_entropy_rows_fwd));
  m.impl("cross_entropy_rows_bwd", TORCH_BOX(&cross_entropy_rows_bwd));
  m.impl("gumbel_rows_fwd", TORCH_BOX(&gumbel_rows_fwd));
  m.impl("gumbel_rows_bwd", TORCH_BOX(&gumbel_rows_bwd));
  m.impl("probability_sums", TORCH_BOX(&probability_sums));
  m.impl("random_stream", TORCH_BOX(&random_stream));
  m.impl("gaussian_fwd", TORCH_BOX(&gaussian_fwd));
  m.impl("gaussian_bwd", TORCH_BOX(&gaussian_bwd));
  m.impl("sample_rows", TORCH_BOX(&sample_rows));
  m.impl("mask_tokens", TORCH_BOX(&mask_tokens));
  m.impl("own_negatives", TORCH_BOX(&own_negatives));
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("pair_row_sums", TORCH_BOX(&pair_row_sums));
  m.impl("pair_column_sums", TORCH_BOX(&pair_column_sums));
  m.impl("pair_gradient", TORCH_BOX(&pair_gradient));
  m.impl("negative_sampling_fwd", TORCH_BOX(&negative_sampling_fwd));
  m.impl("sort_rows", TORCH_BOX(&sort_rows));
  m.impl("weighted_row_sums", TORCH_BOX(&weighted_row_sums));
  m.impl("search_codes", TORCH_BOX(&search_codes));
  m.impl("gather_codes", TORCH_BOX(&gather_codes));
  m.impl("code_difference", TORCH_BOX(&code_difference));
  m.impl("free_energy_fwd", TORCH_BOX(&free_energy_fwd));
  m.impl("free_energy_bwd", TORCH_BOX(&free_energy_bwd));
  m.impl("prediction_energy_fwd", TORCH_BOX(&prediction_energy_fwd));
  m.impl("prediction_energy_bwd", TORCH_BOX(&prediction_energy_bwd));
}

}  // namespace sslkernels
