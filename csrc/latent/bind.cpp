// The CPU implementations of the operators of latent variables, over torch's thread pool.
#include "core/cpu/bind.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "latent/free_energy.h"
#include "latent/free_energy_bind.h"
#include "latent/gaussian.h"
#include "latent/gaussian_bind.h"
#include "latent/gumbel.h"
#include "latent/gumbel_bind.h"
#include "latent/prediction_energy.h"
#include "latent/vector_quantize.h"
#include "latent/vector_quantize_bind.h"

namespace sslkernels {
namespace {

using torch::stable::Tensor;

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
    const int64_t bytes = rows.element == Element::kDouble ? sizeof(double) : sizeof(float);
    run(begin, end, scratch_of(rows.columns * bytes).get());
  });
}

void gumbel_rows_fwd(Tensor logits, OptionalTensor seed, OptionalTensor row_ids, int64_t first_row,
                     OptionalTensor inverse_tau, int64_t output, OptionalTensor y, OptionalTensor index, Tensor max,
                     Tensor sum, OptionalTensor best, OptionalTensor plain_max, OptionalTensor plain_sum) {
  const GumbelForward forward =
      gumbel_forward(gumbel_rows(logits, seed, row_ids, first_row, inverse_tau, max, sum, plain_max, plain_sum), logits,
                     output, y, index, best);
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

// What a thread searches with.
struct CodeSearchOnCpu {
  static constexpr bool kGain = false;
  static constexpr int64_t kPitch = 1;
  std::vector<std::unique_ptr<Line[]>> buffers;
  std::vector<double> work, block_norm;

  template <class A>
  A* buffer(int64_t count) {
    if (count == 0) return nullptr;
    buffers.push_back(scratch_of(count * int64_t(sizeof(A))));
    return reinterpret_cast<A*>(buffers.back().get());
  }
  void code_tile(const CodeTile& tile) { SSLKERNELS_CALL_ISA(code_tile, tile, 0, tile.source.rows); }
  template <class A>
  void multiply(const CodeVectors& a, const CodeVectors& b, A* products, int64_t pitch) {
    static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    multiply_vectors(a, b, products, pitch, cpu);
  }
  void best_codes(const CodeScores& scores) {
    if (work.empty() || scores.first_code != summarised_) {
      block_norm.resize(code_blocks(scores.codes));
      work.resize(std::max<size_t>(work.size(), 2 * scores.input.dim + block_norm.size()));
      SSLKERNELS_CALL_ISA(code_block_norms, scores, block_norm.data());
      summarised_ = scores.first_code;
    }
    SSLKERNELS_CALL_ISA(best_codes, scores, block_norm.data(), 0, scores.input.rows, work.data());
  }

 private:
  int64_t summarised_ = 0;  // the first code of the tile whose block_norm is there
};

void search_codes(Tensor input, Tensor codebook, int64_t metric, double matmul_rounding, OptionalTensor center,
                  bool as_given, int64_t tile_rows, int64_t tile_codes, Tensor index, Tensor score) {
  STD_TORCH_CHECK(!as_given, "sslkernels: the CPU multiplies in float32 or float64");
  const CodeSearch search = code_search_arguments(input, codebook, metric, matmul_rounding, center, as_given, tile_rows,
                                                  tile_codes, index, score);
  const auto type = type_of_products(search.input, search.codebook);
  torch::stable::parallel_for(0, search.input.rows, search.tile_rows, [&](int64_t begin, int64_t end) {
    CodeSearchOnCpu cpu;
    if (type == torch::headeronly::ScalarType::Double) {
      search_in_tiles<double>(search, begin, end, cpu);
    } else {
      search_in_tiles<float>(search, begin, end, cpu);
    }
  });
}

void gather_codes(Tensor input, Tensor codebook, Tensor index, Tensor score, Tensor values, Tensor distance) {
  const CodeGather gather = code_gather_arguments(input, codebook, index, score, values, distance);
  advise_output(values);
  torch::stable::parallel_for(0, gather.input.rows, row_grain(gather.input.dim), [&](int64_t begin, int64_t end) {
    const auto work = scratch_of(2 * gather.input.dim * int64_t(sizeof(double)));
    SSLKERNELS_CALL_ISA(gather_codes, gather, begin, end, work.get());
  });
}

void code_difference(Tensor coefficient, Tensor input, Tensor codebook, Tensor index, Tensor out) {
  const CodeDifference difference = code_difference_arguments(coefficient, input, codebook, index, out);
  advise_output(out);
  torch::stable::parallel_for(0, difference.input.rows, row_grain(difference.input.dim),
                              [&](int64_t begin, int64_t end) {
                                const auto work = scratch_of(2 * difference.input.dim * int64_t(sizeof(double)));
                                SSLKERNELS_CALL_ISA(code_difference, difference, begin, end, work.get());
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
  advise_output(grad);
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
  advise_output(grad_prediction);
  const int64_t grain = row_grain(inputs.count * std::min(inputs.dim, kFeaturePart));
  torch::stable::parallel_for(0, inputs.batch * feature_parts(inputs), grain, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(prediction_energy_bwd, gradient, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  m.impl("gaussian_fwd", TORCH_BOX(&gaussian_fwd));
  m.impl("gaussian_bwd", TORCH_BOX(&gaussian_bwd));
  m.impl("gumbel_rows_fwd", TORCH_BOX(&gumbel_rows_fwd));
  m.impl("gumbel_rows_bwd", TORCH_BOX(&gumbel_rows_bwd));
  m.impl("probability_sums", TORCH_BOX(&probability_sums));
  m.impl("search_codes", TORCH_BOX(&search_codes));
  m.impl("gather_codes", TORCH_BOX(&gather_codes));
  m.impl("code_difference", TORCH_BOX(&code_difference));
  m.impl("free_energy_fwd", TORCH_BOX(&free_energy_fwd));
  m.impl("free_energy_bwd", TORCH_BOX(&free_energy_bwd));
  m.impl("prediction_energy_fwd", TORCH_BOX(&prediction_energy_fwd));
  m.impl("prediction_energy_bwd", TORCH_BOX(&prediction_energy_bwd));
}

}  // namespace sslkernels
