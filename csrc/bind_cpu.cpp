// The operators of the namespace sslkernels_native, and their CPU implementations over torch's thread pool.
#include <torch/csrc/stable/ops.h>

#include "bind.h"
#include "cpu/cross_entropy.h"
#include "cpu/memory.h"

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
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  m.impl("cross_entropy_rows_fwd", TORCH_BOX(&cross_entropy_rows_fwd));
  m.impl("cross_entropy_rows_bwd", TORCH_BOX(&cross_entropy_rows_bwd));
}

}  // namespace sslkernels
