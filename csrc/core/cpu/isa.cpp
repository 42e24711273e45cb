#include "core/cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace sslkernels {
namespace {

Isa detect() {
#if defined(SSLKERNELS_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("SSLKERNELS_CPU_ISA");  // core/native.py has checked it
  if (wanted != nullptr && wanted[0] == 0) wanted = nullptr;
  const bool up_to_avx512 = wanted == nullptr || std::strcmp(wanted, "avx512") == 0;
  const bool up_to_avx2 = up_to_avx512 || std::strcmp(wanted, "avx2") == 0;
  if (avx512 && up_to_avx512) return Isa::isa_avx512;
  if (avx2 && up_to_avx2) return Isa::isa_avx2;
#endif
  return Isa::isa_default;
}

}  // namespace

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::isa_avx512:
      return "avx512";
    case Isa::isa_avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace sslkernels
