// out = scale * input (+ out), in blocks that are converted to the accumulation type and back: one pass over memory,
// where torch takes three (convert, multiply, convert).
#include "core/cpu/element.h"
#include "core/scale_add.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 2048;

template <class A>
void load_any(Element element, const void* data, int64_t begin, int64_t count, A* buffer) {
  with_element(element, [&](auto zero) { load(static_cast<const decltype(zero)*>(data) + begin, count, buffer); });
}

template <class A>
void store_any(Element element, const A* buffer, int64_t begin, int64_t count, void* data) {
  with_element(element, [&](auto zero) { store(buffer, count, static_cast<decltype(zero)*>(data) + begin); });
}

template <class A>
void run(const ScaleAdd& arguments, int64_t begin, int64_t end) {
  alignas(kLine) A values[kBlock], old[kBlock];
  const A scale = A(scale_of(arguments));
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    load_any(arguments.input_element, arguments.input, at, count, values);
    if (arguments.add) {
      load_any(arguments.out_element, arguments.out, at, count, old);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) values[j] = old[j] + scale * values[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) values[j] *= scale;
    }
    store_any(arguments.out_element, values, at, count, arguments.out);
  }
}

}  // namespace

void scale_add(const ScaleAdd& arguments, int64_t begin, int64_t end) {
  if (arguments.input == arguments.out && !arguments.add && scale_of(arguments) == 1) return;
  if (arguments.input_element == Element::kDouble || arguments.out_element == Element::kDouble) {
    run<double>(arguments, begin, end);
  } else {
    run<float>(arguments, begin, end);
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
