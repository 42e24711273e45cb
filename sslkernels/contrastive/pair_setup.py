"""A contrastive loss before its scores: features, positives, and the weights of its rows and columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive.positives import Positives, row_blocks
from sslkernels.contrastive.records import PairInputs, PairOptions
from sslkernels.contrastive.score_tiles import HINGE, SIGMOID, SOFTMAX, SideGrad
from sslkernels.core.dtypes import accumulation_dtype

NORM_EPS = 1e-12


class PairSetup:
    """The parts of a contrastive loss that are known before the first tile.

    query, key, bank: features in the dtype of the matmuls; query_norm, key_norm, bank_norm: their inverse norms where
    they are normalised; mutual: key is query; negatives: the per-query negatives, as they are. positive_u, score: u and
    s of the positives; positive_norm: the product of their inverse norms. row_threshold, column_threshold: for hinge,
    the score above which a negative costs. has_loss: rows that have a loss; half: the share of one direction in the
    loss. row, column: what each side adds to the gradient of sum(coefficient * loss) / scale, without the references of
    a softmax; weight: coefficient * half / scale of each row.
    """

    def __init__(
        self, inputs: PairInputs, options: PairOptions, coefficient: Tensor | None, wants_gradients: bool
    ) -> None:
        self.inputs = inputs
        self.options = options
        self.wants_gradients = coefficient is not None and wants_gradients
        self.mutual = inputs.key is None
        self.acc = accumulation_dtype(inputs.query.dtype)
        # On a CPU a float16 matmul is about a thousand times slower than a float32 one.
        cpu_half = inputs.query.device.type == "cpu" and options.compute_dtype == torch.float16
        self.dtype = torch.float32 if cpu_half else options.compute_dtype
        self.count = inputs.query.shape[0]
        self.query = inputs.query.to(self.dtype)
        self.key = self.query if inputs.key is None else inputs.key.to(self.dtype)
        self.bank = None if inputs.bank is None or not options.rows else inputs.bank.to(self.dtype)
        self.negatives = inputs.negatives if options.rows else None

        self.query_norm = self.key_norm = self.bank_norm = None
        if options.normalize:
            self.query_norm = inverse_norm(self.query, self.acc)
            self.key_norm = self.query_norm if self.mutual else inverse_norm(self.key, self.acc)
            self.bank_norm = None if self.bank is None else inverse_norm(self.bank, self.acc)
        self.positives = Positives(inputs, options)
        self.row_candidates = self.positives.row_candidates
        if self.bank is not None:
            self.row_candidates = self.row_candidates + self.bank.shape[0]
        if self.negatives is not None:
            mask = inputs.negatives_mask
            self.row_candidates = self.row_candidates + (self.negatives.shape[1] if mask is None else mask.sum(1))
        self._score_positives()
        self._weigh(coefficient)

    def _score_positives(self) -> None:
        positives, inputs = self.positives, self.inputs
        product = self.query.new_zeros(self.count, dtype=self.acc)
        for rows, x, y in self.positive_features():
            product[rows] = (x * y).sum(1)
        self.positive_norm = None
        if self.query_norm is not None:
            self.positive_norm = self.query_norm * positives.gather(self.key_norm)
            product = product * self.positive_norm
        self.positive_u = product.masked_fill(positives.invalid, float("nan"))
        self.score = inputs.logit_scale * self.positive_u
        if inputs.logit_bias is not None:
            self.score = self.score + inputs.logit_bias
        self.row_threshold = self.column_threshold = None
        if self.options.energy == HINGE:
            threshold = (self.score - self.options.margin).masked_fill(~positives.counted, float("inf"))
            self.row_threshold = threshold
            # One column per pair, because a key that is the positive of several rows has several thresholds.
            self.column_threshold = F.pad(threshold, (0, self.hinge_columns() - self.count), value=float("inf"))

    def hinge_columns(self) -> int:
        return self.key.shape[0] if self.positives.in_order else self.count

    def positive_features(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their queries, their positives) in the accumulation dtype, a block of rows at a time."""
        if self.key.shape[0] == 0:
            return
        for rows in row_blocks(self.query):
            keys = self.key[rows] if self.positives.in_order else self.key[self.positives.index[rows]]
            yield rows, self.query[rows].to(self.acc), keys.to(self.acc)

    def _weigh(self, coefficient: Tensor | None) -> None:
        """Sets scale, weight, row and column."""
        options, positives = self.options, self.positives
        self.half = 0.5 if options.rows and options.columns else 1.0
        self.has_loss = torch.ones_like(positives.has) if options.energy == SIGMOID else positives.counted
        self.scale = torch.ones((), dtype=self.acc, device=self.query.device)
        self.row, self.column = SideGrad(), SideGrad()
        if not self.wants_gradients:
            return
        weight = torch.where(self.has_loss, coefficient.to(self.acc), 0)
        if torch.float16 in (self.inputs.query.dtype, self.dtype) and self.count:
            # float16 gradients are divided by the largest coefficient: 1 / N would vanish in float16's subnormals.
            largest = weight.abs().max() * self.inputs.logit_scale.abs().clamp(min=1).reshape(())
            self.scale = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
        self.weight = weight = self.half * weight / self.scale
        e, softmax = options.label_smoothing, options.energy == SOFTMAX

        def side(weight: Tensor, reference: Tensor | None, positives: Tensor, candidates: Tensor) -> SideGrad:
            share = (1 - e) * weight / positives.clamp(min=1) if options.ids_positive and softmax else None
            return SideGrad(weight, reference, share, e * weight / candidates.clamp(min=1) if e > 0 else None)

        if options.rows:
            self.row = side(weight, self.row_threshold, positives.row_positives, self.row_candidates)
        if options.columns and options.energy == HINGE:
            self.column = SideGrad(F.pad(weight, (0, self.hinge_columns() - self.count)), self.column_threshold)
        elif options.columns:
            total = positives.scatter_add(weight, weight.new_zeros(self.key.shape[0]))
            self.column = side(total, None, positives.column_positives, positives.column_candidates)


def inverse_norm(values: Tensor, acc: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(values, dim=1, dtype=acc).clamp_min(NORM_EPS).reciprocal()
