// Element types of the kernels, and their conversion to and from the accumulation type in arithmetic that vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace sslkernels {
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// The accumulation type: sums and statistics are computed in it.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

namespace {  // one copy for each instruction set of the CPU

constexpr int64_t bytes_of(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

constexpr Element accumulation_element(Element element) {
  return element == Element::kDouble ? Element::kDouble : Element::kFloat;
}

// Calls run(T{}) with the type T of `element`.
template <class Run>
inline void with_element(Element element, Run run) {
  switch (element) {
    case Element::kFloat:
      return run(float{});
    case Element::kDouble:
      return run(double{});
    case Element::kBFloat16:
      return run(BFloat16{});
    case Element::kHalf:
      return run(Half{});
  }
}

template <class To, class From>
SSLKERNELS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

SSLKERNELS_HD float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Integer arithmetic and one multiplication, exact for subnormals too; a select handles infinities and NaN.
SSLKERNELS_HD float to_float(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = magnitude >= (0x7c00u << 13) ? special : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | sign);
}

SSLKERNELS_HD void from_float(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// Rounds to nearest even: adding a large power of two rounds at the last bit of half precision.
SSLKERNELS_HD void from_float(float x, Half* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const float absolute = bit_cast<float>(magnitude);
  const uint32_t subnormal = bit_cast<uint32_t>(absolute + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // A mask, because compilers turn a conditional here into a branch, which does not vectorise.
  const uint32_t is_subnormal = 0u - uint32_t(magnitude < (113u << 23));
  uint32_t half = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  half = half > 0x7c00u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = uint16_t(half | sign);
}

SSLKERNELS_HD float to_float(float x) { return x; }
SSLKERNELS_HD double to_float(double x) { return x; }
SSLKERNELS_HD void from_float(float x, float* out) { *out = x; }
SSLKERNELS_HD void from_float(double x, double* out) { *out = x; }

template <class T>
SSLKERNELS_HD void from_float(double x, T* out) {
  from_float(float(x), out);
}
SSLKERNELS_HD void from_float(float x, double* out) { *out = x; }

}  // namespace
}  // namespace sslkernels
