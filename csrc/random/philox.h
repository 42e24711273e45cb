// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011; Random123), and how a row and a column address it.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace sslkernels {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

namespace {  // one copy for each instruction set of the CPU

// In PTX, because nvcc 13 keeps an addition of zero to the upper half of a 64-bit product.
SSLKERNELS_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

SSLKERNELS_HD PhiloxWords philox_round(PhiloxWords c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = wide_product(c.w0, 0xD2511F53u);
  const uint64_t p1 = wide_product(c.w2, 0xCD9E8D57u);
  return {uint32_t(p1 >> 32) ^ c.w1 ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w3 ^ k1, uint32_t(p0)};
}

// The four words of columns 4 g ... 4 g + 3, with group = row_id * ceil(columns / 4) + g, for sample number `draw`.
// Unrolled by hand so that a loop around it vectorises.
SSLKERNELS_HD PhiloxWords philox_words(uint64_t seed, uint64_t group, uint64_t draw) {
  const uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  constexpr uint32_t a = 0x9E3779B9u, b = 0xBB67AE85u;
  PhiloxWords c = {uint32_t(draw), uint32_t(draw >> 32), uint32_t(group), uint32_t(group >> 32)};
  c = philox_round(c, k0, k1);
  c = philox_round(c, k0 + 1 * a, k1 + 1 * b);
  c = philox_round(c, k0 + 2 * a, k1 + 2 * b);
  c = philox_round(c, k0 + 3 * a, k1 + 3 * b);
  c = philox_round(c, k0 + 4 * a, k1 + 4 * b);
  c = philox_round(c, k0 + 5 * a, k1 + 5 * b);
  c = philox_round(c, k0 + 6 * a, k1 + 6 * b);
  c = philox_round(c, k0 + 7 * a, k1 + 7 * b);
  c = philox_round(c, k0 + 8 * a, k1 + 8 * b);
  return philox_round(c, k0 + 9 * a, k1 + 9 * b);
}

}  // namespace
}  // namespace sslkernels
