// Launches with an error check that names the kernel, and the facts of the device that launchers plan with.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace sslkernels {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and not by whoever looks next
  throw std::runtime_error(std::string("sslkernels: ") + what + " failed: " + cudaGetErrorString(error));
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

struct DeviceLimits {
  int processors;            // streaming multiprocessors
  int64_t shared_per_block;  // bytes of shared memory
  int64_t shared_per_processor;
  int64_t shared_reserved;  // of each block, by the system
  int64_t cache;            // bytes of the L2 cache
  int largest_cluster;      // 1: no clusters
};

// Of the current device.
inline int device_attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

inline DeviceLimits device_limits() {
  const auto attribute = device_attribute;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrReservedSharedMemoryPerBlock),
          attribute(cudaDevAttrL2CacheSize),
          major == 9 || major == 10 ? 16
          : major > 10              ? 8
                                    : 1};
}

constexpr int kPortableCluster = 8;  // what every device with clusters can run

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;  // blocks of a cluster; divides `blocks`
};

// A launch as the runtime wants it.
struct LaunchConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const char* name, const void* kernel, const LaunchShape& shape, void* stream) {
    if (shape.blocks > INT32_MAX) {
      throw std::runtime_error(std::string("sslkernels: ") + name + " would need more than 2^31 - 1 blocks");
    }
    if (shape.shared_bytes > 48 * 1024) {  // the most there is: threads that launch at a time set the same
      const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
    }
    if (shape.cluster > kPortableCluster) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Whether the code of the kernel that runs here knows of clusters: that compiled from PTX of an older chip does not.
template <class... Parameters>
bool knows_clusters(const char* name, void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), name);
  return attributes.ptxVersion >= 90;
}

// Whether the device has a place for one cluster of this shape.
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
