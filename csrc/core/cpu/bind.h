// What the CPU implementations of the operators have in common.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "core/bind.h"
#include "core/cpu/isa.h"
#include "core/cpu/memory.h"

namespace sslkernels {

// Elements that are worth handing to another thread.
constexpr int64_t kGrain = 32768;

inline int64_t row_grain(int64_t columns) { return kGrain / (columns + 1) + 1; }

// Memory of a thread, not initialised, that begins on a cache line as what vectors read and write should.
struct alignas(kLine) Line {
  char bytes[kLine];
};
inline std::unique_ptr<Line[]> scratch_of(int64_t bytes) {
  return std::unique_ptr<Line[]>(new Line[(bytes + kLine - 1) / kLine]);
}

// Of what a pass writes and does little else.
inline void advise_output(const torch::stable::Tensor& tensor) {
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
}
inline void advise_output(const OptionalTensor& tensor) {
  if (tensor) advise_output(*tensor);
}

}  // namespace sslkernels
