// Random streams: Philox and the transform of its words, in one pass.
#include <cstring>

#include "core/cpu/element.h"
#include "random/cpu/noise.h"
#include "random/random_stream.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

// fill(group, count, values) computes the numbers of a block of groups; store(values, at, count) writes one segment
// after the first `at` results.
template <class Value, class Fill, class Store>
void fill_groups(const RandomStream& numbers, int64_t begin, int64_t end, Fill fill, Store store) {
  alignas(kLine) uint64_t group[kGroups];
  alignas(kLine) Value values[4 * kGroups];
  Segment segments[kGroups];
  // Groups that are adjacent in the output, in the type that `fill` computes, are computed in place.
  const bool in_place = numbers.columns % 4 == 0 && numbers.element == Element::kFloat;
  for (int64_t block = begin; block < end; block += kGroups) {
    const int64_t block_end = end - block < kGroups ? end : block + kGroups;
    int64_t segment_count = 0;
    for_each_segment(block, block_end, numbers.columns, numbers.row_ids, group,
                     [&](const Segment& segment) { segments[segment_count++] = segment; });
    if (in_place && block_end - block == kGroups) {
      fill(group, kGroups, static_cast<Value*>(numbers.out) + 4 * block);
      continue;
    }
    fill(group, block_end - block, values);
    for (int64_t s = 0; s < segment_count; ++s) {
      const Segment& segment = segments[s];
      store(values + 4 * segment.at, segment.row * numbers.columns + segment.column, segment.count);
    }
  }
}

void fill_values(Stream stream, uint64_t seed, uint64_t draw, const uint64_t* group, int64_t count, float* values) {
  switch (stream) {
    case Stream::kUniform:
      return values_of_groups(seed, group, draw, count, [](uint32_t word) { return unit_interval(word); }, values);
    case Stream::kExponential:
      return values_of_groups(
          seed, group, draw, count, [](uint32_t word) { return exponential_of_word(word); }, values);
    case Stream::kGumbel:
      return gumbels_of_groups(seed, group, draw, count, values);
    default:
      return normals_of_groups(seed, group, draw, count, values);
  }
}

void store_values(const float* values, Element element, int64_t at, int64_t count, void* out) {
  with_element(element, [&](auto zero) { store(values, count, static_cast<decltype(zero)*>(out) + at); });
}

}  // namespace

void random_stream(const RandomStream& numbers, int64_t begin, int64_t end) {
  const uint64_t seed = uint64_t(*numbers.seed), draw = uint64_t(numbers.sample);
  if (numbers.stream == Stream::kBits) {
    fill_groups<uint32_t>(
        numbers, begin, end,
        [&](const uint64_t* group, int64_t count, uint32_t* words) {
          words_of_groups(seed, group, draw, count, words);
        },
        [&](const uint32_t* words, int64_t at, int64_t count) {
          std::memcpy(static_cast<uint32_t*>(numbers.out) + at, words, size_t(count) * sizeof(uint32_t));
        });
  } else {
    fill_groups<float>(
        numbers, begin, end,
        [&](const uint64_t* group, int64_t count, float* values) {
          fill_values(numbers.stream, seed, draw, group, count, values);
        },
        [&](const float* values, int64_t at, int64_t count) {
          store_values(values, numbers.element, at, count, numbers.out);
        });
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
