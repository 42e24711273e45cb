// Sums the entries of each row in their order, in blocks of columns that stay in the L1 cache. Each row of the result
// is written once, with zeros if it has no entry.
#include <cmath>
#include <cstring>

#include "core/cpu/element.h"
#include "core/cpu/prefetch.h"
#include "core/segment_sums.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // columns
constexpr int64_t kAhead = 16;    // entries whose rows are in flight
constexpr int64_t kRun = 64;      // entries that are summed in A; the runs of a row are summed in double

template <class Index>
void sort_by(const SortRows& sort) {
  const Index* keys = static_cast<const Index*>(sort.keys);
  const int64_t entries = sort.entries, rows = sort.rows;
  int64_t *order = sort.order, *starts = sort.starts;
  int64_t* next = starts + 1;  // per row: its count, then the slot of its next entry, then its end
  std::memset(starts, 0, size_t(rows + 1) * sizeof(int64_t));
  for (int64_t e = 0; e < entries; ++e) {
    if (in_range(keys[e], rows)) ++next[keys[e]];
  }
  int64_t start = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t count = next[r];
    next[r] = start;
    start += count;
  }
  for (int64_t e = 0; e < entries; ++e) {
    if (in_range(keys[e], rows)) order[next[keys[e]]++] = e;
  }
}

// A radix sort: unlike the counting sort it does not take time for rows without entries.
template <class Index>
void compact_by(const CompactRows& compact, KeyedEntry* from) {
  constexpr int kBits = 11;
  constexpr int64_t kDigits = int64_t(1) << kBits;
  const Index* keys = static_cast<const Index*>(compact.keys);
  KeyedEntry* to = from + compact.entries;
  int64_t entries = 0;
  for (int64_t e = 0; e < compact.entries; ++e) {
    if (in_range(keys[e], compact.rows)) from[entries++] = {int64_t(keys[e]), e};
  }
  for (int shift = 0; shift < 63 && (compact.rows - 1) >> shift > 0; shift += kBits) {
    int64_t next[kDigits] = {};
    for (int64_t n = 0; n < entries; ++n) ++next[from[n].key >> shift & (kDigits - 1)];
    int64_t start = 0;
    for (int64_t d = 0; d < kDigits; ++d) {
      const int64_t count = next[d];
      next[d] = start;
      start += count;
    }
    for (int64_t n = 0; n < entries; ++n) to[next[from[n].key >> shift & (kDigits - 1)]++] = from[n];
    KeyedEntry* const sorted = to;
    to = from;
    from = sorted;
  }
  int64_t count = 0;
  for (int64_t n = 0; n < entries; ++n) {
    compact.order[n] = from[n].entry;
    if (n > 0 && from[n].key == from[n - 1].key) continue;
    compact.index[count] = from[n].key;
    compact.starts[count++] = n;
  }
  *compact.count = count;
  for (int64_t r = count; r < compact.room; ++r) compact.index[r] = 0;
  for (int64_t r = count; r <= compact.room; ++r) compact.starts[r] = entries;
}

template <class Source, class Out>
void run(const WeightedRowSums& sums, int64_t begin, int64_t end) {
  using A = typename Accumulation<Out>::type;
  const Source* source = static_cast<const Source*>(sums.source);
  const A* coefficient = static_cast<const A*>(sums.coefficient);
  const int64_t first_row = rows_before(sums, begin), last_row = rows_before(sums, end);
  const int64_t last_entry = sums.starts[last_row];
  alignas(kLine) A values[kBlock];
  alignas(kLine) double totals[kBlock];
  for (int64_t column = 0; column < sums.dim; column += kBlock) {
    const int64_t count = sums.dim - column < kBlock ? sums.dim - column : kBlock;

    // values = sum of the entries [n, stop).
    const auto add_up = [&](int64_t n, int64_t stop) {
      for (bool first = true; n < stop; ++n, first = false) {
        if (n + kAhead < last_entry) {
          prefetch_row(source + source_row(sums, sums.order[n + kAhead]) * sums.dim + column, count);
        }
        const int64_t entry = sums.order[n];
        const int64_t from = source_row(sums, entry);
        const bool exists = in_range(from, sums.source_rows);
        const Source* row = source + (exists ? from : 0) * sums.dim + column;
        const A weight = exists ? coefficient[entry] : A(NAN);
        if (first) {
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) values[j] = weight * A(to_float(row[j]));
        } else {
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) values[j] += weight * A(to_float(row[j]));
        }
      }
    };

    for (int64_t r = first_row; r < last_row; ++r) {
      Out* out = static_cast<Out*>(sums.out) + r * sums.dim + column;
      const int64_t start = sums.starts[r], stop = sums.starts[r + 1];
      if (start == stop) {
        std::memset(out, 0, size_t(count) * sizeof(Out));
        continue;
      }
      if (stop - start <= kRun) {
        add_up(start, stop);
        store(values, count, out);
        continue;
      }
      std::memset(totals, 0, size_t(count) * sizeof(double));
      for (int64_t n = start; n < stop; n += kRun) {
        add_up(n, stop - n < kRun ? stop : n + kRun);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) totals[j] += double(values[j]);
      }
      store(totals, count, out);
    }
  }
}

template <class Out>
void run_for(const WeightedRowSums& sums, int64_t begin, int64_t end) {
  using A = typename Accumulation<Out>::type;
  return sums.source_element == sums.out_element ? run<Out, Out>(sums, begin, end) : run<A, Out>(sums, begin, end);
}

}  // namespace

void sort_rows(const SortRows& sort) { return sort.wide_keys ? sort_by<int64_t>(sort) : sort_by<int32_t>(sort); }

void compact_rows(const CompactRows& compact, KeyedEntry* work) {
  return compact.wide_keys ? compact_by<int64_t>(compact, work) : compact_by<int32_t>(compact, work);
}

void weighted_row_sums(const WeightedRowSums& sums, int64_t begin, int64_t end) {
  with_element(sums.out_element, [&](auto zero) { run_for<decltype(zero)>(sums, begin, end); });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
