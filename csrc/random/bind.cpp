// The operators of the random streams: schemas, CPU and CUDA bindings.
#include "core/cpu/bind.h"

#include "random/alias_table_bind.h"
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

void run_alias_draw(const AliasDraw& draw) {
  const int64_t groups = draw.rows * ((draw.columns + 3) / 4);
  parallel(groups, kGrain / 16, SSLKERNELS_CURRENT_ISA(alias_draw), draw);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels_native, m) {
  m.def("random_stream(Tensor seed, Tensor? row_ids, int sample, int stream, Tensor(a!) out) -> ()");
  m.def("alias_draw(Tensor seed, Tensor? row_ids, Tensor table, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  bind_cpu<parse_random_stream, run_random_stream>(m, "random_stream");
  bind_cpu<parse_alias_draw, run_alias_draw>(m, "alias_draw");
}

#if defined(SSLKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  bind_cuda<parse_random_stream, launch_random_stream>(m, "random_stream");
  bind_cuda<parse_alias_draw, launch_alias_draw>(m, "alias_draw");
}
#endif

}  // namespace sslkernels
