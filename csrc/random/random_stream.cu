// Random streams: a thread computes the four numbers of a group (of two groups for 16-bit results) and writes 16 bytes
// at a time. Only the seed and the row ids are read.
#include "random/cuda/noise.h"
#include "random/random_stream.h"

namespace sslkernels {
namespace {

// Groups per thread: 16 bytes of results.
template <class T>
constexpr int kGroups = sizeof(T) < 4 ? kEach<T> / kGroup : 1;

template <Stream kStream, class T>
__device__ __forceinline__ void draw_group(const RandomStream& numbers, uint64_t group, T* out) {
  const uint64_t seed = uint64_t(*numbers.seed), draw = uint64_t(numbers.sample);
  if constexpr (kStream == Stream::kBits) {
    uint32_t words[kGroup];
    draw_words(seed, group, draw, words);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) out[k] = words[k];
  } else {
    float values[kGroup];
    draw_values<kStream>(seed, group, draw, values);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) from_float(values[k], &out[k]);
  }
}

// Grid: one thread per kGroups<T> groups.
template <Stream kStream, class T>
__global__ void __launch_bounds__(kThreads) random_stream_kernel(const __grid_constant__ RandomStream numbers) {
  ColumnGroup groups[kGroups<T>];
  T out[kGroups<T> * kGroup];
  int count = 0;  // columns, if the groups are complete and adjacent
#pragma unroll
  for (int g = 0; g < kGroups<T>; ++g) {
    groups[g] = group_of_all(numbers, kGroups<T> * thread_of_grid() + g);
    draw_group<kStream>(numbers, groups[g].number, out + g * kGroup);
    if (groups[g].offset == groups[0].offset + count) count += groups[g].count;
  }
  T* to = static_cast<T*>(numbers.out);
  if (count == kGroups<T> * kGroup) return store_group(out, count, to + groups[0].offset);
#pragma unroll
  for (int g = 0; g < kGroups<T>; ++g) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k < groups[g].count) to[groups[g].offset + k] = out[g * kGroup + k];
    }
  }
}

template <Stream kStream, class T>
void launch_one(const RandomStream& numbers, void* stream) {
  launch("random_stream_kernel", random_stream_kernel<kStream, T>,
         shape_of_groups(numbers.rows, numbers.columns, kGroups<T>), stream, numbers);
}

template <Stream kStream>
void launch_values(const RandomStream& numbers, void* stream) {
  with_element(numbers.element, [&](auto zero) { launch_one<kStream, decltype(zero)>(numbers, stream); });
}

}  // namespace

void launch_random_stream(const RandomStream& numbers, void* stream) {
  switch (numbers.stream) {
    case Stream::kBits:
      return launch_one<Stream::kBits, uint32_t>(numbers, stream);
    case Stream::kUniform:
      return launch_values<Stream::kUniform>(numbers, stream);
    case Stream::kExponential:
      return launch_values<Stream::kExponential>(numbers, stream);
    case Stream::kGumbel:
      return launch_values<Stream::kGumbel>(numbers, stream);
    case Stream::kNormal:
      return launch_values<Stream::kNormal>(numbers, stream);
  }
}

}  // namespace sslkernels
