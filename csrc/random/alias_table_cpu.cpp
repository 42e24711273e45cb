// Indices from an alias table: both words of a block of groups first, in vectors, then a look-up for each column.
#include "random/alias_table.h"
#include "random/cpu/philox.h"
#include "random/cpu/philox_groups.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {

void alias_draw(const AliasDraw& draw, int64_t begin, int64_t end) {
  const uint64_t seed = uint64_t(*draw.seed);
  alignas(kLine) uint64_t group[kGroups];
  alignas(kLine) uint32_t high[4 * kGroups], low[4 * kGroups];
  Segment segments[kGroups];
  for (int64_t block = begin; block < end; block += kGroups) {
    const int64_t block_end = end - block < kGroups ? end : block + kGroups;
    int64_t segment_count = 0;
    for_each_segment(block, block_end, draw.columns, draw.row_ids, group,
                     [&](const Segment& segment) { segments[segment_count++] = segment; });
    words_of_groups(seed, group, 0, block_end - block, high);
    words_of_groups(seed, group, 1, block_end - block, low);
    for (int64_t s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      int64_t* out = draw.out + segment.row * draw.columns + segment.column;
      for (int64_t i = 0; i < segment.count; ++i) {
        out[i] = alias_index(draw, high[4 * segment.at + i], low[4 * segment.at + i]);
      }
    }
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
