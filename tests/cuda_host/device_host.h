// Replaces csrc/core/cuda/device.h on a host, so that the sanitizers of the host compiler check the kernels.
//
// Under ThreadSanitizer every CUDA thread is a std::thread. Two clusters run at a time and share no barrier, so blocks
// that touch the same memory race. Otherwise every CUDA thread is a fiber of one thread, which takes a tenth of the
// time: a fiber runs until it waits.
#pragma once

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "core/element.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SSLKERNELS_OUTLINED inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

struct Device {
  int processors = 4;
  int shared_per_block = 232448;
  int shared_per_processor = 233472;
  int shared_reserved = 1024;
  int cache = 50 << 20;
  int major = 9;
  int largest_cluster = 16;  // largest cluster that fits on the device
  int ptx = 90;              // PTX version that the code was compiled from
};
inline Device device;
inline std::vector<const void*> launched;  // launched kernels, in order

#if defined(__SANITIZE_THREAD__)
inline void wait_for(std::atomic<uint32_t>* value, uint32_t old) {
  syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}
inline void wake(std::atomic<uint32_t>* value) {
  syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
inline void yield();
inline void wait_for(std::atomic<uint32_t>*, uint32_t) { yield(); }
inline void wake(std::atomic<uint32_t>*) {}
#endif

// std::barrier synchronises through counters that all barriers of the process share, which orders threads that no
// barrier orders, so ThreadSanitizer would miss races. Here an arrival happens before the departures of the same phase
// only.
class Barrier {
 public:
  using Phase = uint32_t;

  explicit Barrier(int threads) : threads_(threads), left_(threads) {}

  Phase arrive() {
    const Phase phase = phase_.load(std::memory_order_relaxed);
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      left_.store(threads_, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      wake(&phase_);
    }
    return phase;
  }
  void wait(Phase phase) {
    while (phase_.load(std::memory_order_acquire) == phase) wait_for(&phase_, phase);
  }
  void arrive_and_wait() { wait(arrive()); }

 private:
  const int threads_;
  std::atomic<int> left_;
  std::atomic<Phase> phase_{0};
};

constexpr int kWarp = 32;
constexpr int kSlot = 128;  // bytes that a shuffle moves, at most

struct Warp {
  Barrier barrier{kWarp};
  alignas(16) char slot[2][kWarp][kSlot];
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<char[], void (*)(char*)> shared;
  size_t shared_bytes;

  Block(int threads, size_t bytes)
      : barrier(threads),
        shared(static_cast<char*>(::operator new(bytes, std::align_val_t(16))),
               [](char* p) { ::operator delete(p, std::align_val_t(16)); }),
        shared_bytes(bytes) {
    std::memset(shared.get(), 0xff, bytes);
    for (int w = 0; w < threads / kWarp; ++w) warps.push_back(std::make_unique<Warp>());
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  Barrier between;  // between one cluster of blocks and the next that these threads run

  Cluster(int size, int threads, size_t bytes) : barrier(size * threads), between(size * threads) {
    for (int b = 0; b < size; ++b) blocks.push_back(std::make_unique<Block>(threads, bytes));
  }
};

struct Thread {
  Cluster* cluster;
  Block* block;
  Warp* warp;
  int rank;
  int lane;
  int parity;
  std::optional<Barrier::Phase> arrived;
};
inline thread_local Thread* self;

template <class T, class From>
T exchange(T value, From from) {
  static_assert(sizeof(T) <= kSlot, "exchange: the slot is too small");
  self->parity ^= 1;
  auto& slots = self->warp->slot[self->parity];
  std::memcpy(slots[self->lane], &value, sizeof(T));
  self->warp->barrier.arrive_and_wait();
  std::memcpy(&value, slots[from(self->lane)], sizeof(T));
  return value;
}

struct Grid {
  unsigned blocks;
  int threads;  // of a block
  int cluster_size;
  size_t shared_bytes;
};

// A thread of one of the `teams` clusters that run at a time: its blocks, one after the other.
template <class Call>
void run_thread(const Grid& grid, Cluster* cluster, int rank, int thread, unsigned team, unsigned teams,
                const Call& call) {
  Block* block = cluster->blocks[rank].get();
  Thread own{cluster, block, block->warps[thread / kWarp].get(), rank, thread % kWarp, 0, {}};
  self = &own;
  threadIdx = dim3(thread);
  blockDim = dim3(grid.threads);
  gridDim = dim3(grid.blocks);
  for (unsigned c = team; c < grid.blocks / grid.cluster_size; c += teams) {
    blockIdx = dim3(c * grid.cluster_size + rank);
    call();
    block->barrier.arrive_and_wait();
    // A block that has exited releases its shared memory, even if another block of its cluster still reads it.
    if (thread == 0) std::memset(block->shared.get(), 0xff, grid.shared_bytes);
    cluster->between.arrive_and_wait();
  }
}

#if defined(__SANITIZE_THREAD__)

template <class Call>
void run(const Grid& grid, const Call& call) {
  const unsigned clusters = grid.blocks / grid.cluster_size, teams = clusters < 2 ? clusters : 2;
  std::vector<std::unique_ptr<Cluster>> running;
  std::vector<std::thread> pool;
  for (unsigned team = 0; team < teams; ++team) {
    running.push_back(std::make_unique<Cluster>(grid.cluster_size, grid.threads, grid.shared_bytes));
    for (int rank = 0; rank < grid.cluster_size; ++rank) {
      for (int thread = 0; thread < grid.threads; ++thread) {
        pool.emplace_back([&, cluster = running.back().get(), rank, thread, team] {
          run_thread(grid, cluster, rank, thread, team, teams, call);
        });
      }
    }
  }
  for (std::thread& thread : pool) thread.join();
}

#else

// Fibers, which run in turn. What CUDA gives each thread is kept while others run.
class Fibers {
 public:
  template <class Call>
  void run(const Grid& grid, const Call& call) {
    Cluster cluster(grid.cluster_size, grid.threads, grid.shared_bytes);
    const int count = grid.cluster_size * grid.threads;
    auto body = [&](int i) { run_thread(grid, &cluster, i / grid.threads, i % grid.threads, 0, 1, call); };
    body_ = [](void* context, int i) { (*static_cast<decltype(body)*>(context))(i); };
    context_ = &body;
    while (int(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
    running_.clear();
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = *fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack, 0, kStack};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, start, 0);
      running_.push_back(i);
    }
    turn_ = 0;
    switch_to(main_, *fibers_[running_[0]]);
  }

  void yield() {
    Fiber& from = *fibers_[running_[turn_]];
    turn_ = turn_ + 1 < running_.size() ? turn_ + 1 : 0;
    Fiber& to = *fibers_[running_[turn_]];
    if (&from == &to) {
      std::fprintf(stderr, "a thread waits for threads that have ended\n");
      std::abort();
    }
    const Own own = current();
    switch_to(from, to);
    restore(own);
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  struct Fiber {
    ucontext_t context;
    void* stack = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake = nullptr;  // AddressSanitizer's stack of variables that are used after a return

    explicit Fiber(bool own_stack = true) {
      if (!own_stack) return;
      stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      bottom = stack;
      size = kStack;
    }
    ~Fiber() {
      if (stack != nullptr) munmap(stack, kStack);
    }
  };
  struct Own {
    Thread* self;
    dim3 thread, block;
  };

  static Own current() { return {self, threadIdx, blockIdx}; }
  static void restore(const Own& own) {
    self = own.self;
    threadIdx = own.thread;
    blockIdx = own.block;
  }

  void switch_to(Fiber& from, Fiber& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake, to.bottom, to.size);
#endif
    swapcontext(&from.context, &to.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
  }

  static void start();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> running_;
  size_t turn_ = 0;
  Fiber main_{false};
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
};
inline Fibers fibers;

inline void Fibers::start() {
  Fibers& all = fibers;
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (all.main_.bottom == nullptr) all.main_.bottom = bottom, all.main_.size = size;
#endif
  Fiber& own = *all.fibers_[all.running_[all.turn_]];
  all.body_(all.context_, all.running_[all.turn_]);
  all.running_.erase(all.running_.begin() + all.turn_);
  if (all.turn_ == all.running_.size()) all.turn_ = 0;
  all.switch_to(own, all.running_.empty() ? all.main_ : *all.fibers_[all.running_[all.turn_]], true);
}

inline void yield() { fibers.yield(); }

template <class Call>
void run(const Grid& grid, const Call& call) {
  fibers.run(grid, call);
}

#endif

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::self->block->barrier.arrive_and_wait(); }

// The CUDA runtime, as far as launch.cu uses it.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid launch configuration"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const cuda_host::Device& device = cuda_host::device;
  switch (name) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.processors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_processor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = device.shared_reserved;
      break;
    case cudaDevAttrL2CacheSize:
      *value = device.cache;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      break;
  }
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = cuda_host::device.ptx;
  return cudaSuccess;
}

inline int cluster_of(const cudaLaunchConfig_t* config) {
  return config->numAttrs == 0 ? 1 : int(config->attrs->val.clusterDim.x);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = cluster_of(config) <= cuda_host::device.largest_cluster;
  return config->gridDim.x > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const int cluster = cluster_of(config), threads = int(config->blockDim.x);
  const int most = cuda_host::device.ptx >= 90 ? cuda_host::device.largest_cluster : 1;
  if (threads < 1 || threads > 1024 || threads % cuda_host::kWarp != 0 || cluster < 1 || cluster > most ||
      config->gridDim.x % cluster != 0 || config->gridDim.x == 0 ||
      config->dynamicSmemBytes > size_t(cuda_host::device.shared_per_block)) {
    return cudaErrorInvalidConfiguration;
  }
  cuda_host::launched.push_back(reinterpret_cast<const void*>(kernel));
  const cuda_host::Grid grid{config->gridDim.x, threads, cluster, config->dynamicSmemBytes};
  cuda_host::run(grid, [&] { kernel(arguments...); });
  return cudaSuccess;
}

namespace sslkernels {

constexpr int kWarpSize = cuda_host::kWarp;

template <class T>
T shuffle(T value, int lane) {
  return cuda_host::exchange(value, [=](int) { return lane; });
}
template <class T>
T shuffle_xor(T value, int lanes) {
  return cuda_host::exchange(value, [=](int own) { return own ^ lanes; });
}
template <class T>
T shuffle_up(T value, int lanes) {
  return cuda_host::exchange(value, [=](int own) { return own < lanes ? own : own - lanes; });
}

inline uint32_t ballot(bool value) {
  using cuda_host::self;
  self->parity ^= 1;
  auto& slots = self->warp->slot[self->parity];
  slots[self->lane][0] = char(value);
  self->warp->barrier.arrive_and_wait();
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) lanes |= uint32_t(slots[lane][0]) << lane;
  return lanes;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

inline char* shared_memory() { return cuda_host::self->block->shared.get(); }

inline int cluster_rank() { return cuda_host::self->rank; }
inline int cluster_size() { return int(cuda_host::self->cluster->blocks.size()); }
inline void cluster_arrive() { cuda_host::self->arrived.emplace(cuda_host::self->cluster->barrier.arrive()); }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  cuda_host::self->cluster->barrier.wait(*cuda_host::self->arrived);
  cuda_host::self->arrived.reset();
}
template <class T>
const T* cluster_shared(const T* pointer, int rank) {
  const auto offset = reinterpret_cast<const char*>(pointer) - shared_memory();
  return reinterpret_cast<const T*>(cuda_host::self->cluster->blocks[rank]->shared.get() + offset);
}

struct alignas(16) Words {
  uint32_t at[4];
};
inline Words load_words(const void* pointer) { return *static_cast<const Words*>(pointer); }
inline Words load_words_last(const void* pointer) { return load_words(pointer); }
inline Words load_words_cached(const void* pointer) { return load_words(pointer); }
inline void store_words(void* pointer, Words words) { *static_cast<Words*>(pointer) = words; }

template <class T>
void unpack(uint32_t word, T, float& low, float& high) {
  low = to_float(T{uint16_t(word)});
  high = to_float(T{uint16_t(word >> 16)});
}
template <class T>
uint32_t pack(float low, float high, T) {
  T pair[2];
  from_float(low, &pair[0]);
  from_float(high, &pair[1]);
  return uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

}  // namespace sslkernels
