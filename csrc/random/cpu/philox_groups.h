// Blocks of Philox groups (four columns each) across rows, so that Philox vectorises over groups even if rows are
// short.
#pragma once

#include <cstdint>

namespace sslkernels {
namespace {  // one copy for each instruction set: see isa.h

constexpr int64_t kGroups = 256;  // per block

// The part of one row in a block: `count` columns from `column` (a multiple of 4), whose draws begin at word 4 * at.
struct Segment {
  int64_t row;
  int64_t column;
  int64_t count;
  int64_t at;
};

// Visits the segments of groups [begin, end), at most kGroups, and fills in their Philox numbers.
template <class Visit>
void for_each_segment(int64_t begin, int64_t end, int64_t columns, const int64_t* row_ids, uint64_t* group,
                      Visit visit) {
  const int64_t groups = (columns + 3) / 4;
  int64_t row = begin / groups;
  for (int64_t at = begin; at < end; ++row) {
    const int64_t first = at - row * groups;
    const int64_t count = groups - first < end - at ? groups - first : end - at;
    const uint64_t base = uint64_t(row_ids == nullptr ? row : row_ids[row]) * uint64_t(groups) + uint64_t(first);
    uint64_t* out = group + (at - begin);
    for (int64_t i = 0; i < count; ++i) out[i] = base + uint64_t(i);
    const int64_t left = columns - 4 * first;
    visit(Segment{row, 4 * first, left < 4 * count ? left : 4 * count, at - begin});
    at += count;
  }
}

}  // namespace
}  // namespace sslkernels
