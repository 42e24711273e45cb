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

// `count` elements from `begin` on of a row that is computed in A, whatever it is stored as: for loops that are
// compiled once for all that share A.
template <class A>
inline void load_any(Element element, const void* row, int64_t begin, int64_t count, A* out) {
  if constexpr (sizeof(A) == 8) {
    load(static_cast<const double*>(row) + begin, count, out);
  } else if (element == Element::kFloat) {
    load(static_cast<const float*>(row) + begin, count, out);
  } else if (element == Element::kBFloat16) {
    load(static_cast<const BFloat16*>(row) + begin, count, out);
  } else {
    load(static_cast<const Half*>(row) + begin, count, out);
  }
}

template <class A>
inline void store_any(Element element, const A* in, int64_t begin, int64_t count, void* row) {
  if constexpr (sizeof(A) == 8) {
    store(in, count, static_cast<double*>(row) + begin);
  } else if (element == Element::kFloat) {
    store(in, count, static_cast<float*>(row) + begin);
  } else if (element == Element::kBFloat16) {
    store(in, count, static_cast<BFloat16*>(row) + begin);
  } else {
    store(in, count, static_cast<Half*>(row) + begin);
  }
}

constexpr int64_t bytes_of(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

}  // namespace
}  // namespace sslkernels
