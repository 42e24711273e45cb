// out = scale * input (+ out): one pass over memory, where torch takes three (convert, multiply, convert).
#include <algorithm>

#include "core/cuda/launch.h"
#include "core/cuda/words.h"
#include "core/scale_add.h"

namespace sslkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 8;  // elements per thread at a time: one 16-byte group of the smallest elements

template <class In, class Out>
__global__ void __launch_bounds__(kThreads) scale_add_kernel(const __grid_constant__ ScaleAdd arguments) {
  using A = typename Accumulation<In>::type;
  const A scale = A(scale_of(arguments));
  if (arguments.input == arguments.out && !arguments.add && scale == A(1)) return;
  const In* input = static_cast<const In*>(arguments.input);
  Out* out = static_cast<Out*>(arguments.out);
  const int64_t stride = int64_t(gridDim.x) * kThreads * kStep;
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kStep; at < arguments.count; at += stride) {
    const int count = arguments.count - at < kStep ? int(arguments.count - at) : kStep;
    if (count == kStep) {
      A values[kStep], old[kStep] = {};
      load_elements(input + at, values);
      if (arguments.add) load_elements(out + at, old);
#pragma unroll
      for (int k = 0; k < kStep; ++k) values[k] = old[k] + scale * values[k];
      store_elements(values, out + at);
    } else {
      for (int k = 0; k < count; ++k) {
        const A old = arguments.add ? A(to_float(out[at + k])) : A(0);
        from_float(old + scale * A(to_float(input[at + k])), out + at + k);
      }
    }
  }
}

template <class In, class Out>
void launch_pair(const ScaleAdd& arguments, void* stream) {
  constexpr int64_t kOfBlock = kThreads * kStep;
  const int64_t most = int64_t(device_limits().processors) * (2048 / kThreads);
  const int64_t blocks = std::min(ceil_div(arguments.count, kOfBlock), most);
  launch("scale_add_kernel", scale_add_kernel<In, Out>, LaunchShape{blocks, kThreads, 0, 1}, stream, arguments);
}

template <class In>
void launch_from(const ScaleAdd& arguments, void* stream) {
  switch (arguments.out_element) {
    case Element::kFloat:
      return launch_pair<In, float>(arguments, stream);
    case Element::kBFloat16:
      return launch_pair<In, BFloat16>(arguments, stream);
    case Element::kHalf:
      return launch_pair<In, Half>(arguments, stream);
    case Element::kDouble:
      fail("scale_add makes no float64 of another type");
  }
}

}  // namespace

void launch_scale_add(const ScaleAdd& arguments, void* stream) {
  switch (arguments.input_element) {
    case Element::kFloat:
      return launch_from<float>(arguments, stream);
    case Element::kBFloat16:
      return launch_from<BFloat16>(arguments, stream);
    case Element::kHalf:
      return launch_from<Half>(arguments, stream);
    case Element::kDouble:
      if (arguments.out_element == Element::kDouble) return launch_pair<double, double>(arguments, stream);
      fail("scale_add makes of float64 no other type");
  }
}

}  // namespace sslkernels
