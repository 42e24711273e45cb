// exp, log, log1p and tanh that the compiler vectorises: no branches, tables or calls. Within 2 ulp over their domains.
#pragma once

#include <cmath>

#include "core/cpu/element.h"
#include "core/fma.h"
#include "core/tanh.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

// exp(x) for x <= 0 or NaN; 0 where the result would be subnormal.
SSLKERNELS_HD float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // Minimax polynomial of Cephes' expf (Moshier).
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t exponent = (bit_cast<uint32_t>(shifted) << 23) + (127u << 23);
  const float result = p * bit_cast<float>(exponent);
  return x < -87.3365f ? 0.0f : result;
}

inline double exp_nonpositive(double x) { return std::exp(x); }

// exp(x) of any x; 0 below 2^-125.
SSLKERNELS_HD float vector_exp(float x) {
  constexpr float kRound = 12582912.0f;
  float inside = x > 89.0f ? 89.0f : x;              // exp(89) is infinite; NaN stays
  inside = inside < -87.3365f ? -87.3365f : inside;  // 0
  const float shifted = fused(inside, 1.44269504088896341f, kRound);
  const float n = shifted - kRound;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, inside));
  float p = 1.9875691500e-4f;  // as above
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  // 2 p times 2^(n - 1): that exponent is representable even for n = 128.
  return (p + p) * bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (126u << 23));
}

inline double vector_exp(double x) { return std::exp(x); }

// log(1 + x) for x in [-1/2, 1] or NaN.
SSLKERNELS_HD float log1p_unit(float x) {
  // 2 atanh(z); atanh(z) / z fitted in z^2 over [0, 1/9] (Chebyshev, 1e-10).
  const float z = x / (2.0f + x);
  const float w = z * z;
  float p = 0.12204702f;
  p = p * w + 0.10697134f;
  p = p * w + 0.14310312f;
  p = p * w + 0.19999347f;
  p = p * w + 0.3333334f;
  return 2.0f * (z + z * w * p);
}

inline double log1p_unit(double x) { return std::log1p(x); }

// log(x) for normal x > 0, or NaN.
SSLKERNELS_HD float log_positive(float x) {
  constexpr uint32_t kRootOfHalf = 0x3f3504f3;
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t exponent = int32_t(bits - kRootOfHalf) >> 23;
  const float mantissa = bit_cast<float>(bits - (uint32_t(exponent) << 23));  // in [sqrt(1/2), sqrt(2))
  const float n = float(exponent);
  const float result = n * 0.693359375f + (log1p_unit(mantissa - 1.0f) - n * 2.12194440e-4f);
  return x != x ? x : result;
}

inline double log_positive(double x) { return std::log(x); }

SSLKERNELS_HD float vector_tanh(float x) {
  const float magnitude = bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu);
  const float t = exp_nonpositive(-2.0f * magnitude);
  const float large = (1.0f - t) / (1.0f + t);
  const float small = tanh_near_zero(x);
  const float signed_large = bit_cast<float>(bit_cast<uint32_t>(large) | (bit_cast<uint32_t>(x) & 0x80000000u));
  return magnitude < 0.625f ? small : signed_large;
}

inline double vector_tanh(double x) { return std::tanh(x); }

// The derivative of tanh: 1 - tanh(x)^2 would cancel where tanh(x) is near 1.
template <class A>
SSLKERNELS_HD A tanh_slope(A x) {
  const A t = exp_nonpositive(A(-2) * std::fabs(x));
  return A(4) * t / ((A(1) + t) * (A(1) + t));
}

}  // namespace
}  // namespace sslkernels
