// Random streams on a GPU. `stream` is a cudaStream_t.
#pragma once

#include "../common/random_stream.h"

namespace sslkernels {

void launch_random_stream(const RandomStream& numbers, void* stream);

}  // namespace sslkernels
