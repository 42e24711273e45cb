"""The loss of a softmax and its gradient in the positive's score, from sums that leave the positive out.

A confident pair keeps its digits: the positive's score is compared with the log-sum-exp of all others, rather than
subtracted from a log-sum-exp that contains it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive.pair_setup import PairSetup
from sslkernels.contrastive.score_tiles import ColumnSums, RowSums, SideGrad


def log_sum(sums: RowSums | ColumnSums) -> Tensor:
    """max + log(sum), -inf for an empty sum."""
    return torch.where(sums.sum == 0, float("-inf"), sums.max + sums.sum.log())


def softmax_loss(
    setup: PairSetup,
    others: Tensor,
    score: Tensor,
    sums: RowSums | ColumnSums,
    positives: Tensor,
    candidates: Tensor,
    negative_scores: Tensor | None = None,
) -> Tensor:
    """The loss of positives with scores `score`, where `others` is the log-sum-exp of all other candidates.

    positives, candidates: how many of each a row has; negative_scores (rows, K): scores of the per-query negatives,
    which are not in `sums`.
    """
    e = setup.options.label_smoothing
    loss = -F.logsigmoid(score - others)
    if setup.options.ids_positive:
        loss = (torch.logaddexp(others, score) - (sums.positive_sum + score) / positives).to(setup.acc)
    if e == 0:
        return loss
    score_sum = sums.score_sum + score
    if negative_scores is not None:
        score_sum = score_sum + negative_scores.masked_fill(negative_scores == float("-inf"), 0).sum(1)
    return (1 - e) * loss + e * (torch.logaddexp(others, score) - score_sum / candidates).to(setup.acc)


def softmax_slope(setup: PairSetup, side: SideGrad, others: Tensor, score: Tensor) -> Tensor:
    """weight * (probability - 1) + weight - share - smoothing, without cancellation for a confident pair."""
    weight, share = side.weight, side.share
    if share is None:
        share = (1 - setup.options.label_smoothing) * weight
    slope = (weight - share) - torch.where(weight != 0, weight * torch.sigmoid(others - score), 0)
    return slope if side.smoothing is None else slope - side.smoothing
