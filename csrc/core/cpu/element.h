// Loads and stores blocks of elements with conversion. Only loops that vectorise.
#pragma once

#include <type_traits>

#include "core/element.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

// For functions over whole blocks: one out-of-line copy instead of one in each caller.
#define SSLKERNELS_ONCE __attribute__((noinline))

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

// Calls run(pointer) with the elements from `begin` on of a row that is computed in A, whatever its stored type. Code
// around it is compiled once for all types that share A; only the loops that read or write are compiled per type.
template <class T, class Void>
inline auto* as(Void* row) {
  return static_cast<std::conditional_t<std::is_const_v<Void>, const T, T>*>(row);
}
template <class A, class Void, class Run>
inline auto with_elements(Element element, Void* row, int64_t begin, Run run) {
  if constexpr (sizeof(A) == 8) {
    return run(as<double>(row) + begin);
  } else {
    if (element == Element::kFloat) return run(as<float>(row) + begin);
    if (element == Element::kBFloat16) return run(as<BFloat16>(row) + begin);
    return run(as<Half>(row) + begin);
  }
}

template <class A>
inline void load_any(Element element, const void* row, int64_t begin, int64_t count, A* out) {
  with_elements<A>(element, row, begin, [=](auto* in) { load(in, count, out); });
}

template <class A>
inline void store_any(Element element, const A* in, int64_t begin, int64_t count, void* row) {
  with_elements<A>(element, row, begin, [=](auto* out) { store(in, count, out); });
}

}  // namespace
}  // namespace sslkernels
