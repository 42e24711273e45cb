"""The statistics of a contrastive energy: sums over all candidates as a softmax over rows sees them, whatever the loss,
and whether the features collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkernels.contrastive.pair_rows import HINGE, NORM_EPS, SOFTMAX, ColumnSums, log_sum
from sslkernels.contrastive.pair_setup import PairSetup
from sslkernels.contrastive.records import PairStatistics
from sslkernels.contrastive.score_tiles import PairKernels, RowSums, add_scores


def running_sums(setup: PairSetup, count: int, softmax: bool) -> ColumnSums:
    """The sums of `count` rows or columns before the first tile; softmax False: the sums of a sigmoid or hinge."""
    query, options = setup.query, setup.options

    def zeros(needed: bool = True) -> Tensor | None:
        return query.new_zeros(count, dtype=torch.float64) if needed else None

    return ColumnSums(
        max=query.new_full((count,), float("-inf"), dtype=setup.acc) if softmax else None,
        sum=zeros(),
        active=zeros(not softmax and options.energy == HINGE),
        score_sum=zeros(options.label_smoothing > 0),
        positive_sum=zeros(softmax and options.ids_positive),
    )


class Statistics:
    """row_sums: the sums of the loss, which are shared where it is a softmax over rows. sums: the accumulators;
    uniformity_sums: their uniformity_sum alone, for a pass over pairs that are not candidates; positive_index: the key
    of each row's positive; positive_score: its score as its tile computes it; cosine_norms: inverse norms of queries
    and keys.

    The score of the positive comes from the same matmul as the scores of its rivals, so that all are exactly equal
    where the features have collapsed to one.
    """

    def __init__(self, kernels: PairKernels, setup: PairSetup, row_sums: RowSums) -> None:
        self.setup = setup
        n, query, options = setup.count, setup.query, setup.options
        self.shares_sums = options.energy == SOFTMAX and options.rows
        sums = row_sums.without_statistics if self.shares_sums else running_sums(setup, n, True)
        self.sums = RowSums(
            *sums,
            uniformity_sum=query.new_zeros(n, dtype=torch.float64),
            num_above_positive=query.new_zeros(n, dtype=torch.int64),
            num_equal_positive=query.new_zeros(n, dtype=torch.int64),
        )
        self.uniformity_sums = RowSums(*running_sums(setup, n, True), self.sums.uniformity_sum, None, None)
        self.cosine_norms = (setup.query_norm, setup.key_norm)
        if not options.normalize:
            self.cosine_norms = (kernels.inverse_norm(query, setup.acc), setup.inverse_key_norm(kernels))
        positive = setup.inputs.positive
        self.positive_index = torch.arange(n, device=query.device) if positive is None else positive
        self.positive_score = torch.full_like(setup.score, float("inf"))

    def add_negatives(self, rows: slice, scores: Tensor, positives: Tensor) -> None:
        """Adds the per-query negatives of `rows` by their scores (rows, K), and compares them with the scores (rows, 1)
        of the positives as the same kernel computes them."""
        self.sums.num_above_positive[rows] += (scores > positives).sum(1)
        self.sums.num_equal_positive[rows] += (scores == positives).sum(1)
        if not self.shares_sums:
            sums = self.sums.without_statistics
            add_scores(ColumnSums(*(None if v is None else v[rows] for v in sums)), scores)

    def results(self) -> PairStatistics:
        setup, sums, positives = self.setup, self.sums, self.setup.positives
        others = log_sum(sums)
        lse = torch.logaddexp(others, setup.score.double())
        positive, above, equal = setup.score.clone(), sums.num_above_positive, sums.num_equal_positive
        if sums.positive_sum is not None:
            positive = (sums.positive_sum + setup.score) / positives.row_positives
        positive = positive.to(setup.acc)
        if not positives.in_order:
            counted, none = positives.counted, ~positives.counted
            lse, positive = torch.where(counted, lse, others), positive.masked_fill(none, 0)
            above, equal = above.masked_fill(none, -1), equal.masked_fill(none, 0)
        return PairStatistics(lse.to(setup.acc), positive, above, equal, *self._distances())

    def _distances(self) -> tuple[Tensor, Tensor]:
        """Alignment and uniformity, from cosines; a feature that is 0 stays 0 when it is normalised."""
        setup, positives = self.setup, self.setup.positives
        query_norm, key_norm = self.cosine_norms
        cosine = setup.positive_u
        if not setup.options.normalize:
            cosine = cosine * query_norm * positives.gather(key_norm)
        itself, total = setup.inputs.self_index, self.sums.uniformity_sum.sum()
        if positives.in_order and itself is None and self._has_no_zeros():
            pairs = setup.count * (key_norm.shape[0] - 1)
            return (2 - 2 * cosine).mean(), (total / pairs).log().to(setup.acc)
        query_is_zero, key_is_zero = (norm * NORM_EPS >= 1 for norm in self.cosine_norms)
        squares = 2 - query_is_zero.to(cosine.dtype) - positives.gather(key_is_zero).to(cosine.dtype)
        alignment = torch.where(positives.counted, squares - 2 * cosine, 0).sum() / positives.counted.sum()

        # The sum is over exp(4 cosine - 4) of all pairs but the positive and the sample itself.
        pairs = key_is_zero.shape[0] - positives.has.double()
        zero_keys = key_is_zero.sum() - (positives.has & positives.gather(key_is_zero)).double()
        if itself is not None:
            pairs = pairs - 1
            zero_keys = zero_keys - key_is_zero[itself].double()
        with_one_zero = torch.where(query_is_zero, pairs - zero_keys, zero_keys)
        with_two = torch.where(query_is_zero, zero_keys, 0)
        counted_as = math.exp(-4)
        total = total + (math.exp(-2) - counted_as) * with_one_zero.sum() + (1 - counted_as) * with_two.sum()
        return alignment, (total / pairs.sum()).log().to(setup.acc)

    def _has_no_zeros(self) -> bool:
        """Whether no feature is 0, as far as the host can read it without a synchronisation."""
        query_norm, key_norm = self.cosine_norms
        if query_norm.device.type != "cpu" or 0 in (query_norm.numel(), key_norm.numel() - 1):
            return False
        return max(query_norm.max().item(), key_norm.max().item()) * NORM_EPS < 1
