// Rows of a table, weighted and added up by index, on a GPU: the gradient of a gather. `stream` is a cudaStream_t.
#pragma once

#include "../common/row_sums.h"

namespace sslkernels {

// Elements of the partial sums, which have the type that `out` is accumulated in.
int64_t row_sums_partials(const WeightedRowSums& sums);

// starts[rows] may be less than `entries`: the entries from there on belong to no row. An entry whose source row is out
// of range counts as NaN.
void launch_weighted_row_sums(const WeightedRowSums& sums, void* partials, void* stream);

}  // namespace sslkernels
