// Philox of several groups at once, in 64-bit lanes: the multiplication reads the low half of a lane and fills the
// whole lane, so no half has to be moved or cleared between rounds. (A compiler emits twice the instructions for the
// plain loop.)
#pragma once

#include <cstdint>
#include <cstring>

#include "random/philox.h"

// words_of_groups: words[4 i ... 4 i + 3] are the words of group[i]. pairs_of_groups: first[2 i] and first[2 i + 1] are
// words 0 and 2 of group[i], second[2 i] and second[2 i + 1] words 1 and 3. Whole vectors are written: the outputs need
// room for `count` rounded up to a multiple of 8.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

#if defined(__AVX512F__)

// The maskz forms with a full mask equal the plain ones, whose headers make gcc 12 warn of an uninitialised value.
struct Lanes {
  using Vector = __m512i;
  static constexpr int64_t kCount = 8;
  static constexpr int kAtOnce = 4;  // vectors whose state fits in registers
  static Vector fill(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
  static Vector load(const uint64_t* in) { return _mm512_loadu_si512(in); }
  static Vector multiply(Vector a, Vector b) { return _mm512_maskz_mul_epu32(0xff, a, b); }
  static Vector high(Vector a) { return _mm512_maskz_srli_epi64(0xff, a, 32); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
  // In each lane: low half of a, then low half of b above it.
  static Vector join(Vector a, Vector b) { return _mm512_mask_shuffle_epi32(a, 0xaaaa, b, _MM_PERM_ENUM(0xa0)); }
  static void store(Vector a, uint32_t* out) { _mm512_storeu_si512(out, a); }
  // a0 b0 a1 b1 ...
  static void store_interleaved(Vector a, Vector b, uint32_t* out) {
    const Vector first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
                 second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, first, b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(a, second, b));
  }
};
#define SSLKERNELS_LANES 1

#elif defined(__AVX2__)

struct Lanes {
  using Vector = __m256i;
  static constexpr int64_t kCount = 4;
  static constexpr int kAtOnce = 2;
  static Vector fill(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
  static Vector load(const uint64_t* in) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(in)); }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
  static Vector high(Vector a) { return _mm256_srli_epi64(a, 32); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static Vector join(Vector a, Vector b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa); }
  static void store(Vector a, uint32_t* out) { _mm256_storeu_si256(reinterpret_cast<Vector*>(out), a); }
  static void store_interleaved(Vector a, Vector b, uint32_t* out) {
    const Vector even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
    _mm256_storeu_si256(reinterpret_cast<Vector*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<Vector*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};
#define SSLKERNELS_LANES 1

#endif

#if defined(SSLKERNELS_LANES)

// The words w0 ... w3 of the groups of one call, in the low halves of the lanes.
struct LaneWords {
  Lanes::Vector w0, w1, w2, w3;
};

// Keys of the ten rounds, laid out as memory operands.
struct RoundKeys {
  uint64_t k0[10], k1[10];
  explicit RoundKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      k0[round] = uint32_t(seed) + round * 0x9E3779B9u;
      k1[round] = uint32_t(seed >> 32) + round * 0xBB67AE85u;
    }
    __asm__("" : "+m"(k0), "+m"(k1));  // otherwise gcc 12 recomputes them for every vector
  }
};

// Calls store(words, i) with the groups [i, i + kCount) of each of kVectors vectors. Rounds are serially dependent;
// interleaving kVectors independent states hides the latency.
template <int kVectors, class Store>
inline void philox_lanes(const RoundKeys& keys, const uint64_t* group, uint64_t draw, int64_t i, Store store) {
  const Lanes::Vector factor0 = Lanes::fill(0xD2511F53u), factor1 = Lanes::fill(0xCD9E8D57u);
  LaneWords c[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const Lanes::Vector groups = Lanes::load(group + i + v * Lanes::kCount);
    c[v] = {Lanes::fill(uint32_t(draw)), Lanes::fill(draw >> 32), groups, Lanes::high(groups)};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes::Vector k0 = Lanes::fill(keys.k0[round]), k1 = Lanes::fill(keys.k1[round]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Lanes::Vector p0 = Lanes::multiply(c[v].w0, factor0), p1 = Lanes::multiply(c[v].w2, factor1);
      c[v] = {Lanes::exclusive_or(Lanes::exclusive_or(Lanes::high(p1), c[v].w1), k0), p1,
              Lanes::exclusive_or(Lanes::exclusive_or(Lanes::high(p0), c[v].w3), k1), p0};
    }
  }
  for (int v = 0; v < kVectors; ++v) store(c[v], i + v * Lanes::kCount);
}

// Calls store(words, i) with the groups [i, i + kCount); the last call is padded with groups of number 0.
template <class Store>
inline void for_each_lanes(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count, Store store) {
  const RoundKeys keys(seed);
  int64_t i = 0;
  for (; i + Lanes::kAtOnce * Lanes::kCount <= count; i += Lanes::kAtOnce * Lanes::kCount) {
    philox_lanes<Lanes::kAtOnce>(keys, group, draw, i, store);
  }
  for (; i + Lanes::kCount <= count; i += Lanes::kCount) philox_lanes<1>(keys, group, draw, i, store);
  if (i == count) return;
  uint64_t rest[Lanes::kCount] = {};
  std::memcpy(rest, group + i, size_t(count - i) * sizeof(uint64_t));
  philox_lanes<1>(keys, rest, draw, 0, [&](const LaneWords& w, int64_t) { store(w, i); });
}

inline void words_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count, uint32_t* words) {
  for_each_lanes(seed, group, draw, count, [&](const LaneWords& w, int64_t i) {
    Lanes::store_interleaved(Lanes::join(w.w0, w.w1), Lanes::join(w.w2, w.w3), words + 4 * i);
  });
}

inline void pairs_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count, uint32_t* first,
                            uint32_t* second) {
  for_each_lanes(seed, group, draw, count, [&](const LaneWords& w, int64_t i) {
    Lanes::store(Lanes::join(w.w0, w.w2), first + 2 * i);
    Lanes::store(Lanes::join(w.w1, w.w3), second + 2 * i);
  });
}

#undef SSLKERNELS_LANES
#else

inline void words_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count,
                            uint32_t* __restrict words) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const PhiloxWords w = philox_words(seed, group[i], draw);
    words[4 * i] = w.w0;
    words[4 * i + 1] = w.w1;
    words[4 * i + 2] = w.w2;
    words[4 * i + 3] = w.w3;
  }
}

inline void pairs_of_groups(uint64_t seed, const uint64_t* group, uint64_t draw, int64_t count,
                            uint32_t* __restrict first, uint32_t* __restrict second) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const PhiloxWords w = philox_words(seed, group[i], draw);
    first[2 * i] = w.w0;
    first[2 * i + 1] = w.w2;
    second[2 * i] = w.w1;
    second[2 * i + 1] = w.w3;
  }
}

#endif

}  // namespace
}  // namespace sslkernels
