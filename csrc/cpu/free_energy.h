// The free energy of K candidates on the CPU.
#pragma once

#include "../common/free_energy.h"
#include "isa.h"

namespace sslkernels {

// The results [begin, end) of outer * inner, and the gradient of their energies.
#define SSLKERNELS_DECLARE(isa)                                                         \
  namespace isa {                                                                       \
  void free_energy_fwd(const FreeEnergy& energies, int64_t begin, int64_t end);         \
  void free_energy_bwd(const FreeEnergyGradient& gradient, int64_t begin, int64_t end); \
  }
SSLKERNELS_FOR_EACH_ISA(SSLKERNELS_DECLARE)
#undef SSLKERNELS_DECLARE

}  // namespace sslkernels
