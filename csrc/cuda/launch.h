// Launch errors, with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sslkernels {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("sslkernels: launch of ") + kernel + " failed: " + cudaGetErrorString(error));
  }
}

}  // namespace sslkernels
