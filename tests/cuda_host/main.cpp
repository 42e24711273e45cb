// Runs the CUDA launchers on the host: main CALLS RESULTS.
//
// An operation is one line of kOperations. Its arguments are a struct that derives from the launcher's argument struct
// and lists its fields, which a call gives under the same names (fields.h).
#include <algorithm>
#include <iterator>

#include "code_calls.h"
#include "contrastive/glove.h"
#include "contrastive/negative_sampling.h"
#include "contrastive/query_negatives.h"
#include "core/column_sums.h"
#include "core/cuda/launch.h"
#include "core/scale_add.h"
#include "core/segment_sums.h"
#include "device_host.h"
#include "fields.h"
#include "latent/free_energy.h"
#include "latent/gaussian.h"
#include "latent/gumbel.h"
#include "latent/prediction_energy.h"
#include "planted.h"
#include "random/alias_table.h"
#include "random/random_stream.h"
#include "vocabulary/cross_entropy.h"
#include "vocabulary/distillation.h"
#include "vocabulary/mask_tokens.h"
#include "vocabulary/sample_rows.h"

namespace {

using namespace sslkernels;
using cuda_host::Array;
using cuda_host::Call;
using cuda_host::read_field;

struct CrossEntropyCall : CrossEntropyRows {
  explicit CrossEntropyCall(const Call& call) : CrossEntropyRows{} {
    FIELDS(call, element, logits, logits_stride, count, vocab, target, wide_target, bias, weight, weight_sum,
           coefficient, loss, row_max, sum_exp, logprob, prediction, entropy, grad, grad_stride, options.ignore_index,
           options.label_smoothing, options.z_loss, options.softcap, options.logit_scale);
    if (call.integer("in_place") != 0) {
      grad = const_cast<void*>(logits);
      grad_stride = logits_stride;
    }
  }
};

struct AliasDrawCall : AliasDraw {
  explicit AliasDrawCall(const Call& call) : AliasDraw{} {
    FIELDS(call, size, row_ids, seed, rows, columns, out);
    buckets = reinterpret_cast<const AliasBucket*>(call.array<int32_t>("table"));
  }
};

struct RandomStreamCall : RandomStream {
  explicit RandomStreamCall(const Call& call) : RandomStream{} {
    FIELDS(call, row_ids, seed, rows, columns, sample, stream, element, out);
  }
};

struct GaussianCall : Gaussian {
  explicit GaussianCall(const Call& call) : Gaussian{} {
    FIELDS(call, element, rows, columns, samples, row_ids, seed, free_bits, low, high);
    const auto read_rows = [&](const std::string& key, GaussianRows& read) {
      read_field(call, key, read.data);
      if (read.data == nullptr) return;
      read_field(call, key + "_shared", read.shared);
      if (!read.shared) read_field(call, key + "_stride", read.stride);
    };
    read_rows("mean", mean);
    read_rows("logvar", logvar);
    read_rows("prior_mean", prior_mean);
    read_rows("prior_logvar", prior_logvar);
  }
};

struct GaussianForwardCall : GaussianForward {
  explicit GaussianForwardCall(const Call& call) : GaussianForward{} {
    inputs = GaussianCall(call);
    FIELDS(call, z, z_strides.row_stride, z_strides.sample_stride, kl, by_row, statistics);
    const int64_t columns = gaussian_columns_per_sum_cuda(inputs.element);
    kl_parts = (inputs.columns + columns - 1) / columns;
  }
};

struct GaussianBackwardCall : GaussianBackward {
  explicit GaussianBackwardCall(const Call& call) : GaussianBackward{} {
    inputs = GaussianCall(call);
    FIELDS(call, grad_z, z_strides.row_stride, z_strides.sample_stride, grad_kl, kl_stride, by_row, grad_mean,
           grad_logvar, grad_prior_mean, grad_prior_logvar);
  }
};

struct GumbelRowsCall : GumbelRows {
  explicit GumbelRowsCall(const Call& call) : GumbelRows{} {
    FIELDS(call, element, logits, logits_stride, rows, columns, seed, row_ids, first_row, inverse_tau, state.max,
           state.sum);
    read_field(call, "softmax_max", softmax_state.max);
    read_field(call, "softmax_sum", softmax_state.sum);
  }
};

struct GumbelForwardCall : GumbelForward {
  explicit GumbelForwardCall(const Call& call) : GumbelForward{} {
    rows = GumbelRowsCall(call);
    FIELDS(call, output, y, index, argmax);
  }
};

struct GumbelBackwardCall : GumbelBackward {
  explicit GumbelBackwardCall(const Call& call) : GumbelBackward{} {
    rows = GumbelRowsCall(call);
    FIELDS(call, grad, wide_grad, grad_stride, grad_usage, mask, groups, grad_logits);
    if (call.integer("in_place") != 0) grad = grad_logits;
  }
};

struct ProbabilitySumsCall : ProbabilitySums {
  explicit ProbabilitySumsCall(const Call& call) : ProbabilitySums{} {
    rows = GumbelRowsCall(call);
    FIELDS(call, mask, groups, chunk_rows, chunks, partial);
  }
};

struct MaskTokensCall : MaskTokens {
  explicit MaskTokensCall(const Call& call) : MaskTokens{} {
    FIELDS(call, input_ids, wide_ids, special_mask, word_ids, wide_words, row_ids, seed, rows, columns, output_ids,
           labels, chained, rule.select, rule.stay, rule.enter, rule.to_mask, rule.to_random, rule.mask_id,
           rule.allowed, rule.ignore_index, rule.ranges, rule.range_count);
  }
};

struct ScaleAddCall : ScaleAdd {
  explicit ScaleAddCall(const Call& call) : ScaleAdd{} {
    FIELDS(call, input_element, out_element, input, out, count, scale, wide_scale, add);
    if (call.integer("in_place") != 0) input = out;
  }
};

struct ColumnSumsCall : ColumnSums {
  explicit ColumnSumsCall(const Call& call) : ColumnSums{} {
    FIELDS(call, element, values, stride, rows, columns, total, add);
  }
};

struct SampleRowsCall : SampleRows {
  explicit SampleRowsCall(const Call& call) : SampleRows{} {
    FIELDS(call, element, products, stride, rows, vocab, bias, scale, draw, row_ids, seed, row_max, sum_exp, best,
           logprob, index);
  }
};

struct TeacherRowsCall : TeacherRows {
  explicit TeacherRowsCall(const Call& call) : TeacherRows{} {
    FIELDS(call, element, logits, stride, count, vocab, offset, scale, others, best);
  }
};

struct DistillationRowsCall : DistillationRows {
  explicit DistillationRowsCall(const Call& call) : DistillationRows{} {
    FIELDS(call, element, logits, stride, count, vocab, offset, scale, teacher, teacher_stride, teachers,
           teacher_others, teacher_best, index, share, choices, coefficient, loss, gap, teacher_entropy,
           student_entropy, agreement, grad, grad_stride, grad_element, divergence);
    if (call.integer("in_place") != 0) {
      grad = logits;
      grad_stride = stride;
    }
  }
};

struct QueryNegativesCall : QueryNegatives {
  explicit QueryNegativesCall(const Call& call) : QueryNegatives{} {
    FIELDS(call, element, query, negatives, rows, count, dim, index, wide_index, bank, table_rows, bank_rows, mask,
           query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing, final, scores, value,
           grad_query, grad_negatives, grad_scale, grad_bias);
  }
};

struct NegativeSamplingCall : NegativeSampling {
  explicit NegativeSamplingCall(const Call& call) : NegativeSampling{} {
    FIELDS(call, element, center_weight, context_weight, center_rows, context_rows, dim, center, context, negatives,
           wide_index, count, negative_count, exclude_positive, loss, slopes, direction);
  }
};

struct GloveCall : Glove {
  explicit GloveCall(const Call& call) : Glove{} {
    FIELDS(call, element, center_weight, context_weight, center_bias, context_bias, center_rows, context_rows, dim,
           center, context, wide_index, count, target, weight, loss, slope);
  }
};

struct WeightedRowSumsCall : WeightedRowSums {
  explicit WeightedRowSumsCall(const Call& call) : WeightedRowSums{} {
    FIELDS(call, source_element, out_element, starts, order, coefficient, source, source_index, wide_index,
           entries_of_source, source_rows, entries, rows, dim, out);
  }
};

struct FreeEnergyCall : FreeEnergy {
  explicit FreeEnergyCall(const Call& call) : FreeEnergy{} {
    FIELDS(call, element, energy, outer, count, inner, outer_stride, count_stride, inner_stride, minimum, beta, value,
           lowest, total, winner);
  }
};

struct FreeEnergyGradientCall : FreeEnergyGradient {
  explicit FreeEnergyGradientCall(const Call& call) : FreeEnergyGradient{} {
    energies = FreeEnergyCall(call);
    FIELDS(call, grad);
    read_field(call, "grad_value", energies.value);
    read_field(call, "grad_outer_stride", outer_stride);
    read_field(call, "grad_count_stride", count_stride);
    read_field(call, "grad_inner_stride", inner_stride);
  }
};

struct PredictionEnergyCall : PredictionEnergy {
  explicit PredictionEnergyCall(const Call& call) : PredictionEnergy{} {
    FIELDS(call, element, prediction, batch_stride, count_stride, target, target_stride, batch, count, dim, minimum,
           beta, value, weights, energies);
  }
};

struct PredictionEnergyGradientCall : PredictionEnergyGradient {
  explicit PredictionEnergyGradientCall(const Call& call) : PredictionEnergyGradient{} {
    inputs = PredictionEnergyCall(call);
    FIELDS(call, grad_prediction, grad_target);
    read_field(call, "grad_batch_stride", batch_stride);
    read_field(call, "grad_count_stride", count_stride);
  }
};

Array workspace(int64_t count, Element element) { return Array(count * bytes_of(accumulation_element(element))); }

template <class Arguments, auto launcher>
void run(const Call& call) {
  launcher(Arguments(call), nullptr);
}

void mask_tokens(const Call& call) {
  launch_mask_tokens(MaskTokensCall(call), call.array<int64_t>("device_ranges"), nullptr);
}

void column_sums(const Call& call) {
  ColumnSumsCall sums(call);
  const Array partials = workspace(column_sums_row_blocks(sums) * sums.columns, sums.element);
  sums.partials = partials.data();
  launch_column_sums(sums, nullptr);
}

void weighted_row_sums(const Call& call) {
  const WeightedRowSumsCall sums(call);
  const Array partials = workspace(row_sums_partials(sums), sums.out_element);
  launch_weighted_row_sums(sums, partials.data(), nullptr);
}

void prediction_energy_fwd(const Call& call) {
  const PredictionEnergyCall inputs(call);
  const auto plan = plan_prediction_energy(inputs);
  const Array parts = workspace(workspace_of(inputs, plan), inputs.element);
  launch_prediction_energy_fwd(inputs, plan, parts.data(), nullptr);
}

void prediction_energy_bwd(const Call& call) {
  const PredictionEnergyGradientCall gradient(call);
  const auto plan = plan_prediction_energy_bwd(gradient);
  const Array parts = workspace(workspace_of(gradient, plan), gradient.inputs.element);
  launch_prediction_energy_bwd(gradient, plan, parts.data(), nullptr);
}

// Tile after tile, as in linear_sample.
void sample_rows(const Call& call) {
  SampleRowsCall sample(call);
  const char* products = static_cast<const char*>(sample.products);
  const int64_t tile = call.integer("tile");
  for (int64_t first = 0; first < sample.vocab; first += tile) {
    sample.products = products + first * bytes_of(sample.element);
    sample.first_column = first;
    sample.columns = std::min(tile, sample.vocab - first);
    launch_sample_rows(sample, nullptr);
  }
}

// The plan_<op> operations write the plan of a launch to the array `plan`.
void write_plan(const Call& call, std::initializer_list<int64_t> plan) {
  std::copy(plan.begin(), plan.end(), call.array<int64_t>("plan"));
}

void plan_rows(const Call& call) {
  constexpr int64_t kScratch = 1024;
  CrossEntropyRows rows{};
  read_field(call, "element", rows.element);
  read_field(call, "count", rows.count);
  read_field(call, "vocab", rows.vocab);
  read_field(call, "softcap", rows.options.softcap);
  rows.options.logit_scale = 1;
  rows.grad = call.integer("gradient") != 0 ? call.array("plan") : nullptr;
  const auto plan = plan_rows_fwd(rows, kScratch, device_limits());
  write_plan(call, {plan.cached, plan.cluster, plan.threads, plan.shared_bytes});
}

void plan_gumbel_rows(const Call& call) {
  constexpr int kScratch = 1024;
  const auto plan = sslkernels::plan_gumbel_rows(
      call.integer("rows"), call.integer("columns"), int(call.integer("chunk")), int(call.integer("bytes_each")),
      call.integer("twice") != 0, int(call.integer("most_threads")), kScratch, device_limits());
  write_plan(call, {plan.team, plan.threads, plan.cluster, plan.cached, plan.shared_bytes});
}

void plan_sample_rows(const Call& call) {
  const auto plan = sslkernels::plan_sample_rows(call.integer("rows"), call.integer("columns"), device_limits());
  write_plan(call, {plan.team, plan.threads, plan.cluster});
}

void plan_query_negatives(const Call& call) {
  QueryNegativesCall args(call);
  args.coefficient = args.grad_query = args.grad_negatives =
      call.integer("gradient") != 0 ? call.array("plan") : nullptr;
  const auto plan = sslkernels::plan_query_negatives(args, device_limits());
  write_plan(call, {plan.tile, plan.team, plan.pitch, plan.cached, plan.threads, plan.shared_bytes});
}

const std::map<std::string, void (*)(const Call&)> kOperations = {
    {"cross_entropy_rows_fwd", run<CrossEntropyCall, launch_cross_entropy_rows_fwd>},
    {"cross_entropy_rows_bwd", run<CrossEntropyCall, launch_cross_entropy_rows_bwd>},
    {"teacher_rows", run<TeacherRowsCall, launch_teacher_rows>},
    {"distillation_rows", run<DistillationRowsCall, launch_distillation_rows>},
    {"alias_draw", run<AliasDrawCall, launch_alias_draw>},
    {"random_stream", run<RandomStreamCall, launch_random_stream>},
    {"gaussian_fwd", run<GaussianForwardCall, launch_gaussian_fwd>},
    {"gaussian_bwd", run<GaussianBackwardCall, launch_gaussian_bwd>},
    {"gumbel_rows_fwd", run<GumbelForwardCall, launch_gumbel_rows_fwd>},
    {"gumbel_rows_bwd", run<GumbelBackwardCall, launch_gumbel_rows_bwd>},
    {"probability_sums", run<ProbabilitySumsCall, launch_probability_sums>},
    {"query_negatives", run<QueryNegativesCall, launch_query_negatives>},
    {"scale_add", run<ScaleAddCall, launch_scale_add>},
    {"negative_sampling_fwd", run<NegativeSamplingCall, launch_negative_sampling_fwd>},
    {"glove_fwd", run<GloveCall, launch_glove_fwd>},
    {"free_energy_fwd", run<FreeEnergyCall, launch_free_energy_fwd>},
    {"free_energy_bwd", run<FreeEnergyGradientCall, launch_free_energy_bwd>},
    {"mask_tokens", mask_tokens},
    {"column_sums", column_sums},
    {"weighted_row_sums", weighted_row_sums},
    {"prediction_energy_fwd", prediction_energy_fwd},
    {"prediction_energy_bwd", prediction_energy_bwd},
    {"sample_rows", sample_rows},
    {"search_codes", cuda_host::search_codes},
    {"gather_codes", run<cuda_host::CodeGatherCall, launch_gather_codes>},
    {"code_difference", run<cuda_host::CodeDifferenceCall, launch_code_difference>},
    {"plan_rows", plan_rows},
    {"plan_gumbel_rows", plan_gumbel_rows},
    {"plan_sample_rows", plan_sample_rows},
    {"plan_query_negatives", plan_query_negatives},
    {"planted", launch_planted},
};

void set_device(const Call& call) {
  cuda_host::device = {};
  const auto set = [&](const char* key, int& value) {
    if (call.ints.count(key)) value = int(call.integer(key));
  };
  set("processors", cuda_host::device.processors);
  set("shared_per_block", cuda_host::device.shared_per_block);
  set("shared_per_processor", cuda_host::device.shared_per_processor);
  set("shared_reserved", cuda_host::device.shared_reserved);
  set("cache", cuda_host::device.cache);
  set("major", cuda_host::device.major);
  set("largest_cluster", cuda_host::device.largest_cluster);
  set("ptx", cuda_host::device.ptx);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s CALLS RESULTS\n", arguments[0]);
    return 2;
  }
  cuda_host::File calls(arguments[1], "rb"), results(arguments[2], "wb");
  for (auto left = calls.value<uint32_t>(); left > 0; --left) {
    const Call call = cuda_host::read_call(calls);
    set_device(call);
    cuda_host::launched.clear();
    std::string error;
    try {
      kOperations.at(call.name)(call);
    } catch (const std::exception& caught) {
      error = caught.what();
    }
    std::vector<int64_t> launched;  // offsets from main, which run.py looks up in the symbol table
    for (const void* kernel : cuda_host::launched) {
      launched.push_back(static_cast<const char*>(kernel) - reinterpret_cast<const char*>(&main));
    }
    cuda_host::write_result(results, call, error, launched);
  }
  return 0;
}
