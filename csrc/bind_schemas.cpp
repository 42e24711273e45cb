// The operators of the namespace sslkernels_native. Their implementations are in bind_cpu_<family>.cpp and
// bind_cuda.cpp.
#include <torch/csrc/stable/library.h>

namespace sslkernels {

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
      "sample_rows(Tensor products, Tensor? bias, Tensor seed, Tensor row_ids, int first_column, int vocab, "
      "float scale, Tensor(a!) row_max, Tensor(b!) sum_exp, Tensor(c!) best, Tensor(d!) logprob, Tensor(e!) index) -> "
      "()");
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
      "search_codes(Tensor input, Tensor codebook, int metric, float matmul_rounding, Tensor? center, bool as_given, "
      "int tile_rows, int tile_codes, Tensor(a!) index, Tensor(b!) score) -> ()");
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

}  // namespace sslkernels
