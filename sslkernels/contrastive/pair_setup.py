"""A contrastive loss before its scores: features, positives, and the weights of its rows and columns."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive.pair_rows import HINGE, SIGMOID, SOFTMAX, PositivePairs, SideGrad
from sslkernels.contrastive.positives import Positives
from sslkernels.contrastive.records import PairInputs, PairOptions
from sslkernels.contrastive.score_tiles import PairKernels
from sslkernels.core.dtypes import accumulation_dtype


class PairSetup:
    """The parts of a contrastive loss that are known before the first tile.

    query, key, bank: features in the dtype of the matmuls; query_norm, key_norm, bank_norm: their inverse norms where
    they are normalised; mutual: key is query; negatives: the per-query negatives, as they are. positive_u, score: u and
    s of the positives. row_threshold, column_threshold: for hinge, the score above which a negative costs. has_loss:
    rows that have a loss; half: the share of one direction in the loss. row, column: what each side adds to the
    gradient of sum(coefficient * loss) / scale, without the references of a softmax; weight: coefficient * half / scale
    of each row.
    """

    def __init__(
        self,
        kernels: PairKernels,
        inputs: PairInputs,
        options: PairOptions,
        coefficient: Tensor | None,
        wants_gradients: bool,
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
            self.query_norm = kernels.inverse_norm(self.query, self.acc)
            self.key_norm = self.query_norm if self.mutual else kernels.inverse_norm(self.key, self.acc)
            self.bank_norm = None if self.bank is None else kernels.inverse_norm(self.bank, self.acc)
        self.positives = Positives(inputs, options)
        self.positive_u = self.query.new_empty(self.count, dtype=self.acc)
        self.score = torch.empty_like(self.positive_u)
        pairs = PositivePairs(self.query, self.key, self.query_norm, self.key_norm, inputs.positive)
        kernels.positive_scores(pairs, inputs.logit_scale, inputs.logit_bias, self.positive_u, self.score)
        self._set_thresholds()
        self._weigh(coefficient)

    @functools.cached_property
    def row_candidates(self) -> Tensor:
        """How many scores each row has, the positive included."""
        candidates = self.positives.row_candidates
        if self.bank is not None:
            candidates = candidates + self.bank.shape[0]
        if self.negatives is not None:
            mask = self.inputs.negatives_mask
            candidates = candidates + (self.negatives.shape[1] if mask is None else mask.sum(1))
        return candidates

    @functools.cached_property
    def has_loss(self) -> Tensor:
        every = self.options.energy == SIGMOID
        return torch.ones_like(self.positives.has) if every else self.positives.counted

    def _set_thresholds(self) -> None:
        positives = self.positives
        self.row_threshold = self.column_threshold = None
        if self.options.energy == HINGE:
            threshold = (self.score - self.options.margin).masked_fill(~positives.counted, float("inf"))
            self.row_threshold = threshold
            # One column per pair, because a key that is the positive of several rows has several thresholds.
            self.column_threshold = F.pad(threshold, (0, self.hinge_columns() - self.count), value=float("inf"))

    def hinge_columns(self) -> int:
        return self.key.shape[0] if self.positives.in_order else self.count

    def _weigh(self, coefficient: Tensor | None) -> None:
        """Sets scale, weight, row and column."""
        options, positives = self.options, self.positives
        self.half = 0.5 if options.rows and options.columns else 1.0
        self.scale = torch.ones((), dtype=self.acc, device=self.query.device)
        self.row, self.column = SideGrad(), SideGrad()
        if not self.wants_gradients:
            return
        weight = coefficient.to(self.acc)
        if not positives.in_order and options.energy != SIGMOID:
            weight = torch.where(positives.counted, weight, 0)
        if torch.float16 in (self.inputs.query.dtype, self.dtype) and self.count:
            # float16 gradients are divided by the largest coefficient: 1 / N would vanish in float16's subnormals.
            largest = weight.abs().max() * self.inputs.logit_scale.abs().clamp(min=1).reshape(())
            self.scale = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
            weight = weight / self.scale
        self.weight = weight = weight if self.half == 1 else self.half * weight
        e, softmax = options.label_smoothing, options.energy == SOFTMAX

        def side(weight: Tensor, columns: bool) -> SideGrad:
            share = smoothing = None
            if options.ids_positive and softmax:
                count = positives.column_positives if columns else positives.row_positives
                share = (1 - e) * weight / count.clamp(min=1)
            if e > 0:
                count = positives.column_candidates if columns else self.row_candidates
                smoothing = e * weight / count.clamp(min=1)
            return SideGrad(weight, None, share, smoothing)

        if options.rows:
            self.row = side(weight, columns=False)._replace(reference=self.row_threshold)
        if options.columns and options.energy == HINGE:
            self.column = SideGrad(F.pad(weight, (0, self.hinge_columns() - self.count)), self.column_threshold)
        elif options.columns:
            if not (positives.in_order and self.key.shape[0] == self.count):
                weight = positives.scatter_add(weight, weight.new_zeros(self.key.shape[0]))
            self.column = side(weight, columns=True)
