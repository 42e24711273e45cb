// Marks functions that run both on the host and on a GPU.
#pragma once

#if defined(__CUDACC__)
#define SSLKERNELS_HD __host__ __device__ __forceinline__
#else
#define SSLKERNELS_HD inline __attribute__((always_inline))
#endif
