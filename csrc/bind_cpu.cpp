// The operators of the namespace sslkernels_native, and their CPU implementations over torch's thread pool.
#include <torch/csrc/stable/ops.h>

#include "bind.h"
#include "bind_mask_tokens.h"
#include "bind_negative_sampling.h"
#include "cpu/cross_entropy.h"
#include "cpu/mask_tokens.h"
#include "cpu/memory.h"
#include "cpu/negative_sampling.h"
#include "cpu/row_sums.h"
#include "cpu/scale_add.h"

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

void random_bits(Tensor seed, OptionalTensor row_ids, int64_t sample, Tensor out) {
  const RandomBits bits = random_bits_arguments(seed, row_ids, sample, out);
  advise_huge_pages(bits.out, out.numel() * out.element_size());
  const int64_t groups = bits.rows * ((bits.columns + 3) / 4);
  torch::stable::parallel_for(0, groups, kGrain / 4,
                              [&](int64_t begin, int64_t end) { SSLKERNELS_CALL_ISA(random_bits, bits, begin, end); });
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

void scale_add(Tensor input, OptionalTensor scale, Tensor out, bool add) {
  const ScaleAdd arguments = scale_add_arguments(input, scale, out, add);
  torch::stable::parallel_for(0, arguments.count, kGrain, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(scale_add, arguments, begin, end);
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
  m.def("random_bits(Tensor seed, Tensor? row_ids, int sample, Tensor(a!) out) -> ()");
  m.def(
      "mask_tokens(Tensor input_ids, Tensor seed, Tensor? special_mask, Tensor? word_ids, Tensor? row_ids, "
      "Tensor ranges, Tensor(a!) output_ids, Tensor(b!) labels, int select, int stay, int enter, int to_mask, "
      "int to_random, int mask_id, int allowed, int ignore_index, bool chained) -> ()");
  m.def("scale_add(Tensor input, Tensor? scale, Tensor(a!) out, bool add) -> ()");
  m.def(
      "negative_sampling_fwd(Tensor center, Tensor context, Tensor negatives, Tensor center_weight, "
      "Tensor context_weight, Tensor(a!) loss, Tensor(b!)? slopes, Tensor(c!)? direction, bool exclude_positive) -> "
      "()");
  m.def("sort_rows(Tensor keys, Tensor(a!) order, Tensor(b!) starts) -> ()");  // on a GPU torch's own sort will do
  m.def(
      "weighted_row_sums(Tensor starts, Tensor order, Tensor coefficient, Tensor source, Tensor? source_index, "
      "Tensor(a!) out, int entries_of_source) -> ()");
  m.def("column_sums(Tensor values, Tensor(a!) total, bool add) -> ()");  // on a CPU torch's own sum will do
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  m.impl("cross_entropy_rows_fwd", TORCH_BOX(&cross_entropy_rows_fwd));
  m.impl("cross_entropy_rows_bwd", TORCH_BOX(&cross_entropy_rows_bwd));
  m.impl("random_bits", TORCH_BOX(&random_bits));
  m.impl("mask_tokens", TORCH_BOX(&mask_tokens));
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("negative_sampling_fwd", TORCH_BOX(&negative_sampling_fwd));
  m.impl("sort_rows", TORCH_BOX(&sort_rows));
  m.impl("weighted_row_sums", TORCH_BOX(&weighted_row_sums));
}

}  // namespace sslkernels
