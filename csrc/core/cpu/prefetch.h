// Asks for rows of a table that will be read soon.
#pragma once

#include "core/cpu/isa.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

// Into the second-level cache, which waits for more lines at a time than the first. Always inlined: a call without a
// side effect that it knows of the compiler removes.
template <class T>
inline __attribute__((always_inline)) void prefetch(const T* data, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(data);
  for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += kLine) __builtin_prefetch(bytes + at, 0, 2);
}

// The first KiB: what follows in a longer row the hardware foresees. Into the second-level cache, which waits for more
// lines at a time than the first. Always inlined: a call without a side effect that it knows of the compiler removes.
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
