// The CUDA implementations of the operators that bind_cpu.cpp declares: device guard, stream, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "bind.h"
#include "cuda/column_sums.h"
#include "cuda/cross_entropy.h"
#include "cuda/scale_add.h"

// Defined by libtorch_cuda alone; weak, so that this object also loads beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace sslkernels {
namespace {

using torch::stable::Tensor;

void* current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "sslkernels: this torch has no CUDA");
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "sslkernels: no current CUDA stream");
  return stream;
}

void cross_entropy_rows_fwd(Tensor logits, Tensor target, OptionalTensor bias, OptionalTensor weight,
                            OptionalTensor weight_sum, OptionalTensor coefficient, Tensor loss, Tensor row_max,
                            Tensor sum_exp, Tensor logprob, Tensor prediction, Tensor entropy, OptionalTensor grad,
                            int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                            double logit_scale, bool stats) {
  CrossEntropyRows rows =
      cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob, grad,
                         {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  add_forward_outputs(rows, logits, loss, prediction, entropy, stats);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_cross_entropy_rows_fwd(rows, current_stream(logits));
}

void cross_entropy_rows_bwd(Tensor logits, Tensor target, OptionalTensor bias, OptionalTensor weight,
                            OptionalTensor weight_sum, Tensor coefficient, Tensor row_max, Tensor sum_exp,
                            Tensor logprob, Tensor grad, int64_t ignore_index, double label_smoothing, double z_loss,
                            double softcap, double logit_scale) {
  const CrossEntropyRows rows =
      cross_entropy_rows(logits, target, bias, weight, weight_sum, coefficient, row_max, sum_exp, logprob, grad,
                         {ignore_index, label_smoothing, z_loss, softcap, logit_scale});
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_cross_entropy_rows_bwd(rows, current_stream(logits));
}

void scale_add(Tensor input, OptionalTensor scale, Tensor out, bool add) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  launch_scale_add(scale_add_arguments(input, scale, out, add), current_stream(out));
}

void column_sums(Tensor values, Tensor total, bool add) {
  check_matrix(values, "values");
  check_vector(total, values.size(1), accumulation_type(values), "total");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  ColumnSums sums{element_of(values),       values.const_data_ptr(),
                  values.stride(0),         values.size(0),
                  values.size(1),           nullptr,
                  total.mutable_data_ptr(), add};
  const Tensor partials = torch::stable::new_empty(total, {column_sums_row_blocks(sums), sums.columns});
  sums.partials = partials.mutable_data_ptr();
  launch_column_sums(sums, current_stream(values));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  m.impl("cross_entropy_rows_fwd", TORCH_BOX(&cross_entropy_rows_fwd));
  m.impl("cross_entropy_rows_bwd", TORCH_BOX(&cross_entropy_rows_bwd));
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("column_sums", TORCH_BOX(&column_sums));
}

}  // namespace sslkernels
