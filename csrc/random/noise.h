// The transforms of a random word to uniform, exponential, Gumbel and normal numbers. They produce the same bits as
// sslkernels/random/transforms.py, which defines each (docs/random_numbers.md is the contract). Branch-free, so that
// loops vectorise.
#pragma once

#include "core/element.h"
#include "core/ieee.h"

namespace sslkernels {

namespace {  // one copy for each instruction set of the CPU

constexpr uint32_t kHalfRoot = 0xB504F334u;      // the smallest word whose uniform number is at least sqrt(1/2)
constexpr uint32_t kHalfRootBits = 0x3F3504F3u;  // bits of sqrt(1/2)
constexpr uint32_t kOneBits = 0x3F800000u;

// (word + 1/2) / 2^32.
SSLKERNELS_HD float unit_interval(uint32_t word) { return exact_fma(float(word), 0x1p-32f, 0x1p-33f); }

SSLKERNELS_HD float log1p_of(float f) {
  float p = exact_fma(f, 0.08506875485181808f, -0.14197224378585815f);
  p = exact_fma(p, f, 0.14950884878635406f);
  p = exact_fma(p, f, -0.16587978601455688f);
  p = exact_fma(p, f, 0.19960610568523407f);
  p = exact_fma(p, f, -0.250009685754776f);
  p = exact_fma(p, f, 0.33333972096443176f);
  p = exact_fma(p, f, -0.5f);
  return exact_fma(exact_multiply(f, f), p, f);
}

// ln(x) for x = (1 + fraction) 2^exponent.
SSLKERNELS_HD float log_of(float fraction, float exponent) {
  return exact_fma(exponent, 0.6931471824645996f, log1p_of(fraction));
}

// Fraction in [sqrt(1/2) - 1, sqrt(2) - 1] and exponent of x, from `moved`, the bits of x plus kOneBits -
// kHalfRootBits.
SSLKERNELS_HD float fraction_of(uint32_t moved) {
  return exact_add(bit_cast<float>((moved & 0x7FFFFFu) + kHalfRootBits), -1.0f);
}
SSLKERNELS_HD float exponent_of(uint32_t moved) { return float(int32_t(moved >> 23) - 127); }

// ln(u) for u = (word + 1/2) / 2^32, or ln(1 - u) if `complement`. Never zero.
SSLKERNELS_HD float log_of_part(uint32_t word, bool complement) {
  const float near = unit_interval(word);
  const uint32_t moved = bit_cast<uint32_t>(near) + (kOneBits - kHalfRootBits);
  const float fraction = fraction_of(moved), exponent = exponent_of(moved);
  return log_of(complement ? -near : fraction, complement ? 0.0f : exponent);
}

// Words are complemented by exclusive or: gcc 12 compiles `~` to an instruction that waits for the previous value of
// its register, which doubles the time of the loops around these functions.

// ln((word + 1/2) / 2^32).
SSLKERNELS_HD float log_of_word(uint32_t word) {
  const bool complement = word >= kHalfRoot;
  return log_of_part(word ^ (complement ? 0xFFFFFFFFu : 0u), complement);
}

// -ln((~word + 1/2) / 2^32).
SSLKERNELS_HD float exponential_of_word(uint32_t word) {
  const bool complement = word <= 0xFFFFFFFFu - kHalfRoot;
  return -log_of_part(word ^ (complement ? 0u : 0xFFFFFFFFu), complement);
}

// -ln(x) for normal positive x; +0 for 1.
SSLKERNELS_HD float negative_log_of(float x) {
  const uint32_t moved = bit_cast<uint32_t>(x) + (kOneBits - kHalfRootBits);
  return exact_add(0.0f, -log_of(fraction_of(moved), exponent_of(moved)));
}

SSLKERNELS_HD float gumbel_of_word(uint32_t word) { return negative_log_of(exponential_of_word(word)); }

SSLKERNELS_HD float flip_sign(float x, uint32_t top_bit) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ (top_bit & 0x80000000u));
}

// Squared radius of the Box-Muller point (normal0, normal1).
SSLKERNELS_HD float squared_radius_of_word(uint32_t first) { return exact_multiply(-2.0f, log_of_word(first)); }

SSLKERNELS_HD void normals_of_polar(float squared_radius, uint32_t second, float* normal0, float* normal1) {
  const float radius = exact_sqrt(squared_radius);
  // The two top bits are the nearest quarter turn; the rest is the remaining angle, times 4.
  const uint32_t quarter = second + (1u << 29);
  const float y = exact_fma(float(int32_t(second << 2)), 0x1.921fb6p-32f, 0x1.921fb6p-31f);
  const float square = exact_multiply(y, y);
  float s = exact_fma(square, -0.00019518790941219777f, 0.008332191966474056f);
  s = exact_fma(s, square, -0.16666655242443085f);
  const float sine = exact_fma(exact_multiply(y, square), s, y);
  float c = exact_fma(square, -0.001359674148261547f, 0.04165619611740112f);
  c = exact_fma(c, square, -0.49999892711639404f);
  const float cosine = exact_fma(square, c, 1.0f);
  const bool swapped = (quarter & (1u << 30)) != 0;
  const float along = swapped ? sine : cosine, across = swapped ? cosine : sine;
  *normal0 = exact_multiply(flip_sign(radius, quarter + (1u << 30)), along);
  *normal1 = exact_multiply(flip_sign(radius, quarter), across);
}

SSLKERNELS_HD void normals_of_words(uint32_t first, uint32_t second, float* normal0, float* normal1) {
  normals_of_polar(squared_radius_of_word(first), second, normal0, normal1);
}

}  // namespace
}  // namespace sslkernels
