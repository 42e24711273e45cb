// Corruption of spans in one pass over the tokens. The words of a block of groups come first, in vectors, across rows;
// then each row is walked from left to right.
#include "random/cpu/philox.h"
#include "random/cpu/philox_groups.h"
#include "vocabulary/corrupt_spans.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

// State of the walk over a row. Tokens of kind 0 stay, tokens of kind 1 are noise.
template <class Id>
struct Walk {
  int64_t left[2];  // tokens of each kind that are left
  int64_t cuts[2];  // ends of spans among them, but for the last one
  int kind;
  const int64_t* sentinel;
  Id* to[2];  // the next element of the input and of the labels
};

template <class Id>
Walk<Id> start_of_row(const CorruptSpans& spans, int64_t row) {
  return {{spans.columns - spans.noise, spans.noise},
          {spans.spans - 1, spans.spans - 1},
          0,
          spans.sentinels,
          {static_cast<Id*>(spans.output_ids) + row * spans.output_columns(),
           static_cast<Id*>(spans.labels) + row * spans.label_columns()}};
}

// A span at a time: `to`, `left` and `cuts` of its kind stay in registers.
template <class Id>
void walk_segment(const Id* ids, const uint32_t* words, int64_t count, Walk<Id>& walk) {
  for (int64_t i = 0; i < count;) {
    const int kind = walk.kind;
    Id* to = walk.to[kind];
    int64_t left = walk.left[kind];
    const int64_t cuts = walk.cuts[kind];
    bool ends = false;
    while (i < count && !ends) {
      *to++ = ids[i];
      ends = span_ends(words[i], --left, cuts);
      ++i;
    }
    walk.to[kind] = to;
    walk.left[kind] = left;
    if (!ends) return;
    walk.cuts[kind] -= left > 0;
    walk.kind = 1 - kind;
    if (kind == 0) {
      const Id sentinel = Id(*walk.sentinel++);
      *walk.to[0]++ = sentinel;
      *walk.to[1]++ = sentinel;
    }
  }
}

template <class Id>
void run(const CorruptSpans& spans, int64_t begin, int64_t end) {
  const int64_t groups = (spans.columns + 3) / 4;
  const uint64_t seed = uint64_t(*spans.seed);
  alignas(kLine) uint64_t group[kGroups];
  alignas(kLine) uint32_t words[4 * kGroups];
  Segment segments[kGroups];
  Walk<Id> walk{};
  for (int64_t block = begin * groups; block < end * groups; block += kGroups) {
    const int64_t block_end = end * groups - block < kGroups ? end * groups : block + kGroups;
    int64_t segment_count = 0;
    for_each_segment(block, block_end, spans.columns, spans.row_ids, group,
                     [&](const Segment& segment) { segments[segment_count++] = segment; });
    words_of_groups(seed, group, 0, block_end - block, words);
    for (int64_t s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      if (segment.column == 0) walk = start_of_row<Id>(spans, segment.row);
      const Id* ids = static_cast<const Id*>(spans.input_ids) + segment.row * spans.columns + segment.column;
      walk_segment(ids, words + 4 * segment.at, segment.count, walk);
      if (spans.has_eos && segment.column + segment.count == spans.columns) {
        *walk.to[0] = Id(spans.eos_id);
        *walk.to[1] = Id(spans.eos_id);
      }
    }
  }
}

}  // namespace

void corrupt_spans(const CorruptSpans& spans, int64_t begin, int64_t end) {
  spans.wide_ids ? run<int64_t>(spans, begin, end) : run<int32_t>(spans, begin, end);
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
