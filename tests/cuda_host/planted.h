#pragma once

#include "protocol.h"

// Kernels with one mistake each, which the sanitizers must find; `mistake` in the call: 0 for none.
void launch_planted(const cuda_host::Call& call);
