// Segment sums, the gradient of a gather: rows of `source`, weighted and summed by the row of `out` that they belong
// to.
//
//     out[r] = sum over n in [starts[r], starts[r + 1]) of coefficient[e] * source[row(e)],  e = order[n]
//
// row(e) is source_index[e / entries_of_source], or e / entries_of_source itself without an index.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/element.h"
#include "core/index.h"

namespace sslkernels {

// A stable counting sort: `order` holds the entries by key, row r at [starts[r], starts[r + 1]). Entries whose key is
// out of range are left out, and the end of `order` is then unspecified.
struct SortRows {
  const void* keys;  // (entries)
  bool wide_keys;    // int64, else int32
  int64_t entries;
  int64_t rows;
  int64_t* order;   // (entries)
  int64_t* starts;  // (rows + 1)
};

// Lists the keys that occur, in ascending order, with their entries: `order` holds the entries sorted by key, and key
// index[r] has the entries order[starts[r]] to order[starts[r + 1] - 1]. Entries whose key is out of range are left
// out, and the end of `order` is unspecified.
struct CompactRows {
  const void* keys;  // (entries)
  bool wide_keys;    // int64, else int32
  int64_t entries;
  int64_t rows;
  int64_t room;     // the most keys that can occur
  int64_t* order;   // (entries)
  int64_t* index;   // (room): 0 beyond the keys that occur
  int64_t* starts;  // (room + 1)
  int64_t* count;   // (1): how many keys occur
};

struct KeyedEntry {
  int64_t key;
  int64_t entry;
};

// All arrays are contiguous; A is the accumulation type of `out`.
struct WeightedRowSums {
  Element source_element;  // type of `out`, or A
  Element out_element;
  const int64_t* starts;    // (rows + 1)
  const int64_t* order;     // (entries)
  const void* coefficient;  // A (entries)
  const void* source;       // (source_rows, dim)
  const void* source_index;
  bool wide_index;  // int64, else int32
  int64_t entries_of_source;
  int64_t source_rows;
  int64_t entries;
  int64_t rows;
  int64_t dim;
  void* out;  // (rows, dim)
};

namespace {  // one copy for each instruction set of the CPU

// The work is the entries in their order, with an end mark after each row, so that long rows and empty rows are divided
// alike. Returns how many rows end before position `at` of the work.
SSLKERNELS_HD int64_t rows_before(const WeightedRowSums& sums, int64_t at) {
  int64_t low = 0, high = sums.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sums.starts[middle + 1] + middle < at) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

SSLKERNELS_HD int64_t source_row(const WeightedRowSums& sums, int64_t entry) {
  const int64_t n = sums.entries_of_source;
  const int64_t i =
      ((entry | n) >> 32) == 0 ? uint32_t(entry) / uint32_t(n) : entry / n;  // 64-bit division is slow on a GPU
  if (sums.source_index == nullptr) return i;
  return index_at(sums.source_index, sums.wide_index, i);
}

}  // namespace

// weighted_row_sums computes the rows of `out` that end at positions [begin, end) of the work. One thread sums each
// row, so the sums do not depend on how the work is split. An entry whose source row is out of range counts as NaN.
// compact_rows: work (2 * entries).
SSLKERNELS_CPU_KERNELS(void sort_rows(const SortRows& sort);
                       void compact_rows(const CompactRows& compact, KeyedEntry* work);
                       void weighted_row_sums(const WeightedRowSums& sums, int64_t begin, int64_t end);)

// Number of partial sums, which have the accumulation type of `out`.
int64_t row_sums_partials(const WeightedRowSums& sums);

// starts[rows] may be less than `entries`: later entries belong to no row. An entry whose source row is out of range
// counts as NaN.
void launch_weighted_row_sums(const WeightedRowSums& sums, void* partials, void* stream);

}  // namespace sslkernels
