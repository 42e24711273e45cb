// The operators of the random streams: schemas, CPU and CUDA bindings.
#include "core/cpu/bind.h"

#include "random/random_stream_bind.h"

#if defined(SSLKERNELS_WITH_CUDA)
#include "core/cuda/bind.h"
#endif

namespace sslkernels {
namespace {

void run_random_stream(const RandomStream& numbers) {
  advise_output(numbers.out, numbers.rows * numbers.columns, numbers.element);
  const int64_t groups = numbers.rows * ((numbers.columns + 3) / 4);
  parallel(groups, kGrain / 4, SSLKERNELS_CURRENT_ISA(random_stream), numbers);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels_native, m) {
  m.def("random_stream(Tensor seed, Tensor? row_ids, int sample, int stream, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  bind_cpu<parse_random_stream, run_random_stream>(m, "random_stream");
}

#if defined(SSLKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  bind_cuda<parse_random_stream, launch_random_stream>(m, "random_stream");
}
#endif

}  // namespace sslkernels
