// Kernel launches with an error check that names the kernel, and the device limits that launchers plan with.
#pragma once

#include <cstdint>

#include "core/cuda/device.h"

namespace sslkernels {

// Throws std::runtime_error("sslkernels: " + the printf-formatted message). Functions that a launcher calls once are
// out of line, here and below: every .cu file compiles its headers once per architecture.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void check_cuda(cudaError_t error, const char* what);

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

struct DeviceLimits {
  int processors;            // streaming multiprocessors
  int64_t shared_per_block;  // bytes of shared memory
  int64_t shared_per_processor;
  int64_t shared_reserved;  // per block, by the system
  int64_t cache;            // bytes of the L2 cache
  int largest_cluster;      // 1: no clusters
};

DeviceLimits device_limits();  // for the current device

constexpr int kPortableCluster = 8;  // cluster size that every device with clusters supports

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;  // blocks of a cluster; divides `blocks`
};

// A launch in the form of the CUDA runtime.
struct LaunchConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const char* name, const void* kernel, const LaunchShape& shape, void* stream);
  LaunchConfig(const LaunchConfig&) = delete;
};

// Whether the compiled kernel supports clusters: code from PTX of an older architecture does not.
bool knows_clusters(const char* name, const void* kernel);
template <class... Parameters>
bool knows_clusters(const char* name, void (*kernel)(Parameters...)) {
  return knows_clusters(name, reinterpret_cast<const void*>(kernel));
}

// Whether one cluster of this shape fits on the device.
template <class... Parameters>
bool can_launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape) {
  const LaunchConfig launch(name, reinterpret_cast<const void*>(kernel), shape, nullptr);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return clusters > 0;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
            const Arguments&... arguments) {
  if (shape.blocks == 0) return;
  const LaunchConfig launch(name, reinterpret_cast<const void*>(kernel), shape, stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, kernel, Parameters(arguments)...), name);
}

}  // namespace sslkernels
