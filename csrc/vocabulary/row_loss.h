// The cross-entropy of one row from its sums, and the coefficients of its gradient.
//
// The sums exclude the target, so that a confident row keeps its loss: nll = log1p(others / target_exp). The formulas
// are the same as in sslkernels/vocabulary/softmax_rows.py. A is the accumulation type, float or double.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace sslkernels {

struct RowOptions {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  double logit_scale;
};

// Sums of one row, with z = the transformed logits and m = max(z).
template <class A>
struct RowSums {
  A row_max;
  A target_z;
  A others;         // sum over j != target of exp(z_j - m)
  A expected;       // sum over j != target of exp(z_j - m) * (z_j - m); for the entropy
  A weighted_gaps;  // sum over j of w_j * (m - z_j); for label smoothing
};

template <class A>
struct RowResult {
  A loss;
  A sum_exp;
  A logprob;
  A entropy;
};

template <class A>
SSLKERNELS_HD A row_entropy(const RowSums<A>& sums, A target_exp, A sum_exp) {
  const A target_shifted = sums.target_z - sums.row_max;
  const A target_part = target_exp > A(0) ? target_exp * target_shifted : target_exp;
  return std::log(sum_exp) - (sums.expected + target_part) / sum_exp;
}

// weight_sum: sum of the class weights (the vocabulary size without weights).
template <class A>
SSLKERNELS_HD RowResult<A> finish_row(const RowSums<A>& sums, A target_weight, A weight_sum, int64_t vocab,
                                      const RowOptions& options) {
  const A target_shifted = sums.target_z - sums.row_max;
  const A target_exp = std::exp(target_shifted);
  RowResult<A> result;
  result.sum_exp = sums.others + target_exp;
  const A log_sum = std::log(result.sum_exp);
  result.logprob = target_exp > sums.others ? -std::log1p(sums.others / target_exp) : target_shifted - log_sum;
  const A smoothing = A(options.label_smoothing);
  result.loss = -(A(1) - smoothing) * target_weight * result.logprob;
  if (options.label_smoothing > 0) {
    result.loss += smoothing / A(vocab) * (sums.weighted_gaps + weight_sum * log_sum);
  }
  if (options.z_loss > 0) {
    const A lse = sums.row_max + log_sum;
    result.loss += A(options.z_loss) * lse * lse;
  }
  result.entropy = row_entropy(sums, target_exp, result.sum_exp);
  return result;
}

// grad_j = exp_scale * exp(z_j - row_max) - smooth * w_j for j != target, and grad_target at the target; all times
// dz/dl.
template <class A>
struct RowGradient {
  A exp_scale;
  A smooth;
  A target_constant;  // grad_target = target_constant + target_exp_scale * exp(z_target - row_max)
  A target_exp_scale;
};

template <class A>
SSLKERNELS_HD RowGradient<A> row_gradient(A coefficient, A row_max, A sum_exp, A logprob, A target_weight, A weight_sum,
                                          int64_t vocab, const RowOptions& options) {
  const A smoothing = A(options.label_smoothing);
  const A target_part = (A(1) - smoothing) * target_weight;
  A other_part = smoothing / A(vocab) * weight_sum;
  if (options.z_loss > 0) {
    other_part += A(2) * A(options.z_loss) * (row_max + std::log(sum_exp));
  }
  RowGradient<A> gradient;
  gradient.exp_scale = coefficient * ((target_part + other_part) / sum_exp);
  gradient.smooth = coefficient * (smoothing / A(vocab));
  gradient.target_constant = coefficient * (target_part * std::expm1(logprob) - smoothing / A(vocab) * target_weight);
  gradient.target_exp_scale = coefficient * (other_part / sum_exp);
  return gradient;
}

}  // namespace sslkernels
