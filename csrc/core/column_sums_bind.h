#pragma once

#include "core/bind.h"
#include "core/column_sums.h"

namespace sslkernels {

inline ColumnSums parse_column_sums(const Tensor& values, const Tensor& total, bool add) {
  check_matrix(values, "values");
  ColumnSums sums{};
  sums.element = element_of(values);
  sums.values = values.const_data_ptr();
  sums.stride = values.stride(0);
  sums.rows = values.size(0);
  sums.columns = values.size(1);
  sums.total = writable(total, {sums.columns}, accumulation_type(values), "total");
  sums.add = add;
  return sums;
}

}  // namespace sslkernels
