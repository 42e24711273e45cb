// Gumbel-max over a tile of logits: the column with the largest logit + noise is a draw from their softmax.
//
// A row is processed in blocks of 1024 columns; the logits, then their noise, then the comparison are loops that
// vectorise. The noise of a block is computed only if it could win: it is at most kLargestGumbel.
#include <limits>

#include "core/cpu/vector_math.h"
#include "random/cpu/noise.h"
#include "vocabulary/sample_rows.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kColumns = 4 * kGroups;  // per block

// The largest value, ignoring NaN.
template <class A>
A largest_of(const A* values, int64_t count) {
  A largest = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < count; ++j) largest = values[j] > largest ? values[j] : largest;
  return largest;
}

template <class A>
A sum_of_exponentials(const A* logits, A largest, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += exp_nonpositive(logits[j] - largest);
  return sum;
}

template <class T>
void sample_row(const SampleRows& sample, int64_t row) {
  using A = typename Accumulation<T>::type;
  const T* products = static_cast<const T*>(sample.products) + row * sample.stride;
  const A* bias = sample.bias == nullptr ? nullptr : static_cast<const A*>(sample.bias) + sample.first_column;
  const A given_scale = static_cast<const A*>(sample.scale)[row];
  const bool greedy = given_scale == std::numeric_limits<A>::infinity();
  const A scale = greedy ? A(1) : given_scale;
  const uint64_t seed = uint64_t(*sample.seed);
  const uint64_t first_group = uint64_t(sample.row_ids[row]) * uint64_t((sample.vocab + 3) / 4);
  A& row_max = static_cast<A*>(sample.row_max)[row];
  A& sum_exp = static_cast<A*>(sample.sum_exp)[row];
  A& best = static_cast<A*>(sample.best)[row];
  A& logprob = static_cast<A*>(sample.logprob)[row];
  if (is_first_tile(sample)) {
    row_max = best = logprob = -std::numeric_limits<A>::infinity();
    sum_exp = 0;
    sample.index[row] = 0;
  }
  alignas(kLine) uint64_t group[kGroups];
  alignas(kLine) float noise[kColumns];
  alignas(kLine) A logits[kColumns], perturbed[kColumns];
  for (int64_t begin = 0; begin < sample.columns; begin += kColumns) {
    const int64_t count = sample.columns - begin < kColumns ? sample.columns - begin : kColumns;
    if (bias == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) logits[j] = A(to_float(products[begin + j])) * scale;
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) logits[j] = (A(to_float(products[begin + j])) + bias[begin + j]) * scale;
    }
    if (scale == A(0)) {
      for (int64_t j = 0; j < count; ++j) {
        const A product = A(to_float(products[begin + j])), l = bias == nullptr ? product : product + bias[begin + j];
        if (l == -std::numeric_limits<A>::infinity()) logits[j] = l;  // 0 * -inf is NaN
      }
    }
    const A block_max = largest_of(logits, count);
    const A new_max = block_max > row_max ? block_max : row_max;
    const A moved = row_max == new_max ? A(1) : A(exp_nonpositive(row_max - new_max));
    const A anchor = new_max == -std::numeric_limits<A>::infinity() ? A(0) : new_max;  // -inf - -inf is NaN
    sum_exp = sum_exp * moved + sum_of_exponentials(logits, anchor, count);
    row_max = new_max;
    if (greedy) {
      if (!(block_max > best)) continue;
      int64_t j = 0;
      while (logits[j] != block_max) ++j;
      best = block_max;
      sample.index[row] = sample.first_column + begin + j;
      continue;
    }
    if (!(block_max + A(kLargestGumbel) > best)) continue;

    const int64_t groups = (count + 3) / 4;
    for (int64_t i = 0; i < groups; ++i) {
      group[i] = first_group + uint64_t((sample.first_column + begin) / 4 + i);
    }
    gumbels_of_groups(seed, group, uint64_t(sample.draw), groups, noise);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) perturbed[j] = logits[j] + A(noise[j]);
    const A winner = largest_of(perturbed, count);
    if (!(winner > best)) continue;
    int64_t j = 0;
    while (perturbed[j] != winner) ++j;
    best = winner;
    logprob = logits[j];
    sample.index[row] = sample.first_column + begin + j;
  }
  if (!is_last_tile(sample)) return;
  if (greedy) logprob = row_max;
  const A relative = logprob - row_max;  // NaN in a row without a finite logit
  logprob = greedy ? relative + A(0) * sum_exp : relative - std::log(sum_exp);
}

}  // namespace

void sample_rows(const SampleRows& sample, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    with_element(sample.element, [&](auto zero) { sample_row<decltype(zero)>(sample, row); });
  }
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
