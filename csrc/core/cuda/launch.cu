#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "core/cuda/launch.h"

namespace sslkernels {
namespace {

int device_attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void fail(const char* format, ...) {
  char text[256] = "sslkernels: ";
  const size_t begun = std::strlen(text);
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + begun, sizeof(text) - begun, format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next check does not report it again
  fail("%s failed: %s", what, cudaGetErrorString(error));
}

DeviceLimits device_limits() {
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

LaunchConfig::LaunchConfig(const char* name, const void* kernel, const LaunchShape& shape, void* stream) {
  if (shape.blocks > INT32_MAX) fail("%s would need more than 2^31 - 1 blocks", name);
  if (shape.shared_bytes > 48 * 1024) {  // the maximum, so that concurrent launches set the same value
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

bool knows_clusters(const char* name, const void* kernel) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes.ptxVersion >= 90;
}

}  // namespace sslkernels
