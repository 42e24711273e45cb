// Blocks of columns, whose sums stay in the L1 cache while the rows of a matrix are read once, without a copy in A.
#include "core/column_sums.h"
#include "core/cpu/element.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kRun = 64;  // rows that are summed in A; the runs are summed in double

template <class T>
void run(const ColumnSums& sums, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const T* values = static_cast<const T*>(sums.values);
  A* total = static_cast<A*>(sums.total);
  alignas(kLine) A part[kColumnSumsBlock];
  alignas(kLine) double whole[kColumnSumsBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t column = block * kColumnSumsBlock, left = sums.columns - column;
    const int64_t count = left < kColumnSumsBlock ? left : kColumnSumsBlock;
    for (int64_t j = 0; j < count; ++j) whole[j] = sums.add ? double(total[column + j]) : 0.0;
    for (int64_t first = 0; first < sums.rows; first += kRun) {
      const int64_t last = sums.rows - first < kRun ? sums.rows : first + kRun;
      for (int64_t j = 0; j < count; ++j) part[j] = 0;
      for (int64_t i = first; i < last; ++i) {
        const T* row = values + i * sums.stride + column;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) part[j] += A(to_float(row[j]));
      }
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) whole[j] += double(part[j]);
    }
    store(whole, count, total + column);
  }
}

}  // namespace

void column_sums(const ColumnSums& sums, int64_t begin, int64_t end) {
  with_element(sums.element, [&](auto zero) { run<decltype(zero)>(sums, begin, end); });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
