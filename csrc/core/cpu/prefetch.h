// Software prefetch of memory that the hardware prefetcher cannot predict. It goes to the L2 cache, which has more
// lines in flight than L1. Always inlined: the compiler would drop a call as side-effect free.
#pragma once

#include "core/cpu/isa.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

template <class T>
inline __attribute__((always_inline)) void prefetch(const T* data, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(data);
  for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += kLine) __builtin_prefetch(bytes + at, 0, 2);
}

// The first KiB of a row: the hardware prefetcher follows with the rest.
template <class T>
inline __attribute__((always_inline)) void prefetch_row(const T* row, int64_t dim) {
  constexpr int64_t kMost = 1024;
  const int64_t bytes = dim * int64_t(sizeof(T));
  for (int64_t at = 0; at < bytes && at < kMost; at += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + at, 0, 2);
  }
}

}  // namespace
}  // namespace sslkernels
