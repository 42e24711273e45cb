// The device primitives that the kernels use; no other file assumes that it runs on a GPU. For the host build, where
// each CUDA thread is a std::thread, tests/cuda_host/device_host.h takes its place.
#pragma once

#if !defined(__CUDACC__)
#include "device_host.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "core/element.h"

// An out-of-line function, which has its own register allocation.
#define SSLKERNELS_OUTLINED __device__ __noinline__

namespace sslkernels {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Moves a value of any trivially copyable type word by word. All threads of the warp must call it.
template <class T, class Move>
__device__ __forceinline__ T move_words(T value, Move move) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "move_words: whole words");
  constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = move(words[w]);
  memcpy(&value, words, sizeof(T));
  return value;
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return move_words(value, [=](uint32_t word) { return __shfl_sync(kFullWarp, word, lane); });
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return move_words(value, [=](uint32_t word) { return __shfl_xor_sync(kFullWarp, word, lanes); });
}

// Lanes below `lanes` keep their value.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int lanes) {
  return move_words(value, [=](uint32_t word) { return __shfl_up_sync(kFullWarp, word, lanes); });
}

// One bit per lane whose value is true.
__device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(kFullWarp, value); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(int(bits)) - 1; }

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// Without memory ordering: for reads whose values have been used already.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The address in the shared memory of block `rank` that corresponds to `pointer` in this block's.
template <class T>
__device__ __forceinline__ const T* cluster_shared(const T* pointer, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(pointer)), "r"(rank));
  return reinterpret_cast<const T*>(there);
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_relaxed() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ const T* cluster_shared(const T* pointer, int) {
  return pointer;
}
#endif

struct alignas(16) Words {
  uint32_t at[4];
};

__device__ __forceinline__ Words load_words(const void* pointer) {
  const uint4 v = __ldcg(static_cast<const uint4*>(pointer));
  return {v.x, v.y, v.z, v.w};
}
// For memory that is not read again.
__device__ __forceinline__ Words load_words_last(const void* pointer) {
  const uint4 v = __ldcs(static_cast<const uint4*>(pointer));
  return {v.x, v.y, v.z, v.w};
}
// For memory that other blocks read too.
__device__ __forceinline__ Words load_words_cached(const void* pointer) {
  const uint4 v = __ldca(static_cast<const uint4*>(pointer));
  return {v.x, v.y, v.z, v.w};
}
// For memory that is not read again soon.
__device__ __forceinline__ void store_words(void* pointer, Words words) {
  __stcs(static_cast<uint4*>(pointer), make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]));
}

// Pairs of 16-bit elements in a word. Written in PTX, because CUDA's own headers cost half a second per file.

__device__ __forceinline__ void unpack(uint32_t word, BFloat16, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t word, Half, float& low, float& high) {
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack(float low, float high, Half) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// 2^x by the special function unit, within 2 ulp; 0 where the result would be subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// 1 / x by the special function unit, within 1 ulp; 0 for infinity.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace sslkernels
#endif
