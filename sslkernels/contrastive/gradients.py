"""The gradients of a contrastive loss: what tiles, own negatives and designated pairs add up in, and the results."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.contrastive.pair_setup import NORM_EPS, Problem
from sslkernels.contrastive.positives import row_blocks
from sslkernels.contrastive.records import PairGradients, PairWanted, empty_gradients, gradient_dtype
from sslkernels.contrastive.score_tiles import HINGE, SIGMOID


class FeatureGradients:
    """Accumulators, None where nothing is wanted.

    query, key, bank: of the features as they are, in the accumulation dtype, before logit_scale; key is query where
    the queries are the keys; pair_key: of the keys gathered by pair (hinge); own_query, own: from the own negatives;
    dot, total: of each row, sum of gradient * u and sum of the gradient, float64; designated: of the designated scores.
    """

    def __init__(self, problem: Problem, wanted: PairWanted) -> None:
        self.problem = problem
        self.wanted = wanted
        acc = problem.acc

        def zeros(values: Tensor | None, want: bool) -> Tensor | None:
            if values is None or not (want and problem.wants_gradients):
                return None
            return values.new_zeros(values.shape, dtype=acc)

        self.query = zeros(problem.query, wanted.query)
        self.key = self.query if problem.mutual else zeros(problem.key, wanted.key)
        self.bank = zeros(problem.bank, wanted.bank)
        by_pair = problem.options.energy == HINGE and problem.options.columns and not problem.designated.in_order
        self.pair_key = zeros(problem.query, wanted.key) if by_pair else None
        self.own_query = self.own = None
        if problem.own is not None and problem.wants_gradients:
            self.own_query = torch.empty_like(self.query) if wanted.query else None
            self.own = torch.empty_like(problem.own) if wanted.negatives else None
        self.dot = problem.query.new_zeros(problem.count, dtype=torch.float64)
        self.total = torch.zeros_like(self.dot)
        self.designated = problem.query.new_zeros(problem.count, dtype=acc)

    def results(self) -> PairGradients:
        problem, inputs, gradient = self.problem, self.problem.inputs, self.designated
        if not problem.wants_gradients:
            return empty_gradients(inputs, PairWanted(*[False] * len(PairWanted._fields)))
        logit_scale = self.dot.sum() + (gradient * problem.positive_u.masked_fill(gradient == 0, 0)).sum()
        logit_bias = torch.zeros_like(logit_scale)  # of a common offset softmax and hinge know nothing
        if problem.options.energy == SIGMOID:
            logit_bias = self.total.sum() + gradient.sum()
        self._add_designated()
        features = (
            self._finished(self.query, problem.query, problem.query_norm, inputs.query, self.own_query),
            self._finished(None if problem.mutual else self.key, problem.key, problem.key_norm, inputs.key),
            self._finished(self.bank, problem.bank, problem.bank_norm, inputs.bank, want=self.wanted.bank),
        )
        negatives = gradient.new_empty(0, dtype=inputs.query.dtype)
        if self.wanted.negatives and inputs.negatives is not None:
            negatives = torch.zeros_like(inputs.negatives) if self.own is None else self.own
        scalars = (logit_scale.reshape(1).to(problem.acc), logit_bias.reshape(1).to(problem.acc))
        return PairGradients(*features, negatives, *scalars, problem.scale)

    def _add_designated(self) -> None:
        """What the designated pairs add to queries and keys, and the columns of pairs to the keys."""
        pairs, gradient = self.problem.designated, self.designated
        if self.problem.positive_norm is not None:
            gradient = torch.where(gradient != 0, gradient * self.problem.positive_norm, 0)
        for rows, x, y in self.problem.designated_features():
            part = gradient[rows].unsqueeze(1)
            if self.query is not None:
                self.query[rows] += torch.where(part != 0, part * y, 0)
            if self.key is not None:
                pairs.scatter(torch.where(part != 0, part * x, 0), self.key, rows)
        if self.pair_key is not None:
            pairs.scatter(self.pair_key, self.key)

    def _finished(
        self,
        total: Tensor | None,
        values: Tensor | None,
        norm: Tensor | None,
        original: Tensor | None,
        own: Tensor | None = None,
        want: bool = False,
    ) -> Tensor:
        """Applies logit_scale, adds what the own negatives gave, takes out what normalisation does. want: zeros where
        the features take no part."""
        if total is None:
            if want and original is not None:
                return torch.zeros_like(original, dtype=gradient_dtype(original))
            return self.designated.new_empty(0, dtype=self.problem.inputs.query.dtype)
        for rows in row_blocks(total):
            part = total[rows].mul_(self.problem.inputs.logit_scale)
            if own is not None:
                part += own[rows]
            if norm is not None:
                x, r = values[rows].to(part.dtype), norm[rows]
                along = (part * x).sum(1) * r * r
                along = torch.where(r * NORM_EPS < 1, along, 0)  # a norm that was clamped is a constant
                part.addcmul_(along.unsqueeze(1), x, value=-1)
        return total.to(gradient_dtype(original))
