// Runs the CUDA launchers on the host: main CALLS RESULTS.
#include <algorithm>
#include <iterator>

#include "code_calls.h"
#include "contrastive/negative_sampling.h"
#include "contrastive/query_negatives.h"
#include "core/column_sums.h"
#include "core/cuda/launch.h"
#include "core/scale_add.h"
#include "core/segment_sums.h"
#include "device_host.h"
#include "latent/free_energy.h"
#include "latent/gaussian.h"
#include "latent/gumbel.h"
#include "latent/prediction_energy.h"
#include "planted.h"
#include "protocol.h"
#include "random/random_stream.h"
#include "vocabulary/cross_entropy.h"
#include "vocabulary/mask_tokens.h"
#include "vocabulary/sample_rows.h"

namespace {

using cuda_host::Call;

sslkernels::CrossEntropyRows rows_of(const Call& call) {
  constexpr int kBytes[] = {4, 8, 2, 2};
  sslkernels::CrossEntropyRows rows{};
  rows.element = static_cast<sslkernels::Element>(call.integer("element"));
  const int64_t bytes = kBytes[call.integer("element")];
  const bool in_place = call.integer("in_place") != 0;
  rows.logits = call.array<char>("logits") + call.integer("logits_offset") * bytes;
  rows.logits_stride = call.integer("logits_stride");
  rows.count = call.integer("count");
  rows.vocab = call.integer("vocab");
  rows.target = call.array("target");
  rows.wide_target = call.integer("wide_target") != 0;
  rows.bias = call.array("bias");
  rows.weight = call.array("weight");
  rows.weight_sum = call.array("weight_sum");
  rows.coefficient = call.array("coefficient");
  rows.loss = call.array("loss");
  rows.row_max = call.array("row_max");
  rows.sum_exp = call.array("sum_exp");
  rows.logprob = call.array("logprob");
  rows.prediction = call.array<int64_t>("prediction");
  rows.entropy = call.array("entropy");
  if (in_place) {
    rows.grad = const_cast<void*>(rows.logits);
    rows.grad_stride = rows.logits_stride;
  } else if (call.array("grad") != nullptr) {
    rows.grad = call.array<char>("grad") + call.integer("grad_offset") * bytes;
    rows.grad_stride = call.integer("grad_stride");
  }
  rows.options = {call.integer("ignore_index"), call.real("label_smoothing"), call.real("z_loss"), call.real("softcap"),
                  call.real("logit_scale")};
  return rows;
}

sslkernels::RandomStream random_stream_of(const Call& call) {
  return {call.array<int64_t>("row_ids"),
          call.array<int64_t>("seed"),
          call.integer("rows"),
          call.integer("columns"),
          call.integer("sample"),
          static_cast<sslkernels::Stream>(call.integer("stream")),
          static_cast<sslkernels::Element>(call.integer("element")),
          call.array<char>("out") + call.integer("output_offset")};
}

sslkernels::Gaussian gaussian_of(const Call& call) {
  constexpr int kBytes[] = {4, 8, 2, 2};
  const int64_t bytes = kBytes[call.integer("element")];
  const auto rows = [&](const std::string& key) -> sslkernels::GaussianRows {
    char* start = call.array<char>(key);
    if (start == nullptr) return {};
    const bool shared = call.integer(key + "_shared") != 0;
    return {start + call.integer(key + "_offset") * bytes, shared ? 0 : call.integer(key + "_stride"), shared};
  };
  sslkernels::Gaussian inputs{};
  inputs.element = static_cast<sslkernels::Element>(call.integer("element"));
  inputs.rows = call.integer("rows");
  inputs.columns = call.integer("columns");
  inputs.samples = call.integer("samples");
  inputs.mean = rows("mean");
  inputs.logvar = rows("logvar");
  inputs.prior_mean = rows("prior_mean");
  inputs.prior_logvar = rows("prior_logvar");
  inputs.row_ids = call.array<int64_t>("row_ids");
  inputs.seed = call.array<int64_t>("seed");
  inputs.free_bits = call.real("free_bits");
  inputs.low = call.real("low");
  inputs.high = call.real("high");
  return inputs;
}

sslkernels::GaussianSamples samples_of(const Call& call) {
  return {call.integer("z_row_stride"), call.integer("z_sample_stride")};
}

void gaussian_fwd(const Call& call) {
  sslkernels::GaussianForward forward{};
  forward.inputs = gaussian_of(call);
  forward.z = call.array("z");
  forward.z_at = samples_of(call);
  forward.kl = call.array("kl");
  forward.by_row = call.integer("by_row") != 0;
  const int64_t columns = sslkernels::gaussian_columns_of_sum(forward.inputs.element);
  forward.kl_parts = (forward.inputs.columns + columns - 1) / columns;
  forward.statistics = call.array("statistics");
  sslkernels::launch_gaussian_fwd(forward, nullptr);
}

void gaussian_bwd(const Call& call) {
  sslkernels::GaussianBackward backward{};
  backward.inputs = gaussian_of(call);
  backward.grad_z = call.array("grad_z");
  backward.z_at = samples_of(call);
  backward.grad_kl = call.array("grad_kl");
  backward.by_row = call.integer("by_row") != 0;
  backward.grad_mean = call.array("grad_mean");
  backward.grad_logvar = call.array("grad_logvar");
  backward.grad_prior_mean = call.array("grad_prior_mean");
  backward.grad_prior_logvar = call.array("grad_prior_logvar");
  sslkernels::launch_gaussian_bwd(backward, nullptr);
}

sslkernels::GumbelRows gumbel_rows_of(const Call& call) {
  constexpr int kBytes[] = {4, 8, 2, 2};
  sslkernels::GumbelRows rows{};
  rows.element = static_cast<sslkernels::Element>(call.integer("element"));
  rows.logits = call.array<char>("logits") + call.integer("logits_offset") * kBytes[call.integer("element")];
  rows.logits_stride = call.integer("logits_stride");
  rows.rows = call.integer("rows");
  rows.columns = call.integer("columns");
  rows.seed = call.array<int64_t>("seed");
  rows.row_ids = call.array<int64_t>("row_ids");
  rows.first_row = call.integer("first_row");
  rows.inverse_tau = call.array<double>("inverse_tau");
  rows.state = {call.array("max"), call.array("sum")};
  rows.plain = {call.array("plain_max"), call.array("plain_sum")};
  return rows;
}

void gumbel_rows_fwd(const Call& call) {
  sslkernels::launch_gumbel_rows_fwd(
      {gumbel_rows_of(call), static_cast<sslkernels::GumbelOutput>(call.integer("output")), call.array("y"),
       call.array<int64_t>("index"), call.array<int64_t>("best")},
      nullptr);
}

void gumbel_rows_bwd(const Call& call) {
  sslkernels::GumbelBackward backward{};
  backward.rows = gumbel_rows_of(call);
  backward.grad_logits = call.array("grad_logits");
  backward.grad = call.integer("in_place") != 0 ? backward.grad_logits : call.array("grad");
  backward.wide_grad = call.integer("wide_grad") != 0;
  backward.grad_stride = call.integer("grad_stride");
  backward.uses = call.array("uses");
  backward.mask = call.array<uint8_t>("mask");
  backward.groups = call.integer("groups");
  sslkernels::launch_gumbel_rows_bwd(backward, nullptr);
}

void probability_sums(const Call& call) {
  sslkernels::launch_probability_sums({gumbel_rows_of(call), call.array<uint8_t>("mask"), call.integer("groups"),
                                       call.integer("chunk_rows"), call.integer("chunks"), call.array("partial")},
                                      nullptr);
}

// What the rows would be launched with: team, threads, cluster, held, bytes of shared memory.
void plan_gumbel_rows(const Call& call) {
  constexpr int kScratch = 1024;
  const auto plan = sslkernels::plan_gumbel_rows(
      call.integer("rows"), call.integer("columns"), int(call.integer("chunk")), int(call.integer("bytes_each")),
      call.integer("twice") != 0, int(call.integer("most_threads")), kScratch, sslkernels::device_limits());
  const int64_t found[] = {plan.team, plan.threads, plan.cluster, plan.held, plan.shared_bytes};
  std::copy(std::begin(found), std::end(found), call.array<int64_t>("plan"));
}

sslkernels::MaskTokens mask_tokens_of(const Call& call) {
  const bool wide_ids = call.integer("wide_ids") != 0, wide_words = call.integer("wide_words") != 0;
  const int64_t offset = call.integer("offset"), id_bytes = wide_ids ? 8 : 4, word_bytes = wide_words ? 8 : 4;
  const int64_t output_offset = call.integer("output_offset");
  const auto at = [&](const char* key, int64_t bytes) {
    char* start = call.array<char>(key);
    return start == nullptr ? nullptr : start + bytes;
  };
  sslkernels::MaskTokens tokens{};
  tokens.input_ids = at("input_ids", offset * id_bytes);
  tokens.wide_ids = wide_ids;
  tokens.special_mask = reinterpret_cast<const uint8_t*>(at("special_mask", offset));
  tokens.word_ids = at("word_ids", offset * word_bytes);
  tokens.wide_words = wide_words;
  tokens.row_ids = call.array<int64_t>("row_ids");
  tokens.seed = call.array<int64_t>("seed");
  tokens.rows = call.integer("rows");
  tokens.columns = call.integer("columns");
  tokens.output_ids = at("output_ids", output_offset * id_bytes);
  tokens.labels = at("labels", output_offset * id_bytes);
  tokens.chained = call.integer("chained") != 0;
  const auto threshold = [&](const char* key) { return uint64_t(call.integer(key)); };
  tokens.rule = {
      threshold("select"),           threshold("stay"),          threshold("enter"),      threshold("to_mask"),
      threshold("to_random"),        call.integer("mask_id"),    call.integer("allowed"), call.integer("ignore_index"),
      call.array<int64_t>("ranges"), call.integer("range_count")};
  return tokens;
}

sslkernels::ScaleAdd scale_add_of(const Call& call) {
  const auto element = [&](const char* key) { return static_cast<sslkernels::Element>(call.integer(key)); };
  char* out = call.array<char>("out") + call.integer("out_offset");
  const void* input = call.integer("in_place") != 0 ? out : call.array<char>("input") + call.integer("input_offset");
  return {
      element("input_element"),        element("out_element"),  input, out, call.integer("count"), call.array("scale"),
      call.integer("wide_scale") != 0, call.integer("add") != 0};
}

void column_sums(const Call& call) {
  sslkernels::ColumnSums sums{static_cast<sslkernels::Element>(call.integer("element")),
                              call.array<char>("values") + call.integer("values_offset"),
                              call.integer("stride"),
                              call.integer("rows"),
                              call.integer("columns"),
                              nullptr,
                              call.array("total"),
                              call.integer("add") != 0};
  const bool wide = sums.element == sslkernels::Element::kDouble;
  const cuda_host::Array partials(sslkernels::column_sums_row_blocks(sums) * sums.columns * (wide ? 8 : 4));
  sums.partials = partials.data();
  sslkernels::launch_column_sums(sums, nullptr);
}

// Tile after tile, as the caller does it.
void sample_rows(const Call& call) {
  constexpr int kBytes[] = {4, 8, 2, 2};
  const int64_t vocab = call.integer("vocab"), tile = call.integer("tile");
  const char* products = call.array<char>("products") + call.integer("offset") * kBytes[call.integer("element")];
  sslkernels::SampleRows sample{};
  sample.element = static_cast<sslkernels::Element>(call.integer("element"));
  sample.stride = call.integer("stride");
  sample.rows = call.integer("rows");
  sample.vocab = vocab;
  sample.bias = call.array("bias");
  sample.scale = call.real("scale");
  sample.row_ids = call.array<int64_t>("row_ids");
  sample.seed = call.array<int64_t>("seed");
  sample.row_max = call.array("row_max");
  sample.sum_exp = call.array("sum_exp");
  sample.best = call.array("best");
  sample.logprob = call.array("logprob");
  sample.index = call.array<int64_t>("index");
  for (int64_t first = 0; first < vocab; first += tile) {
    sample.products = products + first * kBytes[call.integer("element")];
    sample.first_column = first;
    sample.columns = std::min(tile, vocab - first);
    sslkernels::launch_sample_rows(sample, nullptr);
  }
}

// What it would be launched with: team, threads, cluster.
void plan_sample_rows(const Call& call) {
  const auto plan =
      sslkernels::plan_sample_rows(call.integer("rows"), call.integer("columns"), sslkernels::device_limits());
  int64_t* out = call.array<int64_t>("plan");
  out[0] = plan.team;
  out[1] = plan.threads;
  out[2] = plan.cluster;
}

sslkernels::OwnNegatives own_negatives_of(const Call& call) {
  constexpr int kBytes[] = {4, 8, 2, 2};
  const int64_t bytes = kBytes[call.integer("element")];
  const auto at = [&](const char* key, const char* offset) -> char* {
    char* start = call.array<char>(key);
    return start == nullptr ? nullptr : start + call.integer(offset) * bytes;
  };
  sslkernels::OwnNegatives own{};
  own.element = static_cast<sslkernels::Element>(call.integer("element"));
  own.query = at("query", "query_offset");
  own.negatives = at("negatives", "negatives_offset");
  own.rows = call.integer("rows");
  own.count = call.integer("count");
  own.dim = call.integer("dim");
  own.mask = call.array<uint8_t>("mask");
  own.query_inverse_norm = call.array("query_inverse_norm");
  own.logit_scale = call.array("logit_scale");
  own.logit_bias = call.array("logit_bias");
  own.energy = static_cast<sslkernels::Energy>(call.integer("energy"));
  own.reference = call.array("reference");
  own.coefficient = call.array("coefficient");
  own.smoothing = call.array("smoothing");
  own.final = call.integer("final") != 0;
  own.scores = call.array("scores");
  own.value = call.array("value");
  own.grad_query = call.array("grad_query");
  own.grad_negatives = at("grad_negatives", "grad_offset");
  own.grad_scale = call.array("grad_scale");
  own.grad_bias = call.array("grad_bias");
  return own;
}

// What own_negatives would be launched with: tile, team, pitch, held, threads, bytes of shared memory.
void plan_own_negatives(const Call& call) {
  sslkernels::OwnNegatives own = own_negatives_of(call);
  int64_t* out = call.array<int64_t>("plan");
  own.coefficient = own.grad_query = own.grad_negatives = call.integer("gradient") != 0 ? out : nullptr;
  const auto plan = sslkernels::plan_own_negatives(own, sslkernels::device_limits());
  const int64_t found[] = {plan.tile, plan.team, plan.pitch, plan.held, plan.threads, plan.shared_bytes};
  std::copy(std::begin(found), std::end(found), out);
}

sslkernels::NegativeSampling negative_sampling_of(const Call& call) {
  sslkernels::NegativeSampling pairs{};
  pairs.element = static_cast<sslkernels::Element>(call.integer("element"));
  pairs.center_weight = call.array("center_weight");
  pairs.context_weight = call.array("context_weight");
  pairs.center_rows = call.integer("center_rows");
  pairs.context_rows = call.integer("context_rows");
  pairs.dim = call.integer("dim");
  pairs.center = call.array("center");
  pairs.context = call.array("context");
  pairs.negatives = call.array("negatives");
  pairs.wide_index = call.integer("wide_index") != 0;
  pairs.count = call.integer("count");
  pairs.negative_count = call.integer("negative_count");
  pairs.exclude_positive = call.integer("exclude_positive") != 0;
  pairs.loss = call.array("loss");
  pairs.slopes = call.array("slopes");
  pairs.direction = call.array("direction");
  return pairs;
}

void weighted_row_sums(const Call& call) {
  sslkernels::WeightedRowSums sums{};
  sums.source_element = static_cast<sslkernels::Element>(call.integer("source_element"));
  sums.out_element = static_cast<sslkernels::Element>(call.integer("out_element"));
  sums.starts = call.array<int64_t>("starts");
  sums.order = call.array<int64_t>("order");
  sums.coefficient = call.array("coefficient");
  sums.source = call.array("source");
  sums.source_index = call.array("source_index");
  sums.wide_index = call.integer("wide_index") != 0;
  sums.entries_of_source = call.integer("entries_of_source");
  sums.source_rows = call.integer("source_rows");
  sums.entries = call.integer("entries");
  sums.rows = call.integer("rows");
  sums.dim = call.integer("dim");
  sums.out = call.array("out");
  const bool wide = sums.out_element == sslkernels::Element::kDouble;
  const cuda_host::Array partials(sslkernels::row_sums_partials(sums) * (wide ? 8 : 4));
  sslkernels::launch_weighted_row_sums(sums, partials.data(), nullptr);
}

sslkernels::FreeEnergy free_energy_of(const Call& call) {
  constexpr int kBytes[] = {4, 8, 2, 2};
  sslkernels::FreeEnergy energies{};
  energies.element = static_cast<sslkernels::Element>(call.integer("element"));
  energies.energy = call.array("energy");
  if (energies.energy != nullptr) {
    energies.energy = call.array<char>("energy") + call.integer("offset") * kBytes[call.integer("element")];
  }
  energies.outer = call.integer("outer");
  energies.count = call.integer("count");
  energies.inner = call.integer("inner");
  energies.outer_stride = call.integer("outer_stride");
  energies.count_stride = call.integer("count_stride");
  energies.inner_stride = call.integer("inner_stride");
  energies.minimum = call.integer("minimum") != 0;
  energies.beta = call.real("beta");
  energies.value = call.array("value");
  energies.lowest = call.array("lowest");
  energies.total = call.array("total");
  energies.winner = call.array<int64_t>("winner");
  return energies;
}

void free_energy_bwd(const Call& call) {
  sslkernels::FreeEnergyGradient gradient{free_energy_of(call), call.array("grad"), call.integer("grad_outer_stride"),
                                          call.integer("grad_count_stride"), call.integer("grad_inner_stride")};
  gradient.energies.value = call.array("grad_value");
  sslkernels::launch_free_energy_bwd(gradient, nullptr);
}

sslkernels::PredictionEnergy prediction_energy_of(const Call& call) {
  sslkernels::PredictionEnergy inputs{};
  inputs.element = static_cast<sslkernels::Element>(call.integer("element"));
  inputs.prediction = call.array("prediction");
  inputs.batch_stride = call.integer("batch_stride");
  inputs.count_stride = call.integer("count_stride");
  inputs.target = call.array("target");
  inputs.target_stride = call.integer("target_stride");
  inputs.batch = call.integer("batch");
  inputs.count = call.integer("count");
  inputs.dim = call.integer("dim");
  inputs.minimum = call.integer("minimum") != 0;
  inputs.beta = call.real("beta");
  inputs.value = call.array("value");
  inputs.weights = call.array("weights");
  return inputs;
}

void prediction_energy_fwd(const Call& call) {
  const auto inputs = prediction_energy_of(call);
  const auto plan = sslkernels::plan_prediction_energy(inputs);
  const bool wide = inputs.element == sslkernels::Element::kDouble;
  const cuda_host::Array workspace(sslkernels::workspace_of(inputs, plan) * (wide ? 8 : 4));
  sslkernels::launch_prediction_energy_fwd(inputs, plan, workspace.data(), nullptr);
}

void prediction_energy_bwd(const Call& call) {
  const sslkernels::PredictionEnergyGradient gradient{prediction_energy_of(call), call.array("grad_prediction"),
                                                      call.integer("grad_batch_stride"),
                                                      call.integer("grad_count_stride"), call.array("grad_target")};
  const auto plan = sslkernels::plan_prediction_energy_bwd(gradient);
  const bool wide = gradient.inputs.element == sslkernels::Element::kDouble;
  const cuda_host::Array workspace(sslkernels::workspace_of(gradient, plan) * (wide ? 8 : 4));
  sslkernels::launch_prediction_energy_bwd(gradient, plan, workspace.data(), nullptr);
}

// What the forward would be launched with: held, cluster, threads, bytes of shared memory.
void plan_rows(const Call& call) {
  constexpr int64_t kScratch = 1024;
  sslkernels::CrossEntropyRows rows{};
  rows.element = static_cast<sslkernels::Element>(call.integer("element"));
  rows.count = call.integer("count");
  rows.vocab = call.integer("vocab");
  rows.options.logit_scale = 1;
  rows.options.softcap = call.real("softcap");
  rows.grad = call.integer("gradient") != 0 ? call.array("plan") : nullptr;
  const auto plan = sslkernels::plan_rows_fwd(rows, kScratch, sslkernels::device_limits());
  int64_t* out = call.array<int64_t>("plan");
  out[0] = plan.held;
  out[1] = plan.cluster;
  out[2] = plan.threads;
  out[3] = plan.shared_bytes;
}

const std::map<std::string, void (*)(const Call&)> kOperations = {
    {"cross_entropy_rows_fwd",
     [](const Call& call) { sslkernels::launch_cross_entropy_rows_fwd(rows_of(call), nullptr); }},
    {"cross_entropy_rows_bwd",
     [](const Call& call) { sslkernels::launch_cross_entropy_rows_bwd(rows_of(call), nullptr); }},
    {"random_stream", [](const Call& call) { sslkernels::launch_random_stream(random_stream_of(call), nullptr); }},
    {"gaussian_fwd", gaussian_fwd},
    {"gaussian_bwd", gaussian_bwd},
    {"gumbel_rows_fwd", gumbel_rows_fwd},
    {"gumbel_rows_bwd", gumbel_rows_bwd},
    {"probability_sums", probability_sums},
    {"plan_gumbel_rows", plan_gumbel_rows},
    {"sample_rows", sample_rows},
    {"plan_sample_rows", plan_sample_rows},
    {"mask_tokens",
     [](const Call& call) {
       sslkernels::launch_mask_tokens(mask_tokens_of(call), call.array<int64_t>("device_ranges"), nullptr);
     }},
    {"own_negatives", [](const Call& call) { sslkernels::launch_own_negatives(own_negatives_of(call), nullptr); }},
    {"plan_own_negatives", plan_own_negatives},
    {"plan_rows", plan_rows},
    {"scale_add", [](const Call& call) { sslkernels::launch_scale_add(scale_add_of(call), nullptr); }},
    {"column_sums", column_sums},
    {"negative_sampling_fwd",
     [](const Call& call) { sslkernels::launch_negative_sampling_fwd(negative_sampling_of(call), nullptr); }},
    {"weighted_row_sums", weighted_row_sums},
    {"free_energy_fwd", [](const Call& call) { sslkernels::launch_free_energy_fwd(free_energy_of(call), nullptr); }},
    {"free_energy_bwd", free_energy_bwd},
    {"prediction_energy_fwd", prediction_energy_fwd},
    {"prediction_energy_bwd", prediction_energy_bwd},
    {"search_codes", cuda_host::search_codes},
    {"gather_codes", cuda_host::gather_codes},
    {"code_difference", cuda_host::code_difference},
    {"planted", [](const Call& call) { launch_planted(call); }},
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
    std::vector<int64_t> launched;  // as distances from main, for a symbol table to name
    for (const void* kernel : cuda_host::launched) {
      launched.push_back(static_cast<const char*>(kernel) - reinterpret_cast<const char*>(&main));
    }
    cuda_host::write_result(results, call, error, launched);
  }
  return 0;
}
