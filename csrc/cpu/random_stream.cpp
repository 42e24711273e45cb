// Random streams: Philox, and what its words become, in one pass.
#include "random_stream.h"

#include <cstring>

#include "element.h"
#include "noise_lanes.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

// fill(group, count, values) makes the numbers of a block of groups.
template <class Value, class T, class Fill>
void fill_groups(const RandomStream& numbers, int64_t begin, int64_t end, Fill fill) {
  uint64_t group[kGroups];
  Value values[4 * kGroups];
  Segment segments[kGroups];
  const bool whole = numbers.columns % 4 == 0;  // the groups lie behind one another
  for (int64_t block = begin; block < end; block += kGroups) {
    const int64_t block_end = end - block < kGroups ? end : block + kGroups;
    int64_t segment_count = 0;
    for_each_segment(block, block_end, numbers.columns, numbers.row_ids, group,
                     [&](const Segment& segment) { segments[segment_count++] = segment; });
    if constexpr (sizeof(T) == sizeof(Value)) {
      if (whole && block_end - block == kGroups) {
        fill(group, kGroups, static_cast<Value*>(numbers.out) + 4 * block);
        continue;
      }
    }
    fill(group, block_end - block, values);
    for (int64_t s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      T* out = static_cast<T*>(numbers.out) + segment.row * numbers.columns + segment.column;
      if constexpr (sizeof(T) == sizeof(Value)) {
        std::memcpy(out, values + 4 * segment.at, size_t(segment.count) * sizeof(T));
      } else {
        store(values + 4 * segment.at, segment.count, out);
      }
    }
  }
}

template <class T>
void fill_values(const RandomStream& numbers, int64_t begin, int64_t end) {
  const uint64_t seed = uint64_t(*numbers.seed), draw = uint64_t(numbers.sample);
  const auto fill = [&](auto convert) {
    fill_groups<float, T>(numbers, begin, end, [&](const uint64_t* group, int64_t count, float* values) {
      values_of_groups(seed, group, draw, count, convert, values);
    });
  };
  switch (numbers.stream) {
    case Stream::kUniform:
      return fill([](uint32_t word) { return unit_interval(word); });
    case Stream::kExponential:
      return fill([](uint32_t word) { return exponential_of_word(word); });
    case Stream::kGumbel:
      return fill([](uint32_t word) { return gumbel_of_word(word); });
    default:
      return fill_groups<float, T>(numbers, begin, end, [&](const uint64_t* group, int64_t count, float* values) {
        normals_of_groups(seed, group, draw, count, values);
      });
  }
}

}  // namespace

void random_stream(const RandomStream& numbers, int64_t begin, int64_t end) {
  if (numbers.stream == Stream::kBits) {
    const uint64_t seed = uint64_t(*numbers.seed), draw = uint64_t(numbers.sample);
    return fill_groups<uint32_t, uint32_t>(numbers, begin, end,
                                           [&](const uint64_t* group, int64_t count, uint32_t* words) {
                                             words_of_groups(seed, group, draw, count, words);
                                           });
  }
  switch (numbers.element) {
    case Element::kFloat:
      return fill_values<float>(numbers, begin, end);
    case Element::kDouble:
      return fill_values<double>(numbers, begin, end);
    case Element::kBFloat16:
      return fill_values<BFloat16>(numbers, begin, end);
    case Element::kHalf:
      return fill_values<Half>(numbers, begin, end);
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
