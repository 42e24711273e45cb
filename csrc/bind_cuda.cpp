// The CUDA implementations of the operators that bind_cpu.cpp declares: device guard, stream, launch.
#include <torch/csrc/stable/accelerator.h>

#include "bind.h"
#include "cuda/cross_entropy.h"

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  m.impl("cross_entropy_rows_fwd", TORCH_BOX(&cross_entropy_rows_fwd));
  m.impl("cross_entropy_rows_bwd", TORCH_BOX(&cross_entropy_rows_bwd));
}

}  // namespace sslkernels
