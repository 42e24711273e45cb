// The operators of core: schemas, CPU and CUDA bindings.
#include "core/cpu/bind.h"

#include "core/column_sums_bind.h"
#include "core/scale_add_bind.h"
#include "core/segment_sums_bind.h"

#if defined(SSLKERNELS_WITH_CUDA)
#include "core/cuda/bind.h"
#endif

namespace sslkernels {
namespace {

void run_scale_add(const ScaleAdd& arguments) {
  parallel(arguments.count, kGrain, SSLKERNELS_CURRENT_ISA(scale_add), arguments);
}

void run_sort_rows(const SortRows& sort) { SSLKERNELS_CURRENT_ISA(sort_rows)(sort); }

void run_column_sums(const ColumnSums& sums) {
  const int64_t blocks = (sums.columns + kColumnSumsBlock - 1) / kColumnSumsBlock;
  parallel(blocks, row_grain(sums.rows * kColumnSumsBlock), SSLKERNELS_CURRENT_ISA(column_sums), sums);
}

void run_compact_rows(const CompactRows& compact) {
  const auto work = scratch_of(2 * compact.entries * int64_t(sizeof(KeyedEntry)));
  SSLKERNELS_CURRENT_ISA(compact_rows)(compact, reinterpret_cast<KeyedEntry*>(work.get()));
}

void run_weighted_row_sums(const WeightedRowSums& sums) {
  advise_output(sums.out, sums.rows * sums.dim, sums.out_element);
  const int64_t work = sums.starts[sums.rows] + sums.rows;
  parallel(work, row_grain(sums.dim), SSLKERNELS_CURRENT_ISA(weighted_row_sums), sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sslkernels_native, m) {
  m.def("scale_add(Tensor input, Tensor? scale, Tensor(a!) out, bool add) -> ()");
  m.def("sort_rows(Tensor keys, Tensor(a!) order, Tensor(b!) starts) -> ()");  // CPU only: torch's own sort on a GPU
  m.def(
      "compact_rows(Tensor keys, int rows, Tensor(a!) order, Tensor(b!) index, Tensor(c!) starts, Tensor(d!) count) "
      "-> ()");  // CPU only as well
  m.def(
      "weighted_row_sums(Tensor starts, Tensor order, Tensor coefficient, Tensor source, Tensor? source_index, "
      "Tensor(a!) out, int entries_of_source) -> ()");
  m.def("column_sums(Tensor values, Tensor(a!) total, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CPU, m) {
  bind_cpu<parse_scale_add, run_scale_add>(m, "scale_add");
  bind_cpu<parse_sort_rows, run_sort_rows>(m, "sort_rows");
  bind_cpu<parse_compact_rows, run_compact_rows>(m, "compact_rows");
  bind_cpu<parse_column_sums, run_column_sums>(m, "column_sums");
  bind_cpu<parse_weighted_row_sums, run_weighted_row_sums>(m, "weighted_row_sums");
}

#if defined(SSLKERNELS_WITH_CUDA)
namespace {

void allocate_and_launch_column_sums(ColumnSums sums, const Tensor& like, void* stream) {
  const Tensor partials = workspace(like, column_sums_row_blocks(sums) * sums.columns, accumulation_type(sums.element));
  sums.partials = partials.mutable_data_ptr();
  launch_column_sums(sums, stream);
}

void allocate_and_launch_weighted_row_sums(const WeightedRowSums& sums, const Tensor& like, void* stream) {
  const Tensor partials = workspace(like, row_sums_partials(sums), accumulation_type(sums.out_element));
  launch_weighted_row_sums(sums, partials.mutable_data_ptr(), stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels_native, CUDA, m) {
  bind_cuda<parse_scale_add, launch_scale_add>(m, "scale_add");
  bind_cuda<parse_weighted_row_sums, allocate_and_launch_weighted_row_sums>(m, "weighted_row_sums");
  bind_cuda<parse_column_sums, allocate_and_launch_column_sums>(m, "column_sums");
}
#endif

}  // namespace sslkernels
