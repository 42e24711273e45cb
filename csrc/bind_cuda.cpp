// The CUDA implementations of the operators that bind_schemas.cpp declares: device guard, stream, launch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "contrastive/negative_sampling.h"
#include "contrastive/negative_sampling_bind.h"
#include "contrastive/query_negatives.h"
#include "contrastive/query_negatives_bind.h"
#include "core/bind.h"
#include "core/column_sums.h"
#include "core/scale_add.h"
#include "core/segment_sums.h"
#include "latent/free_energy.h"
#include "latent/free_energy_bind.h"
#include "latent/gaussian.h"
#include "latent/gaussian_bind.h"
#include "latent/gumbel.h"
#include "latent/gumbel_bind.h"
#include "latent/prediction_energy.h"
#include "latent/vector_quantize.h"
#include "latent/vector_quantize_bind.h"
#include "random/random_stream.h"
#include "vocabulary/cross_entropy.h"
#include "vocabulary/mask_tokens.h"
#include "vocabulary/mask_tokens_bind.h"
#include "vocabulary/sample_rows.h"
#include "vocabulary/sample_rows_bind.h"

namespace sslkernels {
namespace {

using torch::stable::Tensor;

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Of libtorch_cuda, which this object cannot be linked to, for it also loads beside a torch without CUDA. Python has
// loaded that library for itself alone, so that its symbols are found in it, and not by their names.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

void* current_stream(const Tensor& tensor) {
  static const CurrentStream current = find_current_stream();
  STD_TORCH_CHECK(current != nullptr,
                  "sslkernels: aoti_torch_get_current_cuda_stream was not found in libtorch_cuda.so");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "sslkernels: no current CUDA stream");
  return stream;
}

void cross_entropy_rows_fwd(Tensor logits, Tensor target, OptionalTensor bias, OptionalTensor weight,
                            OptionalTensor weight_sum, OptionalTensor coefficient, Tensor loss, Tensor row_max,
                            Tensor sum_exp, Tensor logprob, Tensor prediction, Tensor entropy, OptionalTensor grad,
                            int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                            double logit_scale, bool stats) {
  CrossEntropyRows rows =
      cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob, grad,
                         {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  add_forward_outputs(rows, logits, loss, prediction, entropy, stats);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_cross_entropy_rows_fwd(rows, current_stream(logits));
}

void cross_entropy_rows_bwd(Tensor logits, Tensor target, OptionalTensor bias, OptionalTensor weight,
                            OptionalTensor weight_sum, Tensor coefficient, Tensor row_max, Tensor sum_exp,
                            Tensor logprob, Tensor grad, int64_t ignore_index, double label_smoothing, double z_loss,
                            double softcap, double logit_scale) {
  const CrossEntropyRows rows =
      cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob, grad,
                         {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_cross_entropy_rows_bwd(rows, current_stream(logits));
}

void random_stream(Tensor seed, OptionalTensor row_ids, int64_t sample, int64_t stream, Tensor out) {
  const RandomStream numbers = random_stream_arguments(seed, row_ids, sample, stream, out);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  launch_random_stream(numbers, current_stream(out));
}

void gaussian_fwd(Tensor mean, Tensor logvar, OptionalTensor prior_mean, OptionalTensor prior_logvar,
                  OptionalTensor row_ids, OptionalTensor seed, double free_bits, double low, double high,
                  OptionalTensor z, OptionalTensor kl, bool by_row, OptionalTensor statistics) {
  const Gaussian inputs =
      gaussian_arguments(mean, logvar, prior_mean, prior_logvar, row_ids, seed, free_bits, low, high);
  const GaussianForward forward =
      gaussian_forward(inputs, mean, z, kl, by_row, statistics, gaussian_columns_of_sum(inputs.element));
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  launch_gaussian_fwd(forward, current_stream(mean));
}

void gaussian_bwd(Tensor mean, Tensor logvar, OptionalTensor prior_mean, OptionalTensor prior_logvar,
                  OptionalTensor row_ids, OptionalTensor seed, double free_bits, double low, double high,
                  OptionalTensor grad_z, OptionalTensor grad_kl, bool by_row, OptionalTensor grad_mean,
                  OptionalTensor grad_logvar, OptionalTensor grad_prior_mean, OptionalTensor grad_prior_logvar) {
  const Gaussian inputs =
      gaussian_arguments(mean, logvar, prior_mean, prior_logvar, row_ids, seed, free_bits, low, high);
  const GaussianBackward backward = gaussian_backward(inputs, mean, grad_z, grad_kl, by_row, grad_mean, grad_logvar,
                                                      grad_prior_mean, grad_prior_logvar);
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  launch_gaussian_bwd(backward, current_stream(mean));
}

void gumbel_rows_fwd(Tensor logits, OptionalTensor seed, OptionalTensor row_ids, int64_t first_row,
                     OptionalTensor inverse_tau, int64_t output, OptionalTensor y, OptionalTensor index, Tensor max,
                     Tensor sum, OptionalTensor best, OptionalTensor plain_max, OptionalTensor plain_sum) {
  const GumbelForward forward =
      gumbel_forward(gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, plain_max, plain_sum), logits,
                     output, y, index, best);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_gumbel_rows_fwd(forward, current_stream(logits));
}

void gumbel_rows_bwd(OptionalTensor grad, OptionalTensor uses, OptionalTensor mask, Tensor logits, OptionalTensor seed,
                     OptionalTensor row_ids, int64_t first_row, OptionalTensor inverse_tau, OptionalTensor max,
                     OptionalTensor sum, OptionalTensor plain_max, OptionalTensor plain_sum, Tensor grad_logits) {
  const GumbelBackward backward =
      gumbel_backward(gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, plain_max, plain_sum),
                      logits, grad, uses, mask, grad_logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_gumbel_rows_bwd(backward, current_stream(logits));
}

void probability_sums(Tensor logits, Tensor plain_max, Tensor plain_sum, OptionalTensor mask, Tensor partial,
                      int64_t chunk_rows) {
  const GumbelRows rows = gumbel_rows(logits, {}, {}, 0, {}, {}, {}, plain_max, plain_sum);
  const ProbabilitySums sums = probability_arguments(rows, logits, mask, partial, chunk_rows);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_probability_sums(sums, current_stream(logits));
}

void sample_rows(Tensor products, OptionalTensor bias, Tensor seed, Tensor row_ids, int64_t first_column, int64_t vocab,
                 double scale, Tensor row_max, Tensor sum_exp, Tensor best, Tensor logprob, Tensor index) {
  const SampleRows sample = sample_rows_arguments(products, bias, seed, row_ids, first_column, vocab, scale, row_max,
                                                  sum_exp, best, logprob, index);
  const torch::stable::accelerator::DeviceGuard guard(products.get_device_index());
  launch_sample_rows(sample, current_stream(products));
}

void mask_tokens(Tensor input_ids, Tensor seed, OptionalTensor special_mask, OptionalTensor word_ids,
                 OptionalTensor row_ids, Tensor ranges, Tensor output_ids, Tensor labels, int64_t select, int64_t stay,
                 int64_t enter, int64_t to_mask, int64_t to_random, int64_t mask_id, int64_t allowed,
                 int64_t ignore_index, bool chained) {
  const MaskRule rule = mask_rule(ranges, select, stay, enter, to_mask, to_random, mask_id, allowed, ignore_index);
  const MaskTokens tokens =
      mask_tokens_arguments(input_ids, seed, special_mask, word_ids, row_ids, output_ids, labels, chained, rule);
  const torch::stable::accelerator::DeviceGuard guard(input_ids.get_device_index());
  OptionalTensor device_ranges;
  if (rule.range_count > kInlineRanges) device_ranges = torch::stable::new_empty(seed, {ranges.numel()});
  launch_mask_tokens(tokens, device_ranges ? device_ranges->mutable_data_ptr<int64_t>() : nullptr,
                     current_stream(input_ids));
}

void own_negatives(Tensor query, Tensor negatives, OptionalTensor mask, OptionalTensor query_inverse_norm,
                   Tensor logit_scale, OptionalTensor logit_bias, int64_t energy, OptionalTensor reference,
                   OptionalTensor coefficient, OptionalTensor smoothing, bool final, Tensor scores, Tensor value,
                   Tensor grad_query, Tensor grad_negatives, Tensor grad_scale, Tensor grad_bias) {
  const OwnNegatives own = own_negatives_arguments(query, negatives, mask, query_inverse_norm, logit_scale, logit_bias,
                                                   energy, reference, coefficient, smoothing, final, scores, value,
                                                   grad_query, grad_negatives, grad_scale, grad_bias);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  launch_own_negatives(own, current_stream(query));
}

void scale_add(Tensor input, OptionalTensor scale, Tensor out, bool add) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  launch_scale_add(scale_add_arguments(input, scale, out, add), current_stream(out));
}

void column_sums(Tensor values, Tensor total, bool add) {
  check_matrix(values, "values");
  check_vector(total, values.size(1), accumulation_type(values), "total");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  ColumnSums sums{element_of(values),       values.const_data_ptr(),
                  values.stride(0),         values.size(0),
                  values.size(1),           nullptr,
                  total.mutable_data_ptr(), add};
  const Tensor partials = torch::stable::new_empty(total, {column_sums_row_blocks(sums), sums.columns});
  sums.partials = partials.mutable_data_ptr();
  launch_column_sums(sums, current_stream(values));
}

void negative_sampling_fwd(Tensor center, Tensor context, Tensor negatives, Tensor center_weight, Tensor context_weight,
                           Tensor loss, OptionalTensor slopes, OptionalTensor direction, bool exclude_positive) {
  const NegativeSampling pairs = negative_sampling_arguments(center, context, negatives, center_weight, context_weight,
                                                             loss, slopes, direction, exclude_positive);
  const torch::stable::accelerator::DeviceGuard guard(center.get_device_index());
  launch_negative_sampling_fwd(pairs, current_stream(center));
}

void weighted_row_sums(Tensor starts, Tensor order, Tensor coefficient, Tensor source, OptionalTensor source_index,
                       Tensor out, int64_t entries_of_source) {
  const WeightedRowSums sums =
      row_sums_arguments(starts, order, coefficient, source, source_index, out, entries_of_source);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const Tensor partials = torch::stable::new_empty(coefficient, {row_sums_partials(sums)});
  launch_weighted_row_sums(sums, partials.mutable_data_ptr(), current_stream(out));
}

// What searches on a stream.
struct CodeSearchOnCuda {
  static constexpr bool kGain = true;
  static constexpr int64_t kPitch = 4;  // 16 bytes of the products and more
  const Tensor& input;
  void* stream;
  std::vector<Tensor> buffers;

  template <class A>
  A* buffer(int64_t count) {
    using torch::headeronly::ScalarType;
    if (count == 0) return nullptr;
    const ScalarType type = sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
    buffers.push_back(torch::stable::new_empty(input, {count}, type));
    return static_cast<A*>(buffers.back().mutable_data_ptr());
  }
  void code_tile(const CodeTile& tile) { launch_code_tile(tile, stream); }
  template <class A>
  void multiply(const CodeVectors& a, const CodeVectors& b, A* products, int64_t pitch) {
    multiply_vectors(a, b, products, pitch, input.device());
  }
  void best_codes(const CodeScores& scores) { launch_best_codes(scores, stream); }
};

void search_codes(Tensor input, Tensor codebook, int64_t metric, double matmul_rounding, OptionalTensor center,
                  bool as_given, int64_t tile_rows, int64_t tile_codes, Tensor index, Tensor score) {
  const CodeSearch search = code_search_arguments(input, codebook, metric, matmul_rounding, center, as_given, tile_rows,
                                                  tile_codes, index, score);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  CodeSearchOnCuda cuda{input, current_stream(input), {}};
  if (type_of_products(search.input, search.codebook) == torch::headeronly::ScalarType::Double) {
    search_in_tiles<double>(search, 0, search.input.rows, cuda);
  } else {
    search_in_tiles<float>(search, 0, search.input.rows, cuda);
  }
}

void gather_codes(Tensor input, Tensor codebook, Tensor index, Tensor score, Tensor values, Tensor distance) {
  const CodeGather gather = code_gather_arguments(input, codebook, index, score, values, distance);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  launch_gather_codes(gather, current_stream(input));
}

void code_difference(Tensor coefficient, Tensor input, Tensor codebook, Tensor index, Tensor out) {
  const CodeDifference difference = code_difference_arguments(coefficient, input, codebook, index, out);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  launch_code_difference(difference, current_stream(input));
}

void free_energy_fwd(Tensor energy, Tensor value, OptionalTensor lowest, OptionalTensor total, OptionalTensor winner,
                     double beta, bool minimum) {
  const FreeEnergy energies = free_energy_arguments(energy, value, lowest, total, winner, beta, minimum);
  const torch::stable::accelerator::DeviceGuard guard(energy.get_device_index());
  launch_free_energy_fwd(energies, current_stream(energy));
}

void free_energy_bwd(Tensor grad_value, OptionalTensor energy, OptionalTensor lowest, OptionalTensor total,
                     OptionalTensor winner, Tensor grad, double beta) {
  const FreeEnergyGradient gradient = free_energy_gradient(grad_value, energy, lowest, total, winner, grad, beta);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  launch_free_energy_bwd(gradient, current_stream(grad));
}

void prediction_energy_fwd(Tensor prediction, Tensor target, Tensor value, OptionalTensor weights, double beta,
                           bool minimum) {
  const PredictionEnergy inputs = prediction_energy_arguments(prediction, target, value, weights, beta, minimum);
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  const PredictionEnergyPlan plan = plan_prediction_energy(inputs);
  const Tensor workspace = torch::stable::new_empty(value, {workspace_of(inputs, plan)});
  launch_prediction_energy_fwd(inputs, plan, workspace.mutable_data_ptr(), current_stream(prediction));
}

void prediction_energy_bwd(Tensor grad_value, Tensor prediction, Tensor target, Tensor weights,
                           OptionalTensor grad_prediction, OptionalTensor grad_target) {
  const PredictionEnergyGradient gradient =
      prediction_energy_gradient(grad_value, prediction, target, weights, grad_prediction, grad_target);
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  const PredictionEnergyGradientPlan plan = plan_prediction_energy_bwd(gradient);
  const Tensor workspace = torch::stable::new_empty(grad_value, {workspace_of(gradient, plan)});
  launch_prediction_energy_bwd(gradient, plan, workspace.mutable_data_ptr(), current_stream(prediction));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
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
  m.impl("column_sums", TORCH_BOX(&column_sums));
  m.impl("negative_sampling_fwd", TORCH_BOX(&negative_sampling_fwd));
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
