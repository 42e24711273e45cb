// The operators of latent variables: schemas, CPU and CUDA bindings.
#include "core/cpu/bind.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "latent/free_energy_bind.h"
#include "latent/gaussian_bind.h"
#include "latent/gumbel_bind.h"
#include "latent/prediction_energy_bind.h"
#include "latent/vector_quantize_bind.h"

#if defined(SSLKERNELS_WITH_CUDA)
#include "core/cuda/bind.h"
#endif

namespace sslkernels {
namespace {

// Tasks that are worth handing to another thread.
int64_t gaussian_grain(const Gaussian& inputs, bool has_sums) {
  const int64_t columns = std::min(inputs.columns, kGaussianChunk);
  return kGrain / (gaussian_rows_of_task(inputs, has_sums) * columns * std::max<int64_t>(inputs.samples, 1)) + 1;
}

void run_gaussian_fwd(const GaussianForward& forward) {
  const Gaussian& inputs = forward.inputs;
  const bool sums = has_sums(forward);
  advise_output(forward.z, inputs.rows * inputs.samples * inputs.columns, inputs.element);
  advise_output(forward.kl, inputs.rows * (forward.by_row ? forward.kl_parts : inputs.columns),
                accumulation_element(inputs.element));
  parallel(gaussian_tasks(inputs, sums), gaussian_grain(inputs, sums), SSLKERNELS_CURRENT_ISA(gaussian_fwd), forward);
}

void run_gaussian_bwd(const GaussianBackward& backward) {
  const Gaussian& inputs = backward.inputs;
  const bool sums = has_sums(backward);
  advise_output(backward.grad_mean, inputs.rows * inputs.columns, inputs.element);
  advise_output(backward.grad_logvar, inputs.rows * inputs.columns, inputs.element);
  if (!inputs.prior_mean.shared) advise_output(backward.grad_prior_mean, inputs.rows * inputs.columns, inputs.element);
  if (!inputs.prior_logvar.shared) {
    advise_output(backward.grad_prior_logvar, inputs.rows * inputs.columns, inputs.element);
  }
  parallel(gaussian_tasks(inputs, sums), gaussian_grain(inputs, sums), SSLKERNELS_CURRENT_ISA(gaussian_bwd), backward);
}

int64_t gumbel_scratch_bytes(const GumbelRows& rows) {
  return rows.columns * bytes_of(accumulation_element(rows.element));
}

void run_gumbel_rows_fwd(const GumbelForward& forward) {
  const GumbelRows& rows = forward.rows;
  parallel(rows.rows, row_grain(rows.columns), SSLKERNELS_CURRENT_ISA(gumbel_rows_fwd), forward,
           gumbel_scratch_bytes(rows));
}

void run_gumbel_rows_bwd(const GumbelBackward& backward) {
  const GumbelRows& rows = backward.rows;
  parallel(rows.rows, row_grain(rows.columns), SSLKERNELS_CURRENT_ISA(gumbel_rows_bwd), backward,
           gumbel_scratch_bytes(rows));
}

void run_probability_sums(const ProbabilitySums& sums) {
  parallel(sums.chunks, row_grain(sums.chunk_rows * sums.groups * sums.rows.columns),
           SSLKERNELS_CURRENT_ISA(probability_sums), sums);
}

constexpr int64_t kShortRow = 128;  // rows of floats up to this length are multiplied by a kernel of our own

// The CPU as a Device of search_in_tiles; each thread has its own.
struct CodeSearchOnCpu {
  static constexpr bool kGain = false;
  static constexpr int64_t kPitch = 1;
  std::vector<std::unique_ptr<Line[]>> buffers;
  std::vector<double> work, block_norm;
  std::unique_ptr<Line[]> panels, multiply_work;  // the codes of the tile, packed
  const void* rows = nullptr;                     // the factors of the last product
  const void* codes = nullptr;

  template <class A>
  A* buffer(int64_t count) {
    if (count == 0) return nullptr;
    buffers.push_back(scratch_of(count * int64_t(sizeof(A))));
    return reinterpret_cast<A*>(buffers.back().get());
  }
  template <class A>
  A* products(int64_t dim, int64_t count) {
    return sizeof(A) == sizeof(float) && dim <= kShortRow ? nullptr : buffer<A>(count);
  }
  void code_tile(const CodeTile& tile) { SSLKERNELS_CURRENT_ISA(code_tile)(tile, 0, tile.source.rows); }
  template <class A>
  void multiply(const CodeVectors& a, const CodeVectors& b, A* products, int64_t pitch) {
    rows = a.data;
    codes = b.data;
    if (products == nullptr) return;  // best_codes multiplies
    static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    multiply_vectors(a, b, products, pitch, cpu);
  }
  void best_codes(const CodeScores& scores) {
    if (work.empty() || scores.first_code != summarised_) {
      block_norm.resize(code_blocks(scores.codes) + 1);
      work.resize(std::max<size_t>(work.size(), 2 * scores.input.dim + block_norm.size()));
      SSLKERNELS_CURRENT_ISA(code_block_norms)(scores, block_norm.data());
      summarised_ = scores.first_code;
      if (scores.products == nullptr) {
        const auto floats = [&](auto size) {
          return scratch_of(size(scores.codes, scores.input.dim) * int64_t(sizeof(float)));
        };
        panels = floats(SSLKERNELS_CURRENT_ISA(packed_codes_size));
        multiply_work = floats(SSLKERNELS_CURRENT_ISA(multiply_work_size));
        SSLKERNELS_CURRENT_ISA(pack_codes)(static_cast<const float*>(codes),
                                           static_cast<const float*>(scores.code_half_square), scores.codes,
                                           scores.input.dim, reinterpret_cast<float*>(panels.get()));
      }
    }
    if (scores.products == nullptr) {
      return SSLKERNELS_CURRENT_ISA(multiply_and_find)(
          scores, static_cast<const float*>(rows), reinterpret_cast<const float*>(panels.get()),
          reinterpret_cast<const float*>(block_norm.data()), reinterpret_cast<float*>(multiply_work.get()));
    }
    SSLKERNELS_CURRENT_ISA(best_codes)(scores, block_norm.data(), 0, scores.input.rows, work.data());
  }

 private:
  int64_t summarised_ = 0;  // first code of the tile that block_norm describes
};

// Searches, and calls then(begin, end) in the thread that searched for these rows. For the squared distance the mean of
// the codes is subtracted from rows and codes if no center is given, so that a common offset costs neither accuracy nor
// scores in double.
template <class Then>
void search_codes(CodeSearch search, Then then) {
  const bool is_double = type_of_products(search.input, search.codebook) == ScalarType::Double;
  std::unique_ptr<Line[]> center;
  if (search.metric == CodeMetric::kSquaredDistance && search.center == nullptr) {
    center = scratch_of(search.codebook.dim * int64_t(is_double ? sizeof(double) : sizeof(float)));
    SSLKERNELS_CURRENT_ISA(code_center)(search.codebook, is_double, center.get());
    search.center = center.get();
  }
  parallel_ranges(search.input.rows, search.tile_rows, [&](int64_t begin, int64_t end) {
    CodeSearchOnCpu cpu;
    if (is_double) {
      search_in_tiles<double>(search, begin, end, cpu);
    } else {
      search_in_tiles<float>(search, begin, end, cpu);
    }
    then(begin, end);
  });
}

void run_search_codes(const CodeSearch& search) {
  search_codes(search, [](int64_t, int64_t) {});
}

// Each thread gathers the codes of the rows that it searched for.
void run_quantize_rows(const RowQuantization& arguments) {
  CodeSearch search = arguments.search;
  CodeGather gather = arguments.gather;
  const CodeVectors& input = search.input;
  const auto numbers = scratch_of(2 * input.rows * int64_t(sizeof(double)));
  search.score = reinterpret_cast<double*>(numbers.get());
  double* distance = search.score + input.rows;
  gather.score = search.score;
  gather.distance = distance;
  gather.is_double = true;
  advise_output(gather.values, input.rows * input.dim, input.element);
  search_codes(search, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_of(2 * input.dim * int64_t(sizeof(double)));
    SSLKERNELS_CURRENT_ISA(gather_codes)(gather, begin, end, scratch.get());
  });
  std::fill_n(arguments.usage, search.codebook.rows, 0);
  double total = 0;
  for (int64_t i = 0; i < input.rows; ++i) {
    if (!std::isnan(search.score[i])) arguments.usage[search.index[i]] += 1;
    total += distance[i];
  }
  const double commitment = total / double(input.rows * input.dim);
  if (arguments.is_double) {
    *static_cast<double*>(arguments.commitment) = commitment;
  } else {
    *static_cast<float*>(arguments.commitment) = float(commitment);
  }
}

void run_gather_codes(const CodeGather& gather) {
  const CodeVectors& input = gather.input;
  advise_output(gather.values, input.rows * input.dim, input.element);
  parallel(input.rows, row_grain(input.dim), SSLKERNELS_CURRENT_ISA(gather_codes), gather,
           2 * input.dim * int64_t(sizeof(double)));
}

void run_code_difference(const CodeDifference& difference) {
  const CodeVectors& input = difference.input;
  advise_output(difference.out, input.rows * input.dim, difference.out_element);
  parallel(input.rows, row_grain(input.dim), SSLKERNELS_CURRENT_ISA(code_difference), difference,
           2 * input.dim * int64_t(sizeof(double)));
}

void run_free_energy_fwd(const FreeEnergy& energies) {
  parallel(energies.outer * energies.inner, row_grain(energies.count), SSLKERNELS_CURRENT_ISA(free_energy_fwd),
           energies);
}

void run_free_energy_bwd(const FreeEnergyGradient& gradient) {
  const FreeEnergy& energies = gradient.energies;
  const int64_t results = energies.outer * energies.inner;
  advise_output(gradient.grad, results * energies.count, energies.element);
  parallel(results, row_grain(energies.count), SSLKERNELS_CURRENT_ISA(free_energy_bwd), gradient);
}

void run_prediction_energy_fwd(const PredictionEnergy& inputs) {
  const int64_t rows = inputs.batch * feature_parts(inputs);
  const auto parts = scratch_of(rows * inputs.count * bytes_of(accumulation_element(inputs.element)));
  const auto run = [&](int64_t units, int64_t grain, auto kernel) {
    parallel_ranges(units, grain, [&](int64_t begin, int64_t end) { kernel(inputs, parts.get(), begin, end); });
  };
  const int64_t features = std::min(inputs.dim, kFeaturePart), candidates = std::min(inputs.count, kCandidatePart);
  run(rows * candidate_parts(inputs), row_grain(candidates * features),
      SSLKERNELS_CURRENT_ISA(prediction_energy_parts));
  run(inputs.batch, row_grain(feature_parts(inputs) * inputs.count), SSLKERNELS_CURRENT_ISA(prediction_energy_finish));
}

void run_prediction_energy_bwd(const PredictionEnergyGradient& gradient) {
  const PredictionEnergy& inputs = gradient.inputs;
  advise_output(gradient.grad_prediction, inputs.batch * inputs.count * inputs.dim, inputs.element);
  parallel(inputs.batch * feature_parts(inputs), row_grain(inputs.count * std::min(inputs.dim, kFeaturePart)),
           SSLKERNELS_CURRENT_ISA(prediction_energy_bwd), gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels_native, m) {
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
      "gumbel_rows_fwd(Tensor logits, Tensor? seed, Tensor? row_ids, int first_row, Tensor? inverse_tau, int output, "
      "Tensor(a!)? y, Tensor(b!)? index, Tensor(c!) max, Tensor(d!) sum, Tensor(e!)? argmax, "
      "Tensor(f!)? softmax_max, Tensor(g!)? softmax_sum) -> ()");
  m.def(
      "gumbel_rows_bwd(Tensor? grad, Tensor? grad_usage, Tensor? mask, Tensor logits, Tensor? seed, Tensor? row_ids, "
      "int first_row, Tensor? inverse_tau, Tensor? max, Tensor? sum, Tensor? softmax_max, Tensor? softmax_sum, "
      "Tensor(a!) grad_logits) -> ()");
  m.def(
      "probability_sums(Tensor logits, Tensor softmax_max, Tensor softmax_sum, Tensor? mask, Tensor(a!) partial, "
      "int chunk_rows) -> ()");
  m.def(
      "search_codes(Tensor input, Tensor codebook, int metric, float matmul_rounding, Tensor? center, bool as_given, "
      "int tile_rows, int tile_codes, Tensor(a!) index, Tensor(b!) score) -> ()");
  m.def(
      "quantize_rows(Tensor input, Tensor codebook, int metric, float matmul_rounding, int tile_rows, int tile_codes, "
      "Tensor(a!) values, Tensor(b!) index, Tensor(c!) commitment, Tensor(d!) usage) -> ()");
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
      "prediction_energy_fwd(Tensor prediction, Tensor target, Tensor(a!) value, Tensor(b!)? weights, Tensor(c!)? "
      "energies, float beta, "
      "bool minimum) -> ()");
  m.def(
      "prediction_energy_bwd(Tensor grad_value, Tensor prediction, Tensor target, Tensor weights, "
      "Tensor(a!)? grad_prediction, Tensor(b!)? grad_target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  bind_cpu<parse_gaussian_fwd, run_gaussian_fwd>(m, "gaussian_fwd");
  bind_cpu<parse_gaussian_bwd, run_gaussian_bwd>(m, "gaussian_bwd");
  bind_cpu<parse_gumbel_rows_fwd, run_gumbel_rows_fwd>(m, "gumbel_rows_fwd");
  bind_cpu<parse_gumbel_rows_bwd, run_gumbel_rows_bwd>(m, "gumbel_rows_bwd");
  bind_cpu<parse_probability_sums, run_probability_sums>(m, "probability_sums");
  bind_cpu<parse_search_codes, run_search_codes>(m, "search_codes");
  bind_cpu<parse_quantize_rows, run_quantize_rows>(m, "quantize_rows");
  bind_cpu<parse_gather_codes, run_gather_codes>(m, "gather_codes");
  bind_cpu<parse_code_difference, run_code_difference>(m, "code_difference");
  bind_cpu<parse_free_energy_fwd, run_free_energy_fwd>(m, "free_energy_fwd");
  bind_cpu<parse_free_energy_bwd, run_free_energy_bwd>(m, "free_energy_bwd");
  bind_cpu<parse_prediction_energy_fwd, run_prediction_energy_fwd>(m, "prediction_energy_fwd");
  bind_cpu<parse_prediction_energy_bwd, run_prediction_energy_bwd>(m, "prediction_energy_bwd");
}

#if defined(SSLKERNELS_WITH_CUDA)
namespace {

// The CUDA device as a Device of search_in_tiles.
struct CodeSearchOnCuda {
  static constexpr bool kGain = true;
  static constexpr int64_t kPitch = 4;  // rows of products start at multiples of 16 bytes
  const Tensor& like;
  void* stream;
  std::vector<Tensor> buffers;

  template <class A>
  A* buffer(int64_t count) {
    if (count == 0) return nullptr;
    buffers.push_back(workspace(like, count, sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float));
    return static_cast<A*>(buffers.back().mutable_data_ptr());
  }
  template <class A>
  A* products(int64_t, int64_t count) {
    return buffer<A>(count);
  }
  void code_tile(const CodeTile& tile) { launch_code_tile(tile, stream); }
  template <class A>
  void multiply(const CodeVectors& a, const CodeVectors& b, A* products, int64_t pitch) {
    multiply_vectors(a, b, products, pitch, like.device());
  }
  void best_codes(const CodeScores& scores) { launch_best_codes(scores, stream); }
};

void allocate_and_launch_search_codes(const CodeSearch& search, const Tensor& like, void* stream) {
  CodeSearchOnCuda cuda{like, stream, {}};
  if (type_of_products(search.input, search.codebook) == ScalarType::Double) {
    search_in_tiles<double>(search, 0, search.input.rows, cuda);
  } else {
    search_in_tiles<float>(search, 0, search.input.rows, cuda);
  }
}

void allocate_and_launch_prediction_energy_fwd(const PredictionEnergy& inputs, const Tensor& like, void* stream) {
  const PredictionEnergyPlan plan = plan_prediction_energy(inputs);
  const Tensor parts = workspace(like, workspace_of(inputs, plan), accumulation_type(inputs.element));
  launch_prediction_energy_fwd(inputs, plan, parts.mutable_data_ptr(), stream);
}

void allocate_and_launch_prediction_energy_bwd(const PredictionEnergyGradient& gradient, const Tensor& like,
                                               void* stream) {
  const PredictionEnergyGradientPlan plan = plan_prediction_energy_bwd(gradient);
  const Tensor parts = workspace(like, workspace_of(gradient, plan), accumulation_type(gradient.inputs.element));
  launch_prediction_energy_bwd(gradient, plan, parts.mutable_data_ptr(), stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  bind_cuda<parse_gaussian_fwd, launch_gaussian_fwd>(m, "gaussian_fwd");
  bind_cuda<parse_gaussian_bwd, launch_gaussian_bwd>(m, "gaussian_bwd");
  bind_cuda<parse_gumbel_rows_fwd, launch_gumbel_rows_fwd>(m, "gumbel_rows_fwd");
  bind_cuda<parse_gumbel_rows_bwd, launch_gumbel_rows_bwd>(m, "gumbel_rows_bwd");
  bind_cuda<parse_probability_sums, launch_probability_sums>(m, "probability_sums");
  bind_cuda<parse_search_codes, allocate_and_launch_search_codes>(m, "search_codes");
  bind_cuda<parse_gather_codes, launch_gather_codes>(m, "gather_codes");
  bind_cuda<parse_code_difference, launch_code_difference>(m, "code_difference");
  bind_cuda<parse_free_energy_fwd, launch_free_energy_fwd>(m, "free_energy_fwd");
  bind_cuda<parse_free_energy_bwd, launch_free_energy_bwd>(m, "free_energy_bwd");
  bind_cuda<parse_prediction_energy_fwd, allocate_and_launch_prediction_energy_fwd>(m, "prediction_energy_fwd");
  bind_cuda<parse_prediction_energy_bwd, allocate_and_launch_prediction_energy_bwd>(m, "prediction_energy_bwd");
}
#endif

}  // namespace sslkernels
