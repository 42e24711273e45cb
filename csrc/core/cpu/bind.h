// Registers CPU kernels, which run over torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "core/bind.h"
#include "core/cpu/isa.h"
#include "core/cpu/memory.h"

namespace sslkernels {

constexpr int64_t kGrain = 32768;  // elements that are worth handing to another thread

inline int64_t row_grain(int64_t columns) { return kGrain / (columns + 1) + 1; }

// run(begin, end) over ranges of [0, count), in torch's threads. torch replaces an exception of a thread by a message
// that names only its own function, so the first one is kept and thrown again here.
template <class Run>
void parallel_ranges(int64_t count, int64_t grain, Run run) {
  std::exception_ptr thrown;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      run(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// kernel(arguments, begin, end) over [0, count). Pass SSLKERNELS_CURRENT_ISA(function) for `kernel`.
template <class Kernel, class Arguments>
void parallel(int64_t count, int64_t grain, Kernel kernel, const Arguments& arguments) {
  parallel_ranges(count, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Uninitialised memory of one thread, aligned to a cache line because the kernels access it by vectors.
struct alignas(kLine) Line {
  char bytes[kLine];
};
inline std::unique_ptr<Line[]> scratch_of(int64_t bytes) {
  std::unique_ptr<Line[]> scratch(new (std::nothrow) Line[(bytes + kLine - 1) / kLine]);
  STD_TORCH_CHECK(scratch != nullptr, "sslkernels: memory ran out: ", bytes, " bytes of scratch were asked for");
  return scratch;
}

// The same for kernel(arguments, begin, end, scratch).
template <class Kernel, class Arguments>
void parallel(int64_t count, int64_t grain, Kernel kernel, const Arguments& arguments, int64_t scratch_bytes) {
  parallel_ranges(count, grain,
                  [&](int64_t begin, int64_t end) { kernel(arguments, begin, end, scratch_of(scratch_bytes).get()); });
}

// Requests huge pages for an output. Only for passes that are write-bound: see advise_huge_pages.
inline void advise_output(void* data, int64_t elements, Element element) {
  if (data != nullptr) advise_huge_pages(data, size_t(elements * bytes_of(element)));
}

template <auto parse, auto run, class Signature = decltype(parse)>
struct CpuKernel;
template <auto parse, auto run, class Struct, class... Arguments>
struct CpuKernel<parse, run, Struct (*)(Arguments...)> {
  static void call(Arguments... arguments) { run(parse(arguments...)); }
};

// Registers run(parse(arguments...)) with the signature of `parse`.
template <auto parse, auto run>
void bind_cpu(Library& library, const char* name) {
  library.impl(name, TORCH_BOX(&(CpuKernel<parse, run>::call)));
}

}  // namespace sslkernels
