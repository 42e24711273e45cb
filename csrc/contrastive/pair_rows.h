// The per-row stages of a contrastive loss, before and after the tiles of scores: inverse norms, the scores of the
// positives, the losses, and the finished gradients of the features. The formulas are in
// sslkernels/contrastive/pair_rows.py.
#pragma once

#include <cstdint>

#include "contrastive/energy.h"
#include "core/cpu/isa.h"
#include "core/element.h"

namespace sslkernels {

constexpr double kNormEps = 1e-12;   // norms below are clamped
constexpr int64_t kNoPositive = -1;  // a row without a positive; another negative index: an invalid one

struct InverseNorms {
  Element element;
  const void* values;
  int64_t rows;
  int64_t dim;
  void* norm;
};

struct PositiveScores {
  Element element;
  const void* query;
  const void* key;
  int64_t rows;
  int64_t keys;
  int64_t dim;
  const void* query_norm;  // null for both: not normalised
  const void* key_norm;
  const int64_t* positive;  // null: row i
  const void* scale;
  const void* bias;
  void* u;
  void* score;
};

// `InverseNorms` of queries and keys and the `PositiveScores` of the pairs (i, i), for max(rows, keys) indices i.
struct NormsAndScores {
  Element element;
  const void* query;
  const void* key;
  int64_t rows;
  int64_t keys;
  int64_t dim;
  const void* scale;
  const void* bias;
  void* query_norm;
  void* key_norm;
  void* u;
  void* score;
};

// One direction of a loss. Sums leave the positive out. Null: absent, or not wanted.
struct PairLosses {
  Element element;  // type of the vectors: the accumulation type
  Energy energy;
  int64_t rows;
  int64_t references;  // entries of `reference` and `settled`: entries beyond the rows become infinite and 0
  const void* max;
  const double* sum;
  const double* active;
  const double* score_sum;
  const double* positive_sum;
  const void* score;
  const void* u;
  const int64_t* positive;
  const int64_t* positives;
  const int64_t* candidates;
  const void* weight;
  const void* share;
  const void* smoothing;
  double half;
  double label_smoothing;
  bool ids_positive;
  double* others;   // written
  void* reference;  // written
  void* settled;    // written: the weight times exp(reference - log-sum-exp)
  void* loss;       // this and the following: added to
  void* score_gradient;
  double* dot;
  double* total;
};

struct FeatureGradients {
  Element element;  // type of the features
  Element total_element;
  Element out_element;
  const void* total;  // may be `out`
  const void* values;
  const void* norm;
  int64_t rows;
  int64_t dim;
  const void* partner;  // null: no positives to add
  int64_t partners;
  const void* partner_norm;
  const int64_t* index;  // null: row i
  const void* score_gradient;
  int64_t score_rows;
  const void* extra;
  const void* scale;
  void* out;
};

SSLKERNELS_CPU_KERNELS(void inverse_norms(const InverseNorms& args, int64_t begin, int64_t end);
                       void positive_scores(const PositiveScores& args, int64_t begin, int64_t end);
                       void norms_and_scores(const NormsAndScores& args, int64_t begin, int64_t end);
                       void pair_losses(const PairLosses& args, int64_t begin, int64_t end);
                       void finish_gradients(const FeatureGradients& args, int64_t begin, int64_t end);)

}  // namespace sslkernels
