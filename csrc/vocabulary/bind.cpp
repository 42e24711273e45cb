// The CPU implementations of the operators of masked prediction, and of the random streams, over torch's thread pool.
#include "core/cpu/bind.h"

#include "core/scale_add.h"
#include "random/random_stream.h"
#include "vocabulary/cross_entropy.h"
#include "vocabulary/mask_tokens.h"
#include "vocabulary/mask_tokens_bind.h"
#include "vocabulary/sample_rows.h"
#include "vocabulary/sample_rows_bind.h"

namespace sslkernels {
namespace {

using torch::stable::Tensor;

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
  if (rows.grad != rows.logits) advise_output(grad);
  torch::stable::parallel_for(0, rows.count, row_grain(rows.vocab), [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(cross_entropy_rows_bwd, rows, begin, end);
  });
}

void scale_add(Tensor input, OptionalTensor scale, Tensor out, bool add) {
  const ScaleAdd arguments = scale_add_arguments(input, scale, out, add);
  torch::stable::parallel_for(0, arguments.count, kGrain, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(scale_add, arguments, begin, end);
  });
}

void sample_rows(Tensor products, OptionalTensor bias, Tensor seed, Tensor row_ids, int64_t first_column, int64_t vocab,
                 double scale, Tensor row_max, Tensor sum_exp, Tensor best, Tensor logprob, Tensor index) {
  const SampleRows sample = sample_rows_arguments(products, bias, seed, row_ids, first_column, vocab, scale, row_max,
                                                  sum_exp, best, logprob, index);
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
  advise_output(output_ids);
  advise_output(labels);
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

void random_stream(Tensor seed, OptionalTensor row_ids, int64_t sample, int64_t stream, Tensor out) {
  const RandomStream numbers = random_stream_arguments(seed, row_ids, sample, stream, out);
  advise_output(out);
  const int64_t groups = numbers.rows * ((numbers.columns + 3) / 4);
  torch::stable::parallel_for(0, groups, kGrain / 4, [&](int64_t begin, int64_t end) {
    SSLKERNELS_CALL_ISA(random_stream, numbers, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  m.impl("cross_entropy_rows_fwd", TORCH_BOX(&cross_entropy_rows_fwd));
  m.impl("cross_entropy_rows_bwd", TORCH_BOX(&cross_entropy_rows_bwd));
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("sample_rows", TORCH_BOX(&sample_rows));
  m.impl("mask_tokens", TORCH_BOX(&mask_tokens));
  m.impl("random_stream", TORCH_BOX(&random_stream));
}

}  // namespace sslkernels
