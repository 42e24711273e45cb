// The free energy of K candidates on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/free_energy.h"

namespace sslkernels {

void launch_free_energy_fwd(const FreeEnergy& energies, void* stream);
void launch_free_energy_bwd(const FreeEnergyGradient& gradient, void* stream);

}  // namespace sslkernels
