// Indices of either width, and their range check.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace sslkernels {
namespace {  // one copy for each instruction set of the CPU

// int64 if `wide`, else int32.
SSLKERNELS_HD int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

SSLKERNELS_HD bool in_range(int64_t index, int64_t rows) { return uint64_t(index) < uint64_t(rows); }

}  // namespace
}  // namespace sslkernels
