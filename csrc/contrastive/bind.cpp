// The operators of joint embeddings: schemas, CPU and CUDA bindings.
#include "core/cpu/bind.h"

#include <algorithm>
#include <cmath>

#include "contrastive/glove_bind.h"
#include "contrastive/negative_sampling_bind.h"
#include "contrastive/pair_rows_bind.h"
#include "contrastive/query_negatives_bind.h"
#include "contrastive/score_tiles_bind.h"

#if defined(SSLKERNELS_WITH_CUDA)
#include "core/cuda/bind.h"
#endif

namespace sslkernels {
namespace {

void run_query_negatives(const QueryNegatives& args) {
  if (args.index == nullptr) advise_output(args.grad_negatives, args.rows * args.count * args.dim, args.element);
  parallel(args.rows, row_grain(args.count * args.dim), SSLKERNELS_CURRENT_ISA(query_negatives), args,
           query_negatives_scratch_bytes(args));
}

void run_pair_positives(const PairPositives& positives) {
  parallel(positives.tile.rows, row_grain(1), SSLKERNELS_CURRENT_ISA(pair_positives_in_tile), positives);
}

void run_pair_row_sums(const PairRowSums& sums) {
  parallel(sums.tile.rows, row_grain(sums.tile.columns), SSLKERNELS_CURRENT_ISA(pair_row_sums), sums);
}

void run_pair_column_sums(const PairColumnSums& sums) {
  const int64_t blocks = (sums.tile.columns + kPairColumns - 1) / kPairColumns;
  parallel(blocks, row_grain(sums.tile.rows * kPairColumns), SSLKERNELS_CURRENT_ISA(pair_column_sums), sums);
}

void run_pair_softmax_sums(PairSoftmaxSums sums) {
  const ScoreTile& tile = sums.tile;
  const int64_t values = parts_of(tile) * tile.columns, size = bytes_of(accumulation_element(tile.element));
  const auto memory = scratch_of(2 * values * size);
  sums.part_max = memory.get();
  sums.part_sum = memory.get()->bytes + values * size;
  parallel(parts_of(tile), row_grain(kPartRows * tile.columns), SSLKERNELS_CURRENT_ISA(pair_softmax_sums), sums);
  const int64_t blocks = (tile.columns + kPairColumns - 1) / kPairColumns;
  parallel(blocks, row_grain(parts_of(tile) * kPairColumns), SSLKERNELS_CURRENT_ISA(pair_softmax_merge), sums);
}

// The middle of the finite references, NaN if they are further apart than exponentials can be shared, or NaN.
template <class A>
double center_of(const A* references, int64_t count) {
  A low = INFINITY, high = -INFINITY;
  for (int64_t j = 0; j < count; ++j) {
    if (references[j] == A(INFINITY)) continue;  // a column without a positive, whose exponentials are 0
    if (!std::isfinite(references[j])) return NAN;
    low = std::min(low, references[j]);
    high = std::max(high, references[j]);
  }
  return double(high) - double(low) <= 2 * kSharedRange ? (double(low) + double(high)) / 2 : double(NAN);
}

void run_pair_gradient(PairGradient gradient) {
  const ScoreTile& tile = gradient.tile;
  const bool both = gradient.row.weight != nullptr && gradient.column.weight != nullptr;
  std::unique_ptr<Line[]> memory;
  if (both && tile.energy == Energy::kSoftmax) {
    const bool wide = tile.element == Element::kDouble;
    gradient.center = wide ? center_of(static_cast<const double*>(gradient.column.reference), tile.columns)
                           : center_of(static_cast<const float*>(gradient.column.reference), tile.columns);
    if (std::isfinite(gradient.center)) {
      memory = scratch_of(tile.columns * bytes_of(accumulation_element(tile.element)));
      gradient.column_factor = memory.get();
      parallel(tile.columns, row_grain(1), SSLKERNELS_CURRENT_ISA(pair_column_factors), gradient);
    }
  }
  parallel(gradient.tile.rows, row_grain(gradient.tile.columns), SSLKERNELS_CURRENT_ISA(pair_gradient), gradient);
}

void run_inverse_norms(const InverseNorms& args) {
  parallel(args.rows, row_grain(args.dim), SSLKERNELS_CURRENT_ISA(inverse_norms), args);
}

void run_positive_scores(const PositiveScores& args) {
  parallel(args.rows, row_grain(args.dim), SSLKERNELS_CURRENT_ISA(positive_scores), args);
}

void run_norms_and_scores(const NormsAndScores& args) {
  const int64_t count = args.rows < args.keys ? args.keys : args.rows;
  parallel(count, row_grain(2 * args.dim), SSLKERNELS_CURRENT_ISA(norms_and_scores), args);
}

void run_pair_losses(const PairLosses& args) {
  constexpr int64_t kCost = 64;  // a row costs as much as so many elements: exponentials and logarithms
  if (args.references > args.rows && args.reference != nullptr) {
    with_element(args.element, [&](auto zero) {
      auto* reference = static_cast<decltype(zero)*>(args.reference);
      auto* settled = static_cast<decltype(zero)*>(args.settled);
      for (int64_t i = args.rows; i < args.references; ++i) {
        from_float(INFINITY, &reference[i]);
        if (settled != nullptr) from_float(0.f, &settled[i]);
      }
    });
  }
  parallel(args.rows, row_grain(kCost), SSLKERNELS_CURRENT_ISA(pair_losses), args);
}

void run_finish_gradients(const FeatureGradients& args) {
  parallel(args.rows, row_grain(args.dim), SSLKERNELS_CURRENT_ISA(finish_gradients), args);
}

void run_negative_sampling_fwd(const NegativeSampling& pairs) {
  advise_output(pairs.direction, pairs.count * pairs.dim, accumulation_element(pairs.element));
  const int64_t grain = row_grain((pairs.negative_count + 1) * pairs.dim);
  parallel(pairs.count, grain, SSLKERNELS_CURRENT_ISA(negative_sampling_fwd), pairs);
}

void run_glove_fwd(const Glove& pairs) {
  parallel(pairs.count, row_grain(2 * pairs.dim), SSLKERNELS_CURRENT_ISA(glove_fwd), pairs);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels_native, m) {
  m.def(
      "query_negatives(Tensor query, Tensor negatives, Tensor? index, Tensor? bank, Tensor? mask, Tensor? "
      "query_inverse_norm, Tensor logit_scale, "
      "Tensor? logit_bias, int energy, Tensor? reference, Tensor? coefficient, Tensor? smoothing, bool final, "
      "Tensor(a!) scores, Tensor(b!) value, Tensor(c!) grad_query, Tensor(d!) grad_negatives, Tensor(e!) grad_scale, "
      "Tensor(f!) grad_bias) -> ()");
  m.def("pair_inverse_norm(Tensor values, Tensor(a!) norm) -> ()");
  m.def(
      "pair_positive_scores(Tensor query, Tensor key, Tensor? query_norm, Tensor? key_norm, Tensor? positive, Tensor "
      "scale, Tensor? bias, Tensor(a!) u, Tensor(b!) score) -> ()");
  m.def(
      "pair_norms_and_scores(Tensor query, Tensor key, Tensor scale, Tensor? bias, Tensor(a!) query_norm, Tensor(b!) "
      "key_norm, Tensor(c!) u, Tensor(d!) score) -> ()");
  m.def(
      "pair_losses(Tensor? max, Tensor sum, Tensor? active, Tensor? score_sum, Tensor? positive_sum, Tensor score, "
      "Tensor u, Tensor? positive, Tensor? positives, Tensor? candidates, Tensor? weight, Tensor? share, Tensor? "
      "smoothing, int energy, float half, float label_smoothing, bool ids_positive, Tensor(a!)? others, Tensor(b!)? "
      "reference, Tensor(c!)? settled, Tensor(d!)? loss, Tensor(e!) score_gradient, Tensor(f!) dot, Tensor(g!) total) "
      "-> "
      "()");
  m.def(
      "pair_finish_gradient(Tensor total, Tensor values, Tensor? norm, Tensor? partner, Tensor? partner_norm, "
      "Tensor? index, Tensor? score_gradient, Tensor? extra, Tensor scale, Tensor(b!) out) -> ()");
  m.def(
      "pair_positives_in_tile(Tensor products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? pair_mask, Tensor? mask_index, Tensor? column_mask, "
      "Tensor column, Tensor(a!) score) -> ()");
  m.def(
      "pair_row_sums(Tensor products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? pair_mask, Tensor? mask_index, Tensor? column_mask, "
      "Tensor? threshold, Tensor? positive_score, Tensor? "
      "cosine_row_norm, Tensor? cosine_column_norm, Tensor(a!)? max, Tensor(b!) sum, Tensor(c!)? active, "
      "Tensor(d!)? score_sum, Tensor(e!)? positive_sum, Tensor(f!)? uniformity_sum, "
      "Tensor(g!)? num_above_positive, Tensor(h!)? num_equal_positive) -> ()");
  m.def(
      "pair_column_sums(Tensor products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? pair_mask, Tensor? mask_index, Tensor? column_mask, "
      "Tensor? threshold, Tensor(a!)? max, Tensor(b!) sum, "
      "Tensor(c!)? active, Tensor(d!)? score_sum, Tensor(e!)? positive_sum) -> ()");
  m.def(
      "pair_softmax_sums(Tensor products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? pair_mask, Tensor? mask_index, Tensor? column_mask, "
      "Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!) column_max, Tensor(d!) column_sum) -> ()");
  m.def(
      "pair_gradient(Tensor(a!) products, Tensor? row_norm, Tensor? column_norm, Tensor scale, Tensor? bias, int "
      "energy, Tensor? row_positive, Tensor? column_positive, Tensor? row_self, Tensor? column_self, Tensor? "
      "row_id, Tensor? column_id, bool ids_positive, Tensor? pair_mask, Tensor? mask_index, Tensor? column_mask, "
      "Tensor? row_weight, Tensor? row_reference, Tensor? "
      "row_share, Tensor? row_smoothing, Tensor? column_weight, Tensor? column_reference, Tensor? column_share, "
      "Tensor? column_smoothing, Tensor(b!) dot, Tensor(c!) total, Tensor(d!)? cost) -> ()");
  m.def(
      "negative_sampling_fwd(Tensor center, Tensor context, Tensor negatives, Tensor center_weight, "
      "Tensor context_weight, Tensor(a!) loss, Tensor(b!)? slopes, Tensor(c!)? direction, bool exclude_positive) -> "
      "()");
  m.def(
      "glove_fwd(Tensor center, Tensor context, Tensor center_weight, Tensor context_weight, Tensor center_bias, "
      "Tensor context_bias, Tensor target, Tensor weight, Tensor(a!) loss, Tensor(b!)? slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  bind_cpu<parse_query_negatives, run_query_negatives>(m, "query_negatives");
  bind_cpu<parse_inverse_norms, run_inverse_norms>(m, "pair_inverse_norm");
  bind_cpu<parse_positive_scores, run_positive_scores>(m, "pair_positive_scores");
  bind_cpu<parse_norms_and_scores, run_norms_and_scores>(m, "pair_norms_and_scores");
  bind_cpu<parse_pair_losses, run_pair_losses>(m, "pair_losses");
  bind_cpu<parse_finish_gradients, run_finish_gradients>(m, "pair_finish_gradient");
  bind_cpu<parse_pair_positives, run_pair_positives>(m, "pair_positives_in_tile");
  bind_cpu<parse_pair_row_sums, run_pair_row_sums>(m, "pair_row_sums");
  bind_cpu<parse_pair_column_sums, run_pair_column_sums>(m, "pair_column_sums");
  bind_cpu<parse_pair_softmax_sums, run_pair_softmax_sums>(m, "pair_softmax_sums");
  bind_cpu<parse_pair_gradient, run_pair_gradient>(m, "pair_gradient");
  bind_cpu<parse_negative_sampling_fwd, run_negative_sampling_fwd>(m, "negative_sampling_fwd");
  bind_cpu<parse_glove_fwd, run_glove_fwd>(m, "glove_fwd");
}

#if defined(SSLKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  bind_cuda<parse_query_negatives, launch_query_negatives>(m, "query_negatives");
  bind_cuda<parse_negative_sampling_fwd, launch_negative_sampling_fwd>(m, "negative_sampling_fwd");
  bind_cuda<parse_glove_fwd, launch_glove_fwd>(m, "glove_fwd");
}
#endif

}  // namespace sslkernels
