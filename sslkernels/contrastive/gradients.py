"""The gradients of a contrastive loss: accumulators of tiles, per-query negatives and positives, and the results."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.contrastive.pair_setup import NORM_EPS, PairSetup
from sslkernels.contrastive.positives import row_blocks
from sslkernels.contrastive.records import PairGradients, PairWanted, empty_gradients, gradient_dtype
from sslkernels.contrastive.score_tiles import HINGE, SIGMOID


class FeatureGradients:
    """Accumulators, None where no gradient is wanted.

    query, key, bank: gradients of the features as they are, in the accumulation dtype, before logit_scale; key is query
    where the queries are the keys. pair_key: for hinge, gradients of the keys gathered by pair. negatives,
    query_of_negatives: gradients of the per-query negatives, and what these add to the queries. dot, total: per row the
    sum of gradient * u and the sum of the gradient, float64. positive_score: gradient of the positives' scores.
    """

    def __init__(self, setup: PairSetup, wanted: PairWanted) -> None:
        self.setup = setup
        self.wanted = wanted
        acc = setup.acc

        def zeros(values: Tensor | None, want: bool) -> Tensor | None:
            if values is None or not (want and setup.wants_gradients):
                return None
            return values.new_zeros(values.shape, dtype=acc)

        self.query = zeros(setup.query, wanted.query)
        self.key = self.query if setup.mutual else zeros(setup.key, wanted.key)
        self.bank = zeros(setup.bank, wanted.bank)
        by_pair = setup.options.energy == HINGE and setup.options.columns and not setup.positives.in_order
        self.pair_key = zeros(setup.query, wanted.key) if by_pair else None
        self.query_of_negatives = self.negatives = None
        if setup.negatives is not None and setup.wants_gradients:
            self.query_of_negatives = torch.empty_like(self.query) if wanted.query else None
            self.negatives = torch.empty_like(setup.negatives) if wanted.negatives else None
        self.dot = setup.query.new_zeros(setup.count, dtype=torch.float64)
        self.total = torch.zeros_like(self.dot)
        self.positive_score = setup.query.new_zeros(setup.count, dtype=acc)

    def results(self) -> PairGradients:
        setup, inputs, gradient = self.setup, self.setup.inputs, self.positive_score
        if not setup.wants_gradients:
            return empty_gradients(inputs, PairWanted())
        logit_scale = self.dot.sum() + (gradient * setup.positive_u.masked_fill(gradient == 0, 0)).sum()
        logit_bias = torch.zeros_like(logit_scale)  # softmax and hinge are invariant to a common offset
        if setup.options.energy == SIGMOID:
            logit_bias = self.total.sum() + gradient.sum()
        self._add_positives()
        negatives = gradient.new_empty(0, dtype=inputs.query.dtype)
        if self.wanted.negatives and inputs.negatives is not None:
            negatives = torch.zeros_like(inputs.negatives) if self.negatives is None else self.negatives
        key = None if setup.mutual else self.key
        return PairGradients(
            query=self._finished(self.query, setup.query, setup.query_norm, inputs.query, self.query_of_negatives),
            key=self._finished(key, setup.key, setup.key_norm, inputs.key),
            bank=self._finished(self.bank, setup.bank, setup.bank_norm, inputs.bank, want=self.wanted.bank),
            negatives=negatives,
            logit_scale=logit_scale.reshape(1).to(setup.acc),
            logit_bias=logit_bias.reshape(1).to(setup.acc),
            scale=setup.scale,
        )

    def _add_positives(self) -> None:
        """Adds the gradients of the positives' scores to queries and keys, and pair_key to the keys."""
        positives, gradient = self.setup.positives, self.positive_score
        if self.setup.positive_norm is not None:
            gradient = torch.where(gradient != 0, gradient * self.setup.positive_norm, 0)
        for rows, x, y in self.setup.positive_features():
            part = gradient[rows].unsqueeze(1)
            if self.query is not None:
                self.query[rows] += torch.where(part != 0, part * y, 0)
            if self.key is not None:
                positives.scatter_add(torch.where(part != 0, part * x, 0), self.key, rows)
        if self.pair_key is not None:
            positives.scatter_add(self.pair_key, self.key)

    def _finished(
        self,
        total: Tensor | None,
        values: Tensor | None,
        norm: Tensor | None,
        original: Tensor | None,
        of_negatives: Tensor | None = None,
        want: bool = False,
    ) -> Tensor:
        """Applies logit_scale, adds the part of the per-query negatives, projects out the direction of normalised
        features. want: zeros where the features are not part of the loss."""
        if total is None:
            if want and original is not None:
                return torch.zeros_like(original, dtype=gradient_dtype(original))
            return self.positive_score.new_empty(0, dtype=self.setup.inputs.query.dtype)
        for rows in row_blocks(total):
            part = total[rows].mul_(self.setup.inputs.logit_scale)
            if of_negatives is not None:
                part += of_negatives[rows]
            if norm is not None:
                x, r = values[rows].to(part.dtype), norm[rows]
                along = (part * x).sum(1) * r * r
                along = torch.where(r * NORM_EPS < 1, along, 0)  # a norm that was clamped is a constant
                part.addcmul_(along.unsqueeze(1), x, value=-1)
        return total.to(gradient_dtype(original))
