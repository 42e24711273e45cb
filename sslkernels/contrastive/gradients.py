"""The gradients of a contrastive loss: accumulators of tiles, per-query negatives and positives, and the results."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.contrastive.pair_rows import HINGE, SIGMOID, FeatureGradient, row_blocks
from sslkernels.contrastive.pair_setup import PairSetup
from sslkernels.contrastive.records import PairGradients, PairWanted, empty_gradients, gradient_dtype
from sslkernels.contrastive.score_tiles import PairKernels


class FeatureGradients:
    """Accumulators, None where no gradient is wanted.

    query, key, bank: gradients of the features as they are, in the accumulation dtype, before logit_scale; key is query
    where the queries are the keys. one_product: each is the product of one tile, which is written over it, in the
    dtype of the product. pair_key: for hinge, gradients of the keys gathered by pair. negatives: gradients of
    the per-query negatives (by index: as in `query_negatives`); query_of_negatives: the part of these in the gradient
    of the queries. dot, total: per row the sum of gradient * u and the sum of the gradient, float64. positive_score:
    gradient of the positives' scores.
    """

    def __init__(self, kernels: PairKernels, setup: PairSetup, wanted: PairWanted, one_product: bool = False) -> None:
        self.kernels = kernels
        self.setup = setup
        self.wanted = wanted
        self.one_product = one_product
        acc = setup.acc

        def zeros(values: Tensor | None, want: bool) -> Tensor | None:
            if values is None or not (want and setup.wants_gradients):
                return None
            if one_product:
                return torch.empty_like(values, dtype=acc if values.is_cuda else values.dtype)
            return values.new_zeros(values.shape, dtype=acc)

        self.query = zeros(setup.query, wanted.query)
        self.key = self.query if setup.mutual else zeros(setup.key, wanted.key)
        self.bank = zeros(setup.bank, wanted.bank)
        by_pair = setup.options.energy == HINGE and setup.options.columns and not setup.positives.in_order
        self.pair_key = zeros(setup.query, wanted.key) if by_pair else None
        self.query_of_negatives = self.negatives = None
        if setup.negatives is not None and setup.wants_gradients:
            self.query_of_negatives = torch.empty_like(self.query) if wanted.query else None
            if setup.by_index and (wanted.key or wanted.bank):
                self.negatives = setup.query.new_empty(setup.negatives.shape, dtype=acc)
            elif wanted.negatives:
                self.negatives = torch.empty_like(setup.negatives)
        self.dot = setup.query.new_zeros(setup.count, dtype=torch.float64)
        self.total = torch.zeros_like(self.dot)
        self.positive_score = setup.query.new_zeros(setup.count, dtype=acc)

    def results(self) -> PairGradients:
        setup, inputs, wanted = self.setup, self.setup.inputs, self.wanted
        if not setup.wants_gradients:
            return empty_gradients(inputs, PairWanted())

        def empty() -> Tensor:  # results must not alias
            return setup.query.new_empty(0, dtype=inputs.query.dtype)

        negatives, bank = None if setup.by_index else self.negatives, None
        if negatives is None and wanted.negatives and inputs.negatives is not None:
            negatives = torch.zeros_like(inputs.negatives)
        if self.bank is not None:
            extra = self._gathered_gradient(setup.key.shape[0], self.bank)
            bank = self._finish(FeatureGradient(self.bank, setup.bank, setup.bank_norm, extra=extra), inputs.bank)
        elif wanted.bank and inputs.bank is not None:
            bank = torch.zeros_like(inputs.bank, dtype=gradient_dtype(inputs.bank))
        logit_bias = self.dot.new_zeros(1, dtype=setup.acc)
        if setup.options.energy == SIGMOID:  # the other energies are invariant to a common offset
            logit_bias = self.total.sum().reshape(1).to(setup.acc)
        return PairGradients(
            query=empty() if self.query is None else self._query_gradient(),
            key=empty() if self.key is None or setup.mutual else self._key_gradient(),
            bank=empty() if bank is None else bank,
            negatives=empty() if negatives is None else negatives,
            logit_scale=self.dot.sum().reshape(1).to(setup.acc),
            logit_bias=logit_bias,
            scale=setup.scale,
        )

    def _query_gradient(self) -> Tensor:
        setup, score_gradient = self.setup, self.positive_score
        _, partner, _, partner_norm, index = setup.partners
        if setup.mutual:  # a query is also the key of its positive
            partner_gradient = score_gradient[index.clamp(min=0)]
            score_gradient = score_gradient + torch.where(index >= 0, partner_gradient, 0)
        gradient = FeatureGradient(
            self.query, setup.query, setup.query_norm, partner, partner_norm, index, score_gradient,
            self.query_of_negatives,
        )  # fmt: skip
        return self._finish(gradient, setup.inputs.query)

    def _key_gradient(self) -> Tensor:
        setup, positives = self.setup, self.setup.positives
        partner = partner_norm = score_gradient = None
        if positives.in_order:
            partner, partner_norm, score_gradient = setup.query, setup.query_norm, self.positive_score
        else:
            self._add_positives_by_key()
        if self.pair_key is not None:
            positives.scatter_add(self.pair_key, self.key)
        extra = self._gathered_gradient(0, self.key)
        gradient = FeatureGradient(
            self.key, setup.key, setup.key_norm, partner, partner_norm, None, score_gradient, extra
        )
        return self._finish(gradient, setup.inputs.key)

    def _gathered_gradient(self, first: int, like: Tensor) -> Tensor | None:
        """The gradient from negatives by index of a table whose first row has the index `first`; None without any."""
        setup = self.setup
        if not setup.by_index:
            return None
        index, queries = setup.negatives, setup.query.to(setup.acc)
        if first > 0:
            index = torch.where(index >= 0, index - first, -1)
        out = torch.empty_like(like)
        self.kernels.sum_rows(index, self.negatives, queries, out)
        return out

    def _add_positives_by_key(self) -> None:
        """Adds the gradients of the positives' scores to keys that may be the positives of several rows."""
        setup, positives, factor = self.setup, self.setup.positives, self.positive_score
        if setup.key.shape[0] == 0:
            return
        if setup.query_norm is not None:
            factor = torch.where(factor != 0, factor * setup.query_norm * positives.gather(setup.key_norm), 0)
        for rows in row_blocks(setup.query):
            part = factor[rows].unsqueeze(1)
            positives.scatter_add(torch.where(part != 0, part * setup.query[rows], 0), self.key, rows)

    def _finish(self, gradient: FeatureGradient, original: Tensor) -> Tensor:
        dtype = gradient_dtype(original)
        out = gradient.total if dtype == gradient.total.dtype else torch.empty_like(gradient.total, dtype=dtype)
        self.kernels.finish_gradient(gradient, self.setup.inputs.logit_scale, out)
        return out
