// Registers CUDA kernels: device guard, current stream, launch.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "core/bind.h"

namespace sslkernels {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Resolved at run time: the extension must load with CPU-only torch, so it cannot link libtorch_cuda, and Python
// dlopens it RTLD_LOCAL, which hides its symbols from a weak reference.
inline CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

inline void* current_stream(const Tensor& tensor) {
  static const CurrentStream current = find_current_stream();
  STD_TORCH_CHECK(current != nullptr,
                  "sslkernels: aoti_torch_get_current_cuda_stream was not found in libtorch_cuda.so");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "sslkernels: no current CUDA stream");
  return stream;
}

// Uninitialised memory on the device of `like`.
inline Tensor workspace(const Tensor& like, int64_t count, ScalarType type) {
  return torch::stable::new_empty(like, {count}, type);
}

template <class First, class... Rest>
const Tensor& first_tensor(const First& first, const Rest&... rest) {
  if constexpr (std::is_same_v<First, Tensor>) {
    return first;
  } else {
    return first_tensor(rest...);
  }
}

template <auto parse, auto launch, class Signature = decltype(parse)>
struct CudaKernel;
template <auto parse, auto launch, class Struct, class... Arguments>
struct CudaKernel<parse, launch, Struct (*)(Arguments...)> {
  static void call(Arguments... arguments) {
    const Tensor& on = first_tensor(arguments...);
    const Struct parsed = parse(arguments...);
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    if constexpr (std::is_invocable_v<decltype(launch), const Struct&, void*>) {
      launch(parsed, current_stream(on));
    } else {
      launch(parsed, on, current_stream(on));
    }
  }
};

// Registers launch(parse(arguments...), stream) with the signature of `parse`. A launcher that needs a workspace takes
// (struct, tensor, stream) with the first tensor argument, whose device all arguments share.
template <auto parse, auto launch>
void bind_cuda(Library& library, const char* name) {
  library.impl(name, TORCH_BOX(&(CudaKernel<parse, launch>::call)));
}

}  // namespace sslkernels
