// Squared errors of K predictions and the gradients of their free energy. A thread keeps its part of a target in the L1
// cache, in the accumulation type, and reads the predictions of it once.
#include <cstring>

#include "core/cpu/element.h"
#include "latent/free_energy.h"
#include "latent/prediction_energy.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 512;  // features that are summed in the lanes of a vector
constexpr int kRows = 64;        // rows of the batch whose energies are reduced together

template <class T, class A>
const A* load_target(const T* from, int64_t count, A* buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return from;
  } else {
    load(from, count, buffer);
    return buffer;
  }
}

template <class T, class A>
A squared_error(const T* prediction, const A* target, int64_t count) {
  double total = 0;  // over blocks
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    const T* p = prediction + begin;
    const A* y = target + begin;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; ++j) {
      const A difference = A(to_float(p[j])) - y[j];
      sum += difference * difference;
    }
    total += sum;
  }
  return A(total);
}

template <class T>
void fill_parts(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const int64_t of_features = feature_parts(inputs), of_candidates = candidate_parts(inputs);
  alignas(kLine) A buffer[kFeaturePart];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / of_candidates, b = row / of_features;
    const int64_t first = row % of_features * kFeaturePart, k_begin = unit % of_candidates * kCandidatePart;
    const int64_t size = std::min(inputs.dim - first, kFeaturePart);
    const int64_t k_end = std::min(inputs.count, k_begin + kCandidatePart);
    const T* target = static_cast<const T*>(inputs.target) + b * inputs.target_stride + first;
    const T* prediction = static_cast<const T*>(inputs.prediction) + b * inputs.batch_stride + first;
    const A* y = load_target(target, size, buffer);
    A* out = static_cast<A*>(parts) + row * inputs.count;
    for (int64_t k = k_begin; k < k_end; ++k) out[k] = squared_error(prediction + k * inputs.count_stride, y, size);
  }
}

template <class A>
void add_parts(A* parts, int64_t of_features, int64_t count) {
  if (of_features == 1) return;
  for (int64_t k = 0; k < count; ++k) {
    double total = 0;
    for (int64_t part = 0; part < of_features; ++part) total += parts[part * count + k];
    parts[k] = A(total);
  }
}

// The weights are the gradient of the free energy for an upstream derivative of 1.
template <class A>
void finish(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end) {
  const int64_t of_features = feature_parts(inputs), count = inputs.count;
  alignas(kLine) A lowest[kRows], total[kRows], ones[kRows];
  int64_t winner[kRows];
  for (A& one : ones) one = A(1);
  for (int64_t b = begin; b < end; b += kRows) {
    const int64_t rows = std::min<int64_t>(end - b, kRows);
    A* energies = static_cast<A*>(parts) + b * of_features * count;
    for (int64_t r = 0; r < rows; ++r) {
      A* row = energies + r * of_features * count;
      add_parts(row, of_features, count);
      if (inputs.energies != nullptr) {
        std::memcpy(static_cast<A*>(inputs.energies) + (b + r) * count, row, size_t(count) * sizeof(A));
      }
    }
    FreeEnergy reduced{};
    reduced.element = sizeof(A) == sizeof(double) ? Element::kDouble : Element::kFloat;
    reduced.energy = energies;
    reduced.outer = rows;
    reduced.count = count;
    reduced.inner = 1;
    reduced.outer_stride = of_features * count;
    reduced.count_stride = 1;
    reduced.inner_stride = 1;
    reduced.minimum = inputs.minimum;
    reduced.beta = inputs.beta;
    reduced.value = static_cast<A*>(inputs.value) + b;
    reduced.lowest = lowest;
    reduced.total = total;
    reduced.winner = winner;
    free_energy_fwd(reduced, 0, rows);
    if (inputs.weights == nullptr) continue;
    reduced.value = ones;
    free_energy_bwd({reduced, static_cast<A*>(inputs.weights) + b * count, count, 1, 1}, 0, rows);
  }
}

// grad = factor * (prediction - target), also subtracted from `sum`; null: not wanted. In blocks, because a loop that
// both computes and converts to 16 bits is not vectorised.
template <class T, class A>
void differentiate(const T* prediction, const A* target, int64_t count, A factor, T* grad, A* sum) {
  alignas(kLine) A buffer[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    const T* p = prediction + begin;
    const A* y = target + begin;
    A* out = buffer;
    if constexpr (sizeof(T) == sizeof(A)) out = grad == nullptr ? buffer : grad + begin;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) out[j] = factor * (A(to_float(p[j])) - y[j]);
    if (sum != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) sum[begin + j] -= out[j];
    }
    if (grad != nullptr && out == buffer) store(buffer, size, grad + begin);
  }
}

template <class T>
void run_gradient(const PredictionEnergyGradient& gradient, int64_t begin, int64_t end) {
  using A = typename Accumulation<T>::type;
  const PredictionEnergy& inputs = gradient.inputs;
  const int64_t of_features = feature_parts(inputs);
  alignas(kLine) A buffer[kFeaturePart], sum[kFeaturePart];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / of_features, first = unit % of_features * kFeaturePart;
    const int64_t size = std::min(inputs.dim - first, kFeaturePart);
    const T* prediction = static_cast<const T*>(inputs.prediction) + b * inputs.batch_stride + first;
    const A* y = load_target(static_cast<const T*>(inputs.target) + b * inputs.target_stride + first, size, buffer);
    const A upstream = A(2) * static_cast<const A*>(inputs.value)[b];
    const A* weights = static_cast<const A*>(inputs.weights) + b * inputs.count;
    T* grads = static_cast<T*>(gradient.grad_prediction);
    if (grads != nullptr) grads += b * gradient.batch_stride + first;
    if (gradient.grad_target != nullptr) std::memset(sum, 0, size_t(size) * sizeof(A));
    for (int64_t k = 0; k < inputs.count; ++k) {
      const A factor = upstream * weights[k];
      T* grad = grads == nullptr ? nullptr : grads + k * gradient.count_stride;
      if (factor == A(0)) {
        if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, size_t(size) * sizeof(T));
        continue;
      }
      differentiate(prediction + k * inputs.count_stride, y, size, factor, grad,
                    gradient.grad_target == nullptr ? nullptr : sum);
    }
    if (gradient.grad_target == nullptr) continue;
    store(sum, size, static_cast<T*>(gradient.grad_target) + b * inputs.dim + first);
  }
}

}  // namespace

void prediction_energy_parts(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end) {
  with_element(inputs.element, [&](auto zero) { fill_parts<decltype(zero)>(inputs, parts, begin, end); });
}

void prediction_energy_finish(const PredictionEnergy& inputs, void* parts, int64_t begin, int64_t end) {
  return inputs.element == Element::kDouble ? finish<double>(inputs, parts, begin, end)
                                            : finish<float>(inputs, parts, begin, end);
}

void prediction_energy_bwd(const PredictionEnergyGradient& gradient, int64_t begin, int64_t end) {
  with_element(gradient.inputs.element, [&](auto zero) { run_gradient<decltype(zero)>(gradient, begin, end); });
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
