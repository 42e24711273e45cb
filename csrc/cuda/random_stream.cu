// Random streams: a thread makes the four numbers of a group and writes them, 16 bytes at a time in 32 bits. Nothing is
// read but the seed and the ids of rows.
#include "draws.h"
#include "random_stream.h"

namespace sslkernels {
namespace {

template <class T>
__device__ __forceinline__ void store_values(const float (&values)[kGroup], const TokenGroup& group, void* to) {
  T out[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) from_float(values[k], &out[k]);
  store_group(out, group.count, static_cast<T*>(to) + group.offset);
}

// Grid: a thread a group.
template <Stream kStream>
__global__ void __launch_bounds__(kThreads) random_stream_kernel(const __grid_constant__ RandomStream numbers) {
  const TokenGroup group = group_of_grid(numbers);
  const uint64_t seed = uint64_t(*numbers.seed), draw = uint64_t(numbers.sample);
  if constexpr (kStream == Stream::kBits) {
    uint32_t words[kGroup];
    draw_words(seed, group.number, draw, words);
    store_group(words, group.count, static_cast<uint32_t*>(numbers.out) + group.offset);
  } else {
    float values[kGroup];
    draw_values<kStream>(seed, group.number, draw, values);
    switch (numbers.element) {
      case Element::kFloat:
        return store_values<float>(values, group, numbers.out);
      case Element::kDouble:
        return store_values<double>(values, group, numbers.out);
      case Element::kBFloat16:
        return store_values<BFloat16>(values, group, numbers.out);
      case Element::kHalf:
        return store_values<Half>(values, group, numbers.out);
    }
  }
}

template <Stream kStream>
void launch_one(const RandomStream& numbers, void* stream) {
  launch("random_stream_kernel", random_stream_kernel<kStream>, shape_of_groups(numbers.rows, numbers.columns), stream,
         numbers);
}

}  // namespace

void launch_random_stream(const RandomStream& numbers, void* stream) {
  switch (numbers.stream) {
    case Stream::kBits:
      return launch_one<Stream::kBits>(numbers, stream);
    case Stream::kUniform:
      return launch_one<Stream::kUniform>(numbers, stream);
    case Stream::kExponential:
      return launch_one<Stream::kExponential>(numbers, stream);
    case Stream::kGumbel:
      return launch_one<Stream::kGumbel>(numbers, stream);
    case Stream::kNormal:
      return launch_one<Stream::kNormal>(numbers, stream);
  }
}

}  // namespace sslkernels
