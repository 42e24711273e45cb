// Sums over the rows and the columns of a tile of pair scores, and their gradient in place: s = logit_scale * u +
// logit_bias, with u the (normalised) dot product of a query (row) and a candidate (column).
#pragma once

#include <cstdint>

#include "contrastive/energy.h"
#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

// Labels of rows and columns; a pair whose labels are equal is special. Null: no labels.
struct PairLabels {
  const int32_t* row;
  const int32_t* column;
};

// A tile of dot products. Vectors have the accumulation type.
struct ScoreTile {
  Element element;
  void* products;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  const void* row_norm;  // inverse norms; null for both: not normalised
  const void* column_norm;
  const void* scale;  // one number
  const void* bias;   // one number, or null
  Energy energy;
  PairLabels positive;  // the positive: left out, because the caller adds it
  PairLabels self;      // left out
  PairLabels id;        // left out or, if `ids_positive`, an extra positive
  bool ids_positive;
  // Bytes that are 0 for pairs, and for columns, that are left out; null: none are.
  const uint8_t* pair_mask;  // byte (i, j) at i * pair_mask_row + j * pair_mask_column
  int64_t pair_mask_row;
  int64_t pair_mask_column;
  const int64_t* mask_index;  // which column of `pair_mask` belongs to each column; null: the same
  const uint8_t* column_mask;
};

// The score of pair (i, column[i]) of each row, as the sums see it; not written where the column is outside the tile.
struct PairPositives {
  ScoreTile tile;
  const int64_t* column;
  void* score;
};

// Running sums per row, all except `max` in double. Null: not computed.
struct PairRowSums {
  ScoreTile tile;
  void* max;                    // softmax
  double* sum;                  // sum of exp(s - max), softplus(+-s) or max(0, s - threshold)
  double* active;               // hinge: scores above the threshold
  double* score_sum;            // sum of s
  double* positive_sum;         // sum of s over extra positives
  double* uniformity_sum;       // sum of exp(4 cosine - 4) = exp(-2 distance^2)
  int64_t* num_above_positive;  // scores above `positive_score`
  int64_t* num_equal_positive;  // scores equal to it
  const void* threshold;        // hinge
  const void* positive_score;   // for `num_above_positive` and `num_equal_positive`
  const void* cosine_row_norm;  // inverse norms, for `uniformity_sum`
  const void* cosine_column_norm;
};

// The same per column.
struct PairColumnSums {
  ScoreTile tile;
  void* max;
  double* sum;
  double* active;
  double* score_sum;
  double* positive_sum;
  const void* threshold;
};

// `max` and `sum` of the rows and of the columns of a softmax at once. Rows go part by part, whatever the number of
// threads, and leave the maxima and sums of the columns over each part (parts, columns), which are merged afterwards.
struct PairSoftmaxSums {
  ScoreTile tile;
  void* row_max;
  double* row_sum;
  void* column_max;
  double* column_sum;
  void* part_max;
  void* part_sum;
};

constexpr int64_t kPartRows = 32;
inline int64_t parts_of(const ScoreTile& tile) { return (tile.rows + kPartRows - 1) / kPartRows; }

// The contribution of one side (the rows or the columns) to the gradient of a score:
//
//     softmax: weight * exp(s - reference) - share (extra positives) - smoothing, reference = log-sum-exp;
//     sigmoid: weight * sigmoid(s), or -weight * sigmoid(-s) for extra positives;
//     hinge:   weight if s > reference, reference = threshold.
struct PairSide {
  const void* weight;  // null: this side contributes nothing
  const void* reference;
  const void* share;
  const void* smoothing;
};

struct PairGradient {
  ScoreTile tile;
  PairSide row;
  PairSide column;
  double* dot;    // += sum of gradient * u of each row
  double* total;  // += sum of the gradient of each row
  double* cost;   // sigmoid: += sum of softplus(+-s) of each row; null: not computed
  // Softmax over both sides: weight * exp(center - reference) of each column, so that one exponential a score serves
  // both sides of the rows whose references are within kSharedRange of the center. Null: none is shared.
  void* column_factor;
  double center;
};

// The exponential of a score that counts in its column does not underflow in its row where references differ by less.
constexpr double kSharedRange = 30;

// Columns per block of pair_column_sums and pair_softmax_merge, which take blocks [begin_block, end_block).
constexpr int64_t kPairColumns = 256;

SSLKERNELS_CPU_KERNELS(void pair_positives_in_tile(const PairPositives& positives, int64_t begin, int64_t end);
                       void pair_row_sums(const PairRowSums& sums, int64_t begin, int64_t end);
                       void pair_column_sums(const PairColumnSums& sums, int64_t begin_block, int64_t end_block);
                       void pair_softmax_sums(const PairSoftmaxSums& sums, int64_t begin_part, int64_t end_part);
                       void pair_softmax_merge(const PairSoftmaxSums& sums, int64_t begin_block, int64_t end_block);
                       void pair_column_factors(const PairGradient& gradient, int64_t begin, int64_t end);
                       void pair_gradient(const PairGradient& gradient, int64_t begin, int64_t end);)

}  // namespace sslkernels
