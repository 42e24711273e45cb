// The operators of masked prediction: schemas, CPU and CUDA bindings.
#include "core/cpu/bind.h"

#include "vocabulary/corrupt_spans_bind.h"
#include "vocabulary/cross_entropy_bind.h"
#include "vocabulary/distillation_bind.h"
#include "vocabulary/mask_tokens_bind.h"
#include "vocabulary/sample_rows_bind.h"

#if defined(SSLKERNELS_WITH_CUDA)
#include "core/cuda/bind.h"
#endif

namespace sslkernels {
namespace {

void run_cross_entropy_rows_fwd(const CrossEntropyRows& rows) {
  parallel(rows.count, row_grain(rows.vocab), SSLKERNELS_CURRENT_ISA(cross_entropy_rows_fwd), rows);
}

void run_cross_entropy_rows_bwd(const CrossEntropyRows& rows) {
  if (rows.grad != rows.logits) advise_output(rows.grad, rows.count * rows.vocab, rows.element);
  parallel(rows.count, row_grain(rows.vocab), SSLKERNELS_CURRENT_ISA(cross_entropy_rows_bwd), rows);
}

void run_teacher_rows(const TeacherRows& rows) {
  parallel(rows.count, row_grain(rows.vocab), SSLKERNELS_CURRENT_ISA(teacher_rows), rows);
}

void run_distillation_rows(const DistillationRows& rows) {
  parallel(rows.count, row_grain(rows.vocab), SSLKERNELS_CURRENT_ISA(distillation_rows), rows);
}

void run_sample_rows(const SampleRows& sample) {
  parallel(sample.rows, row_grain(sample.columns), SSLKERNELS_CURRENT_ISA(sample_rows), sample);
}

void run_mask_tokens(const MaskTokens& tokens) {
  if (tokens.columns == 0) return;
  const size_t bytes = size_t(tokens.rows * tokens.columns * (tokens.wide_ids ? 8 : 4));
  advise_huge_pages(tokens.output_ids, bytes);
  advise_huge_pages(tokens.labels, bytes);
  if (tokens.chained) {
    parallel(tokens.rows, row_grain(tokens.columns), SSLKERNELS_CURRENT_ISA(mask_tokens_chained), tokens);
  } else {
    const int64_t groups = tokens.rows * ((tokens.columns + 3) / 4);
    parallel(groups, kGrain / 4, SSLKERNELS_CURRENT_ISA(mask_tokens), tokens);
  }
}

void run_corrupt_spans(const CorruptSpans& spans) {
  const size_t bytes = size_t(spans.rows) * (spans.wide_ids ? 8 : 4);
  advise_huge_pages(spans.output_ids, bytes * size_t(spans.output_columns()));
  advise_huge_pages(spans.labels, bytes * size_t(spans.label_columns()));
  parallel(spans.rows, row_grain(spans.columns), SSLKERNELS_CURRENT_ISA(corrupt_spans), spans);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels_native, m) {
  m.def(
      "cross_entropy_rows_fwd(Tensor logits, Tensor target, Tensor? bias, Tensor? weight, Tensor? weight_sum, "
      "Tensor? coefficient, Tensor(a!) loss, Tensor(b!) row_max, Tensor(c!) sum_exp, Tensor(d!) logprob, "
      "Tensor(e!) prediction, Tensor(f!) entropy, Tensor(g!)? grad, int ignore_index, float[] options, "
      "bool stats) -> ()");
  m.def(
      "cross_entropy_rows_bwd(Tensor logits, Tensor target, Tensor? bias, Tensor? weight, Tensor? weight_sum, "
      "Tensor coefficient, Tensor row_max, Tensor sum_exp, Tensor logprob, Tensor(a!) grad, int ignore_index, "
      "float[] options) -> ()");
  m.def("teacher_rows(Tensor(a!) logits, Tensor? offset, Tensor scale, Tensor(b!) others, Tensor(c!) best) -> ()");
  m.def(
      "distillation_rows(Tensor(a!) logits, Tensor? offset, Tensor scale, Tensor teacher, Tensor teacher_others, "
      "Tensor teacher_best, Tensor? index, Tensor? share, Tensor? coefficient, Tensor(b!) loss, Tensor(c!) gap, "
      "Tensor(d!) teacher_entropy, Tensor(e!) student_entropy, Tensor(f!) agreement, Tensor(g!)? grad, bool "
      "divergence, "
      "bool stats) -> ()");
  m.def(
      "sample_rows(Tensor products, Tensor? bias, Tensor seed, Tensor row_ids, int first_column, int vocab, "
      "Tensor scale, int draw, Tensor(a!) row_max, Tensor(b!) sum_exp, Tensor(c!) best, Tensor(d!) logprob, Tensor(e!) "
      "index) -> "
      "()");
  m.def(
      "corrupt_spans(Tensor input_ids, Tensor seed, Tensor sentinels, Tensor? row_ids, Tensor(a!) output_ids, "
      "Tensor(b!) labels, int noise, int spans, bool has_eos, int eos_id) -> ()");
  m.def(
      "mask_tokens(Tensor input_ids, Tensor seed, Tensor? special_mask, Tensor? word_ids, Tensor? row_ids, "
      "Tensor ranges, Tensor(a!) output_ids, Tensor(b!) labels, int select, int stay, int enter, int to_mask, "
      "int to_random, int mask_id, int allowed, int ignore_index, bool chained) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  bind_cpu<parse_cross_entropy_rows_fwd, run_cross_entropy_rows_fwd>(m, "cross_entropy_rows_fwd");
  bind_cpu<parse_cross_entropy_rows_bwd, run_cross_entropy_rows_bwd>(m, "cross_entropy_rows_bwd");
  bind_cpu<parse_teacher_rows, run_teacher_rows>(m, "teacher_rows");
  bind_cpu<parse_distillation_rows, run_distillation_rows>(m, "distillation_rows");
  bind_cpu<parse_sample_rows, run_sample_rows>(m, "sample_rows");
  bind_cpu<parse_corrupt_spans, run_corrupt_spans>(m, "corrupt_spans");
  bind_cpu<parse_mask_tokens, run_mask_tokens>(m, "mask_tokens");
}

#if defined(SSLKERNELS_WITH_CUDA)
namespace {

void allocate_and_launch_mask_tokens(const MaskTokens& tokens, const Tensor& like, void* stream) {
  OptionalTensor device_ranges;
  if (tokens.rule.range_count > kInlineRanges) {
    device_ranges = workspace(like, 2 * tokens.rule.range_count, ScalarType::Long);
  }
  launch_mask_tokens(tokens, device_ranges ? device_ranges->mutable_data_ptr<int64_t>() : nullptr, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  bind_cuda<parse_cross_entropy_rows_fwd, launch_cross_entropy_rows_fwd>(m, "cross_entropy_rows_fwd");
  bind_cuda<parse_cross_entropy_rows_bwd, launch_cross_entropy_rows_bwd>(m, "cross_entropy_rows_bwd");
  bind_cuda<parse_teacher_rows, launch_teacher_rows>(m, "teacher_rows");
  bind_cuda<parse_distillation_rows, launch_distillation_rows>(m, "distillation_rows");
  bind_cuda<parse_sample_rows, launch_sample_rows>(m, "sample_rows");
  bind_cuda<parse_mask_tokens, allocate_and_launch_mask_tokens>(m, "mask_tokens");
}
#endif

}  // namespace sslkernels
