// Copies to memory that is not read again soon: past the cache, so that the lines that are written are not read first.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

#if defined(__AVX512F__)
#define SSLKERNELS_STREAMS 1
inline void stream_line(const char* from, char* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
#define SSLKERNELS_STREAMS 1
inline void stream_line(const char* from, char* to) {
  for (int part = 0; part < 2; ++part) {
    const __m256i* in = reinterpret_cast<const __m256i*>(from) + part;
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + part, _mm256_loadu_si256(in));
  }
}
#endif

#if defined(SSLKERNELS_STREAMS)

inline void stream_copy(const void* from, int64_t bytes, void* to) {
  constexpr int64_t kLine = 64;
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  const int64_t before = (kLine - int64_t(reinterpret_cast<uintptr_t>(out) % kLine)) % kLine;
  int64_t at = before < bytes ? before : bytes;
  std::memcpy(out, in, size_t(at));
  for (; at + kLine <= bytes; at += kLine) stream_line(in + at, out + at);
  std::memcpy(out + at, in + at, size_t(bytes - at));
}

// Before other threads are told of what was copied.
inline void finish_streams() { _mm_sfence(); }

#undef SSLKERNELS_STREAMS
#else

inline void stream_copy(const void* from, int64_t bytes, void* to) { std::memcpy(to, from, size_t(bytes)); }
inline void finish_streams() {}

#endif

}  // namespace
}  // namespace sslkernels
