// Random numbers of groups of four columns, at most kGroups at once, in loops that vectorise. The normal numbers take
// two loops: a processor looks some 130 vector operations ahead, which two or three iterations of 55 serially dependent
// operations do not fill (Box-Muller takes 8 % less time with 512-bit vectors, 22 % less with 256-bit ones).
#pragma once

#include "core/cpu/element.h"
#include "core/cpu/isa.h"
#include "random/cpu/philox.h"
#include "random/cpu/philox_groups.h"
#include "random/noise.h"

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

// out[4 i ... 4 i + 3] = normal numbers of group[i].
SSLKERNELS_ONCE inline void normals_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count,
                                              float* __restrict out) {
  alignas(kLine) uint32_t first[2 * kGroups], second[2 * kGroups];
  pairs_of_groups(seed, group, draw, count, first, second);
  alignas(kLine) float squared_radius[2 * kGroups];
#pragma omp simd
  for (int64_t j = 0; j < 2 * count; ++j) squared_radius[j] = squared_radius_of_word(first[j]);
#pragma omp simd
  for (int64_t j = 0; j < 2 * count; ++j) normals_of_polar(squared_radius[j], second[j], &out[2 * j], &out[2 * j + 1]);
}

// out[4 i ... 4 i + 3] = convert(word) for the words of group[i].
template <class Convert>
SSLKERNELS_ONCE inline void values_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count,
                                             Convert convert, float* __restrict out) {
  alignas(kLine) uint32_t words[4 * kGroups];
  words_of_groups(seed, group, draw, count, words);
#pragma omp simd
  for (int64_t i = 0; i < 4 * count; ++i) out[i] = convert(words[i]);
}

SSLKERNELS_ONCE inline void gumbels_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count,
                                              float* __restrict out) {
  values_of_groups(seed, group, draw, count, [](uint32_t word) { return exponential_of_word(word); }, out);
#pragma omp simd
  for (int64_t i = 0; i < 4 * count; ++i) out[i] = negative_log_of(out[i]);
}

}  // namespace
}  // namespace sslkernels
