// Chooses, once per process, among the copies of the CPU kernels that were compiled for different instruction sets.
//
// The kernel files (csrc/*/*_cpu.cpp) are compiled once per instruction set, inside the namespace SSLKERNELS_ISA. They
// include no torch header and keep all their functions in that namespace or in an anonymous one. Otherwise the linker
// could merge an inline function compiled for a newer set into the path of an older one.
#pragma once

#include <cstdint>

namespace sslkernels {

// Bytes of a cache line. Buffers of vectors are aligned to it: a vector access that straddles two lines takes twice the
// time.
constexpr int64_t kLine = 64;

enum class Isa { isa_default, isa_avx2, isa_avx512 };

// The best instruction set of this processor; the environment variable SSLKERNELS_CPU_ISA (default, avx2, avx512)
// lowers it.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace sslkernels

// SSLKERNELS_CPU_KERNELS(void f(...); ...) declares the functions of a kernel file, one copy for each instruction set;
// SSLKERNELS_CURRENT_ISA(f) is a pointer to the copy for this processor.
#if defined(SSLKERNELS_X86_VARIANTS)
#define SSLKERNELS_CPU_KERNELS(...) \
  namespace isa_default {           \
  __VA_ARGS__                       \
  }                                 \
  namespace isa_avx2 {              \
  __VA_ARGS__                       \
  }                                 \
  namespace isa_avx512 {            \
  __VA_ARGS__                       \
  }
#define SSLKERNELS_CURRENT_ISA(function)                                                              \
  (::sslkernels::current_isa() == ::sslkernels::Isa::isa_avx512 ? &::sslkernels::isa_avx512::function \
   : ::sslkernels::current_isa() == ::sslkernels::Isa::isa_avx2 ? &::sslkernels::isa_avx2::function   \
                                                                : &::sslkernels::isa_default::function)
#else
#define SSLKERNELS_CPU_KERNELS(...) \
  namespace isa_default {           \
  __VA_ARGS__                       \
  }
#define SSLKERNELS_CURRENT_ISA(function) (&::sslkernels::isa_default::function)
#endif
