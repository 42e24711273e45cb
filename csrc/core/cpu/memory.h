// Hints about memory that is about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sslkernels {

// Requests huge pages for a large fresh allocation: the first touch of 4 KiB pages costs more than writing them. Only
// for passes that are write-bound: in a virtual machine whose host reclaims free memory, a huge page can cost ten times
// as much as the small pages in its place.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kPage = size_t(1) << 21;
  if (bytes < 4 * kPage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure is harmless
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace sslkernels
