// Tiles of pair scores: log-sum-exp, softplus and hinge sums of rows and columns, and the gradient in place.
//
// A tile is processed in blocks that stay in the L1 cache: a product is loaded, normalised, scaled and masked once, and
// all requested sums are taken from there. Maxima and sums are running values, so that a row may be split over several
// tiles. Nothing is materialised except the sums and, in pair_gradient, the gradient in place of the products.
#include <cmath>
#include <limits>

#include "contrastive/score_tiles.h"
#include "core/cpu/vector_math.h"

namespace sslkernels {
namespace SSLKERNELS_ISA {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kGroup = 16;  // rows per rescaling of the column sums to a new maximum

template <class A>
constexpr A kLeftOut = -std::numeric_limits<A>::infinity();

inline int64_t at_most(int64_t left, int64_t block) { return left < block ? left : block; }

template <class A>
struct Scores {
  const ScoreTile& tile;

  void* row(int64_t i) const { return static_cast<char*>(tile.products) + i * tile.stride * bytes_of(tile.element); }
  A row_norm(int64_t i) const { return static_cast<const A*>(tile.row_norm)[i]; }
  const A* column_norm(int64_t begin) const { return static_cast<const A*>(tile.column_norm) + begin; }

  // u and s of columns [begin, begin + count) of row i; pairs that are left out have s = -inf and u = 0. If ids mark
  // positives, `same` is 1 for extra positives, else 0.
  void block(int64_t i, int64_t begin, int64_t count, A* u, A* s, A* same) const {
    const bool labelled = tile.positive.row != nullptr;
    const int32_t positive = labelled ? tile.positive.row[i] : 0;
    const int32_t* positives = labelled ? tile.positive.column + begin : nullptr;
    with_elements<A>(tile.element, row(i), begin, [&](auto* products) {
      if (tile.row_norm == nullptr)
        return scores_of(products, count, [](int64_t) { return A(1); }, positive, positives, u, s);
      const A norm = row_norm(i);
      const A* norms = column_norm(begin);
      scores_of(products, count, [=](int64_t j) { return norm * norms[j]; }, positive, positives, u, s);
    });
    leave_out(tile.self, i, begin, count, u, s);
    leave_out_masked(i, begin, count, u, s);
    if (tile.id.row == nullptr) return;
    if (!tile.ids_positive) return leave_out(tile.id, i, begin, count, u, s);
    const int32_t label = tile.id.row[i];
    const int32_t* labels = tile.id.column + begin;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) same[j] = labels[j] == label && s[j] != kLeftOut<A> ? A(1) : A(0);
  }

  // The products times factor(j), their scores, and the pairs whose label is `positive` left out, in one loop.
  template <class T, class Factor>
  void scores_of(const T* products, int64_t count, Factor factor, int32_t positive, const int32_t* labels, A* u,
                 A* s) const {
    const A scale = *static_cast<const A*>(tile.scale);
    const A bias = tile.bias == nullptr ? A(0) : *static_cast<const A*>(tile.bias);
    if (labels == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        u[j] = to_float(products[j]) * factor(j);
        s[j] = scale * u[j] + bias;
      }
      return;
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const bool out = labels[j] == positive;
      const A product = to_float(products[j]) * factor(j);
      u[j] = out ? A(0) : product;
      s[j] = out ? kLeftOut<A> : scale * product + bias;
    }
  }

  void leave_out_masked(int64_t i, int64_t begin, int64_t count, A* u, A* s) const {
    if (tile.column_mask != nullptr) {
      const uint8_t* mask = tile.column_mask + begin;
      keep_where([=](int64_t j) { return mask[j]; }, count, u, s);
    }
    if (tile.pair_mask == nullptr) return;
    const uint8_t* mask = tile.pair_mask + i * tile.pair_mask_row;
    const int64_t step = tile.pair_mask_column;
    if (tile.mask_index != nullptr) {
      const int64_t* index = tile.mask_index + begin;
      keep_where([=](int64_t j) { return mask[index[j] * step]; }, count, u, s);
    } else if (step == 1) {
      mask += begin;
      keep_where([=](int64_t j) { return mask[j]; }, count, u, s);
    } else {
      mask += begin * step;
      keep_where([=](int64_t j) { return mask[j * step]; }, count, u, s);
    }
  }

  template <class Keep>
  static void keep_where(Keep keep, int64_t count, A* u, A* s) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const bool out = keep(j) == 0;
      u[j] = out ? A(0) : u[j];
      s[j] = out ? kLeftOut<A> : s[j];
    }
  }

  static void leave_out(const PairLabels& pair, int64_t i, int64_t begin, int64_t count, A* u, A* s) {
    if (pair.row == nullptr) return;
    const int32_t label = pair.row[i];
    const int32_t* labels = pair.column + begin;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const bool out = labels[j] == label;
      u[j] = out ? A(0) : u[j];
      s[j] = out ? kLeftOut<A> : s[j];
    }
  }
};

template <class A>
A block_max(const A* s, int64_t count, A result) {
#pragma omp simd reduction(max : result)
  for (int64_t j = 0; j < count; ++j) result = s[j] > result ? s[j] : result;
  return result;
}

// exp(-|s|) of a score that may be NaN or infinite.
template <class A>
SSLKERNELS_HD A exp_of_minus_magnitude(A s) {
  return exp_nonpositive(s < A(0) ? s : -s);
}

// Sum of softplus(s), or of softplus(-s) for extra positives.
template <class A>
double block_softplus(const A* s, const A* same, int64_t count) {
  A sum = 0;
  if (same == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += (s[j] > A(0) ? s[j] : A(0)) + log1p_unit(exp_of_minus_magnitude(s[j]));
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
      const A cost = same[j] > A(0) ? -s[j] : s[j];
      sum += (cost > A(0) ? cost : A(0)) + log1p_unit(exp_of_minus_magnitude(cost));
    }
  }
  return sum;
}

template <class A>
void positive_in_tile(const PairPositives& positives, int64_t i) {
  const ScoreTile& tile = positives.tile;
  const int64_t j = positives.column[i];
  if (j < 0 || j >= tile.columns) return;
  ScoreTile unlabelled = tile;  // a tile leaves its positives out
  unlabelled.positive = unlabelled.self = unlabelled.id = PairLabels{};
  unlabelled.pair_mask = unlabelled.column_mask = nullptr;
  A u, s;
  Scores<A>{unlabelled}.block(i, j, 1, &u, &s, nullptr);
  static_cast<A*>(positives.score)[i] = s;
}

template <class A>
void row_sums(const PairRowSums& sums, int64_t i) {
  const ScoreTile& tile = sums.tile;
  const Scores<A> scores{tile};
  alignas(kLine) A u[kBlock], s[kBlock], same_buffer[kBlock];
  A* same = tile.id.row != nullptr && tile.ids_positive ? same_buffer : nullptr;
  A max = tile.energy == Energy::kSoftmax ? static_cast<A*>(sums.max)[i] : A(0);
  const A threshold = tile.energy == Energy::kHinge ? static_cast<const A*>(sums.threshold)[i] : A(0);
  const A positive_score = sums.num_above_positive == nullptr ? A(0) : static_cast<const A*>(sums.positive_score)[i];
  double sum = sums.sum[i], active = 0, score_sum = 0, positive_sum = 0, uniformity_sum = 0;
  int64_t num_above_positive = 0, num_equal_positive = 0;
  for (int64_t begin = 0; begin < tile.columns; begin += kBlock) {
    const int64_t count = at_most(tile.columns - begin, kBlock);
    scores.block(i, begin, count, u, s, same);
    if (tile.energy == Energy::kSoftmax) {
      const A moved = block_max(s, count, max);
      const A shift = moved == kLeftOut<A> ? A(0) : moved;  // no score yet: every exponential is 0
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) part += exp_nonpositive(s[j] - shift);
      if (moved > max) sum *= max == kLeftOut<A> ? A(0) : exp_nonpositive(max - moved);
      max = moved;
      sum += part;
    } else if (tile.energy == Energy::kSigmoid) {
      sum += block_softplus(s, same, count);
    } else {
      A part = 0, above = 0;
#pragma omp simd reduction(+ : part, above)
      for (int64_t j = 0; j < count; ++j) {
        const A over = s[j] - threshold;
        part += over > A(0) || over != over ? over : A(0);
        above += over > A(0) ? A(1) : A(0);
      }
      sum += part;
      active += above;
    }
    if (sums.score_sum != nullptr) {
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) part += s[j] == kLeftOut<A> ? A(0) : s[j];
      score_sum += part;
    }
    if (sums.positive_sum != nullptr && same != nullptr) {
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) part += same[j] > A(0) ? s[j] : A(0);
      positive_sum += part;
    }
    if (sums.uniformity_sum != nullptr) {
      const A norm = static_cast<const A*>(sums.cosine_row_norm)[i];
      const A* norms = static_cast<const A*>(sums.cosine_column_norm) + begin;
      load_any(tile.element, scores.row(i), begin, count, u);
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < count; ++j) {
        const A distance = A(4) * (u[j] * norm * norms[j]) - A(4);
        const A uniformity = exp_nonpositive(distance > A(0) ? A(0) : distance);  // a cosine may round to more than 1
        part += s[j] == kLeftOut<A> ? A(0) : uniformity;
      }
      uniformity_sum += part;
    }
    if (sums.num_above_positive != nullptr) {
      int32_t above = 0, equal = 0;
      if (same == nullptr) {
#pragma omp simd reduction(+ : above, equal)
        for (int64_t j = 0; j < count; ++j) {
          above += s[j] > positive_score ? 1 : 0;
          equal += s[j] == positive_score ? 1 : 0;
        }
      } else {
#pragma omp simd reduction(+ : above, equal)
        for (int64_t j = 0; j < count; ++j) {
          above += s[j] > positive_score && same[j] == A(0) ? 1 : 0;
          equal += s[j] == positive_score && same[j] == A(0) ? 1 : 0;
        }
      }
      num_above_positive += above;
      num_equal_positive += equal;
    }
  }
  if (tile.energy == Energy::kSoftmax) static_cast<A*>(sums.max)[i] = max;
  sums.sum[i] = sum;
  if (sums.active != nullptr) sums.active[i] += active;
  if (sums.score_sum != nullptr) sums.score_sum[i] += score_sum;
  if (sums.positive_sum != nullptr) sums.positive_sum[i] += positive_sum;
  if (sums.uniformity_sum != nullptr) sums.uniformity_sum[i] += uniformity_sum;
  if (sums.num_above_positive != nullptr) {
    sums.num_above_positive[i] += num_above_positive;
    sums.num_equal_positive[i] += num_equal_positive;
  }
}

// The sums of at most kPairColumns columns.
template <class A>
void column_sums(const PairColumnSums& sums, int64_t begin) {
  const ScoreTile& tile = sums.tile;
  const Scores<A> scores{tile};
  const int64_t count = at_most(tile.columns - begin, kPairColumns);
  alignas(kLine) A u[kPairColumns], s[kGroup][kPairColumns], same_buffer[kPairColumns], moved[kPairColumns],
      part[kPairColumns];
  A* same = tile.id.row != nullptr && tile.ids_positive ? same_buffer : nullptr;
  A* max = sums.max == nullptr ? nullptr : static_cast<A*>(sums.max) + begin;
  const A* threshold = sums.threshold == nullptr ? nullptr : static_cast<const A*>(sums.threshold) + begin;
  double* sum = sums.sum + begin;
  for (int64_t first = 0; first < tile.rows; first += kGroup) {
    const int64_t group = at_most(tile.rows - first, kGroup);
    for (int64_t r = 0; r < group; ++r) {
      scores.block(first + r, begin, count, u, s[r], same);
      if (sums.score_sum != nullptr) {
        double* score_sum = sums.score_sum + begin;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) score_sum[j] += s[r][j] == kLeftOut<A> ? A(0) : s[r][j];
      }
      if (sums.positive_sum != nullptr && same != nullptr) {
        double* positive_sum = sums.positive_sum + begin;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) positive_sum[j] += same[j] > A(0) ? s[r][j] : A(0);
      }
      if (threshold != nullptr) {
        double* active = sums.active + begin;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A over = s[r][j] - threshold[j];
          sum[j] += over > A(0) || over != over ? over : A(0);
          active[j] += over > A(0) ? A(1) : A(0);
        }
      }
    }
    if (max == nullptr) continue;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) moved[j] = max[j];
    for (int64_t r = 0; r < group; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) moved[j] = s[r][j] > moved[j] ? s[r][j] : moved[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const A decay = moved[j] > max[j] ? exp_nonpositive(max[j] - moved[j]) : A(1);
      sum[j] *= decay;
      max[j] = moved[j];
      moved[j] = moved[j] == kLeftOut<A> ? A(0) : moved[j];
      part[j] = 0;
    }
    for (int64_t r = 0; r < group; ++r) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) part[j] += exp_nonpositive(s[r][j] - moved[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) sum[j] += part[j];
  }
}

// How far below the reference of its sum a column's maximum may be: beyond, exponentials underflow.
template <class A>
constexpr A kTrusted = sizeof(A) == 4 ? A(60) : A(600);

// Computes the sums of rows [part * kPartRows, ...) of a softmax, and the sums of the columns over these rows, with one
// exponential a score. Each block of a row is shifted by its own maximum, the columns by the largest of these maxima; a
// column whose scores are far below is summed again on its own.
template <class A>
void softmax_sums_of_part(const PairSoftmaxSums& sums, int64_t part) {
  const ScoreTile& tile = sums.tile;
  const Scores<A> scores{tile};
  const int64_t first = part * kPartRows, rows = at_most(tile.rows - first, kPartRows);
  A* row_max = static_cast<A*>(sums.row_max) + first;
  double* row_sum = sums.row_sum + first;
  alignas(kLine) A u[kBlock], s[kBlock], e[kBlock], max[kBlock], sum[kBlock];
  for (int64_t begin = 0; begin < tile.columns; begin += kBlock) {
    const int64_t count = at_most(tile.columns - begin, kBlock);
    for (int64_t j = 0; j < count; ++j) max[j] = kLeftOut<A>, sum[j] = A(0);
    A reference = kLeftOut<A>;
    for (int64_t r = 0; r < rows; ++r) {
      scores.block(first + r, begin, count, u, s, nullptr);
      const A top = block_max(s, count, kLeftOut<A>);
      const A shift = top == kLeftOut<A> ? A(0) : top;  // no score: every exponential is 0
      A block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
      for (int64_t j = 0; j < count; ++j) {
        e[j] = exp_nonpositive(s[j] - shift);
        block_sum += e[j];
      }
      if (top > row_max[r]) {
        row_sum[r] = row_sum[r] * (row_max[r] == kLeftOut<A> ? A(0) : exp_nonpositive(row_max[r] - top)) + block_sum;
        row_max[r] = top;
      } else {
        row_sum[r] += block_sum * (top == kLeftOut<A> ? A(1) : exp_nonpositive(top - row_max[r]));
      }
      A weight = 1;
      if (top > reference) {
        const A decay = reference == kLeftOut<A> ? A(1) : exp_nonpositive(reference - top);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) sum[j] *= decay;
        reference = top;
      } else if (top != kLeftOut<A>) {
        weight = exp_nonpositive(top - reference);
      }
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        sum[j] += weight * e[j];
        max[j] = s[j] > max[j] ? s[j] : max[j];
      }
    }
    int32_t far = 0;
#pragma omp simd reduction(+ : far)
    for (int64_t j = 0; j < count; ++j) {
      const A below = max[j] == kLeftOut<A> ? A(0) : max[j] - reference;
      far += below < -kTrusted<A> ? 1 : 0;
      sum[j] /= exp_nonpositive(below);
    }
    for (int64_t j = 0; far > 0 && j < count; ++j) {
      if (max[j] == kLeftOut<A> || !(max[j] - reference < -kTrusted<A>)) continue;
      sum[j] = 0;
      for (int64_t r = 0; r < rows; ++r) {
        A one_u, one_s;
        scores.block(first + r, begin + j, 1, &one_u, &one_s, nullptr);
        sum[j] += exp_nonpositive(one_s - max[j]);
      }
    }
    A* part_max = static_cast<A*>(sums.part_max) + part * tile.columns + begin;
    A* part_sum = static_cast<A*>(sums.part_sum) + part * tile.columns + begin;
    for (int64_t j = 0; j < count; ++j) part_max[j] = max[j], part_sum[j] = sum[j];
  }
}

// Adds the parts to the sums of at most kPairColumns columns.
template <class A>
void merge_parts(const PairSoftmaxSums& sums, int64_t begin) {
  const int64_t columns = sums.tile.columns, count = at_most(columns - begin, kPairColumns);
  A* max = static_cast<A*>(sums.column_max) + begin;
  double* sum = sums.column_sum + begin;
  for (int64_t part = 0; part < parts_of(sums.tile); ++part) {
    const A* part_max = static_cast<const A*>(sums.part_max) + part * columns + begin;
    const A* part_sum = static_cast<const A*>(sums.part_sum) + part * columns + begin;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const A moved = part_max[j] > max[j] ? part_max[j] : max[j];
      const A decay = moved > max[j] ? exp_nonpositive(max[j] - moved) : A(1);
      const A weight = part_max[j] == kLeftOut<A> ? A(1) : exp_nonpositive(part_max[j] - moved);
      sum[j] = sum[j] * decay + part_sum[j] * weight;
      max[j] = moved;
    }
  }
}

template <class A>
A entry(const void* values, int64_t i) {
  return values == nullptr ? A(0) : static_cast<const A*>(values)[i];
}

template <class A>
const A* offset(const void* values, int64_t begin) {
  return values == nullptr ? nullptr : static_cast<const A*>(values) + begin;
}

template <class A>
void column_factors(const PairGradient& gradient, int64_t begin, int64_t end) {
  const A* weights = static_cast<const A*>(gradient.column.weight);
  const A* references = static_cast<const A*>(gradient.column.reference);
  A* factors = static_cast<A*>(gradient.column_factor);
  const A center = A(gradient.center);
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) factors[j] = weights[j] * vector_exp(center - references[j]);
}

template <class A>
void gradient_row(const PairGradient& gradient, int64_t i) {
  const ScoreTile& tile = gradient.tile;
  const Scores<A> scores{tile};
  alignas(kLine) A u[kBlock], s[kBlock], g[kBlock], same_buffer[kBlock];
  A* same = tile.id.row != nullptr && tile.ids_positive ? same_buffer : nullptr;
  const A weight = entry<A>(gradient.row.weight, i);
  // For a side that contributes nothing, every exponential is 0 whatever the score.
  const A reference =
      gradient.row.weight == nullptr ? std::numeric_limits<A>::infinity() : entry<A>(gradient.row.reference, i);
  const A from_center = reference - A(gradient.center);
  const bool shares = gradient.column_factor != nullptr && std::fabs(from_center) <= A(kSharedRange);
  const A row_factor = shares ? vector_exp(from_center) : A(0);
  const A share = entry<A>(gradient.row.share, i);
  const A smoothing = entry<A>(gradient.row.smoothing, i);
  double dot = 0, total = 0, cost = 0;
  for (int64_t begin = 0; begin < tile.columns; begin += kBlock) {
    const int64_t count = at_most(tile.columns - begin, kBlock);
    scores.block(i, begin, count, u, s, same);
    const A* weights = offset<A>(gradient.column.weight, begin);
    const A* references = offset<A>(gradient.column.reference, begin);
    if (tile.energy == Energy::kSoftmax) {
      if (weights == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) g[j] = weight * exp_nonpositive(s[j] - reference);
      } else if (shares) {
        const A* factors = offset<A>(gradient.column_factor, begin);
#pragma omp simd
        for (int64_t j = 0; j < count; ++j)
          g[j] = exp_nonpositive(s[j] - reference) * (weight + row_factor * factors[j]);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          g[j] = weight * exp_nonpositive(s[j] - reference) + weights[j] * exp_nonpositive(s[j] - references[j]);
        }
      }
      const A* shares = offset<A>(gradient.column.share, begin);
      if (same != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) g[j] -= same[j] * (share + (shares == nullptr ? A(0) : shares[j]));
      }
      const A* smoothings = offset<A>(gradient.column.smoothing, begin);
      if (gradient.row.smoothing != nullptr || smoothings != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A smooth = smoothing + (smoothings == nullptr ? A(0) : smoothings[j]);
          g[j] -= s[j] == kLeftOut<A> ? A(0) : smooth;
        }
      }
    } else if (tile.energy == Energy::kSigmoid) {
      if (gradient.cost == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A e = exp_of_minus_magnitude(s[j]);
          g[j] = weight * (s[j] > A(0) ? A(1) : e) / (A(1) + e);
        }
      } else {
        A block_cost = 0;
#pragma omp simd reduction(+ : block_cost)
        for (int64_t j = 0; j < count; ++j) {
          const A e = exp_of_minus_magnitude(s[j]);
          g[j] = weight * (s[j] > A(0) ? A(1) : e) / (A(1) + e);
          block_cost += (s[j] > A(0) ? s[j] : A(0)) + log1p_unit(e);
        }
        cost += same == nullptr ? double(block_cost) : block_softplus(s, same, count);
      }
      if (same != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A e = exp_of_minus_magnitude(s[j]);
          const A positive = -weight * (s[j] > A(0) ? e : A(1)) / (A(1) + e);
          g[j] = same[j] > A(0) ? positive : g[j];
        }
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const A over = s[j] - reference;
        g[j] = over > A(0) ? weight : over != over ? over : A(0);
      }
      if (weights != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          const A over = s[j] - references[j];
          g[j] += over > A(0) ? weights[j] : over != over ? over : A(0);
        }
      }
    }
    A block_dot = 0, block_total = 0;
#pragma omp simd reduction(+ : block_dot, block_total)
    for (int64_t j = 0; j < count; ++j) {
      block_dot += g[j] * u[j];
      block_total += g[j];
    }
    dot += block_dot;
    total += block_total;
    if (tile.row_norm != nullptr) {
      const A norm = scores.row_norm(i);
      const A* norms = scores.column_norm(begin);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) g[j] *= norm * norms[j];
    }
    store_any(tile.element, g, begin, count, scores.row(i));
  }
  gradient.dot[i] += dot;
  gradient.total[i] += total;
  if (gradient.cost != nullptr) gradient.cost[i] += cost;
}

}  // namespace

void pair_positives_in_tile(const PairPositives& positives, int64_t begin, int64_t end) {
  const auto run = positives.tile.element == Element::kDouble ? positive_in_tile<double> : positive_in_tile<float>;
  for (int64_t i = begin; i < end; ++i) run(positives, i);
}

void pair_row_sums(const PairRowSums& sums, int64_t begin, int64_t end) {
  const auto run = sums.tile.element == Element::kDouble ? row_sums<double> : row_sums<float>;
  for (int64_t i = begin; i < end; ++i) run(sums, i);
}

void pair_column_sums(const PairColumnSums& sums, int64_t begin_block, int64_t end_block) {
  const auto run = sums.tile.element == Element::kDouble ? column_sums<double> : column_sums<float>;
  for (int64_t b = begin_block; b < end_block; ++b) run(sums, b * kPairColumns);
}

void pair_softmax_sums(const PairSoftmaxSums& sums, int64_t begin_part, int64_t end_part) {
  const auto run = sums.tile.element == Element::kDouble ? softmax_sums_of_part<double> : softmax_sums_of_part<float>;
  for (int64_t part = begin_part; part < end_part; ++part) run(sums, part);
}

void pair_softmax_merge(const PairSoftmaxSums& sums, int64_t begin_block, int64_t end_block) {
  const auto run = sums.tile.element == Element::kDouble ? merge_parts<double> : merge_parts<float>;
  for (int64_t b = begin_block; b < end_block; ++b) run(sums, b * kPairColumns);
}

void pair_column_factors(const PairGradient& gradient, int64_t begin, int64_t end) {
  const auto run = gradient.tile.element == Element::kDouble ? column_factors<double> : column_factors<float>;
  run(gradient, begin, end);
}

void pair_gradient(const PairGradient& gradient, int64_t begin, int64_t end) {
  const auto run = gradient.tile.element == Element::kDouble ? gradient_row<double> : gradient_row<float>;
  for (int64_t i = begin; i < end; ++i) run(gradient, i);
}

}  // namespace SSLKERNELS_ISA
}  // namespace sslkernels
