"""The statistics of a contrastive energy: sums over all candidates as a softmax over rows sees them, whatever the loss,
and whether the features collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.contrastive.pair_rows import HINGE, SOFTMAX, ColumnSums, log_sum
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
    """row_sums: the sums of the loss, which serve here too where it is a softmax over rows. sums: those to add to;
    above_positive: the score above which a candidate ranks before the positive; cosine_norms: inverse norms of queries
    and keys."""

    def __init__(self, kernels: PairKernels, setup: PairSetup, row_sums: RowSums) -> None:
        self.setup = setup
        n, query, options = setup.count, setup.query, setup.options
        self.shares_sums = options.energy == SOFTMAX and options.rows
        sums = row_sums.without_statistics if self.shares_sums else running_sums(setup, n, True)
        self.sums = RowSums(
            *sums,
            uniformity_sum=query.new_zeros(n, dtype=torch.float64),
            num_above_positive=query.new_zeros(n, dtype=torch.int64),
        )
        self.cosine_norms = (setup.query_norm, setup.key_norm)
        if not options.normalize:
            norms = (kernels.inverse_norm(features, setup.acc) for features in (query, setup.key))
            self.cosine_norms = tuple(norms)
        self.above_positive = setup.score + self._rounding_of_scores()

    def _rounding_of_scores(self) -> Tensor:
        """By how much a score of a tile may exceed the positive's score for the same features."""
        setup = self.setup
        sizes = torch.ones_like(setup.score)
        if not setup.options.normalize:
            query_norm, key_norm = self.cosine_norms
            sizes = 1 / (query_norm * setup.positives.gather(key_norm))
        rounding = 8 * torch.finfo(setup.acc).eps * sizes
        if setup.dtype.itemsize == 2:  # the products themselves are rounded
            rounding = rounding + torch.finfo(setup.dtype).eps * setup.positive_u.abs()
        return setup.inputs.logit_scale.abs() * rounding + torch.finfo(setup.acc).eps * setup.score.abs()

    def add_negatives(self, rows: slice, scores: Tensor) -> None:
        """Adds the per-query negatives of `rows` by their scores (rows, K), unless they are in the sums of the loss."""
        self.sums.num_above_positive[rows] += (scores > self.above_positive[rows].unsqueeze(1)).sum(1)
        if not self.shares_sums:
            sums = self.sums.without_statistics
            add_scores(ColumnSums(*(None if v is None else v[rows] for v in sums)), scores)

    def results(self) -> PairStatistics:
        setup, sums = self.setup, self.sums
        positives, counted = setup.positives, setup.positives.counted
        others = log_sum(sums)
        lse = torch.where(counted, torch.logaddexp(others, setup.score.double()), others)
        positive = setup.score
        if sums.positive_sum is not None:
            positive = (sums.positive_sum + setup.score) / positives.row_positives
        cosine = setup.positive_u
        if not setup.options.normalize:
            query_norm, key_norm = self.cosine_norms
            cosine = cosine * query_norm * positives.gather(key_norm)
        pair_count = (positives.row_candidates - positives.has.long()).sum() if setup.options.in_batch else 0
        return PairStatistics(
            lse=lse.to(setup.acc),
            positive=positive.to(setup.acc).masked_fill(~counted, 0),
            num_above_positive=sums.num_above_positive.masked_fill(~counted, -1),
            alignment=torch.where(counted, 2 - 2 * cosine, 0).sum() / counted.sum(),
            uniformity=(sums.uniformity_sum.sum() / pair_count).log().to(setup.acc),
        )
