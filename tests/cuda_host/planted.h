#pragma once

#include "protocol.h"

// A kernel with one planted mistake, chosen by `mistake` in the call (0: none), which the sanitizers must find.
void launch_planted(const cuda_host::Call& call);
