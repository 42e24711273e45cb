// Blocks of elements, loaded and stored with their conversion. Only loops that vectorise.
#pragma once

#include "../common/element.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

template <class T, class A>
inline void load(const T* in, int64_t count, A* out) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = to_float(in[j]);
}

template <class T, class A>
inline void store(const A* in, int64_t count, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) from_float(in[j], &out[j]);
}

}  // namespace
}  // namespace sslkernels
