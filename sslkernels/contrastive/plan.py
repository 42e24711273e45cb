"""The contrastive energies over tiles of pair scores: the plan of every backend.

Queries are processed in blocks of rows. The products of a row block with every shared candidate (the keys, the bank)
fit a buffer that is reused; no queries x keys matrix is materialised. For sigmoid and hinge, and for a softmax over
rows, one row block gives sums and then, from the same products, the gradient: three matmuls in all, two where the
candidates are frozen. A softmax over columns needs the sums of all row blocks before the first gradient, and therefore
the products a second time: four.

Where the queries are the keys and positives are mutual, scores are symmetric: a row block computes the columns from its
own first row on, each product stands for two, and the gradient matrix is G + G^T: two matmuls in all.

For query i with positive j = positive[i] and scores s over its candidates,

    softmax: (1 - e) * (lse_i - mean_{p in P_i} s_ip) + e * (lse_i - mean_c s_ic)      e = label_smoothing
    sigmoid: softplus(-s_ij) + sum of softplus(s) over negatives (of softplus(-s) over extra positives)
    hinge:   sum of max(0, margin + s - s_ij) over negatives

with P_i the positive and the extra positives. The column direction is the same over the queries of key j. A pair of a
query and its positive never enters a tile: its score, loss and gradient are computed from the two rows in the
accumulation dtype, so that a confident pair keeps them in half precision too.

The gradient of a feature x is accumulated as if u were the product of the features as they are. With r = 1 / norm, this
is r times the gradient of the normalised feature; projecting out the direction of x gives the gradient of x. No
normalised copy of the features is materialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive.gradients import FeatureGradients
from sslkernels.contrastive.pair_setup import PairSetup
from sslkernels.contrastive.query_negatives import NegativeInputs, NegativeOutputs, RowMerge, query_negatives_
from sslkernels.contrastive.records import (
    PairGradients,
    PairInputs,
    PairOptions,
    PairState,
    PairStatistics,
    PairWanted,
    empty_state,
    empty_statistics,
)
from sslkernels.contrastive.score_tiles import (
    HINGE,
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    GradientOutputs,
    Labels,
    PairKernels,
    RowSums,
    SideGrad,
    Thresholds,
    Tile,
)
from sslkernels.contrastive.softmax_loss import log_sum, softmax_loss, softmax_slope
from sslkernels.contrastive.statistics import Statistics, running_sums

# Row blocks of a symmetric score matrix: each product serves two rows, except in the blocks on the diagonal.
MUTUAL_ROW_BLOCKS = 16
TILE_ROWS = 128

Record = TypeVar("Record", RowSums, ColumnSums, SideGrad)


def forward(
    kernels: PairKernels,
    inputs: PairInputs,
    coefficient: Tensor | None,
    options: PairOptions,
    wanted: PairWanted,
    stats: bool,
) -> tuple[Tensor, PairState, PairStatistics, PairGradients]:
    """Losses and statistics, and the gradients of sum(coefficient * loss) that are wanted."""
    setup = PairSetup(inputs, options, coefficient, any(wanted))
    plan = _Plan(kernels, setup, wanted, stats)
    plan.walk(sums=True, gradient=setup.wants_gradients and not plan.two_pass)
    if options.columns:
        plan.finish_columns()
    if setup.wants_gradients and plan.two_pass:
        plan.walk(sums=False, gradient=True)
    statistics = empty_statistics(setup.query, False) if plan.statistics is None else plan.statistics.results()
    return plan.loss, plan.state, statistics, plan.grads.results()


def backward(
    kernels: PairKernels,
    grad_loss: Tensor,
    inputs: PairInputs,
    state: PairState,
    options: PairOptions,
    wanted: PairWanted,
) -> PairGradients:
    """The gradients of sum(grad_loss * loss), from products computed again."""
    plan = _Plan(kernels, PairSetup(inputs, options, grad_loss, any(wanted)), wanted, stats=False)
    if options.energy == SOFTMAX:
        plan.restore(state)
        plan.walk(sums=False, gradient=True)
    else:
        plan.walk(sums=True, gradient=True)
        if options.columns:
            plan.finish_columns()
    return plan.grads.results()


class _Candidates(NamedTuple):
    """Candidates that all queries share: their features, inverse norms and labels, in the order of `Labels.pairs`.

    rows, columns: whether sums over each row's candidates and over each column's queries are part of the loss; keys:
    whether they are the keys, over which uniformity is summed; pairs: whether they have a column per pair. gradient:
    where their gradient accumulates.
    """

    values: Tensor
    norm: Tensor | None
    labels: tuple[Tensor | None, ...]
    rows: bool = False
    columns: bool = False
    keys: bool = False
    pairs: bool = False
    gradient: Tensor | None = None


class _TileSpec(NamedTuple):
    """A tile of a row block: which columns of the candidates, and what is summed over it. twice: the tile is on the
    diagonal and contains each pair of its rows in both orders."""

    candidates: _Candidates
    rows: slice
    columns: slice
    rows_summed: bool
    columns_summed: bool
    twice: bool = False


class _Plan:
    """Walks over the row blocks and accumulates losses, statistics and gradients."""

    def __init__(self, kernels: PairKernels, setup: PairSetup, wanted: PairWanted, stats: bool) -> None:
        self.kernels = kernels
        self.setup = setup
        options = setup.options
        self.row, self.column = setup.row, setup.column
        self.two_pass = options.energy == SOFTMAX and (options.columns or setup.mutual)
        self.grads = FeatureGradients(setup, wanted)
        self.buffer: Tensor | None = None
        self.candidates = list(self._shared_candidates())

        softmax = options.energy == SOFTMAX
        sums = running_sums(setup, setup.count, softmax)
        self.row_sums = RowSums(*sums, uniformity_sum=None, num_above_positive=None)
        columns = setup.hinge_columns() if options.energy == HINGE else setup.key.shape[0]
        self.column_sums = sums if setup.mutual else running_sums(setup, columns, softmax)
        self.statistics = Statistics(setup, self.row_sums) if stats else None
        if self.statistics is not None and self.statistics.shares_sums:
            self.row_sums = self.statistics.sums
        self.loss = setup.query.new_zeros(setup.count, dtype=setup.acc)
        self.state = empty_state(setup.inputs, options)

    def _shared_candidates(self) -> Iterator[_Candidates]:
        setup, grads = self.setup, self.grads
        options, positives = setup.options, setup.positives
        if options.in_batch:
            by_pair = options.energy == HINGE and options.columns and not positives.in_order and setup.key.shape[0] > 0
            columns = options.columns and not by_pair
            yield _Candidates(
                setup.key, setup.key_norm, tuple(positives.key_labels), options.rows, columns, keys=True,
                gradient=grads.key,
            )  # fmt: skip
            if by_pair:
                at = positives.index
                _, *labels = positives.key_labels
                row_positive, *_ = positives.row_labels
                yield _Candidates(
                    setup.key[at],
                    None if setup.key_norm is None else setup.key_norm[at],
                    (row_positive, *(None if label is None else label[at] for label in labels)),
                    columns=True,
                    pairs=True,
                    gradient=grads.pair_key,
                )
        if setup.bank is not None:
            none = (None,) * len(positives.row_labels)
            yield _Candidates(setup.bank, setup.bank_norm, none, rows=True, gradient=grads.bank)

    def walk(self, sums: bool, gradient: bool) -> None:
        """Processes the row blocks one after another. sums: of rows and columns, with the losses of the rows."""
        setup, query = self.setup, self.setup.query
        columns = sum(candidates.values.shape[0] for candidates in self.candidates)
        weighted = sums and gradient and self._candidates_are_frozen() and self.kernels.has_weighted_sums(query)
        height, needs_products = self.kernels.row_block(setup.count, columns, query, gradient and not weighted)
        if setup.mutual:
            height = min(height, -(-setup.count // (MUTUAL_ROW_BLOCKS * TILE_ROWS)) * TILE_ROWS or 1)
        if needs_products and self.buffer is None:
            self.buffer = query.new_empty(height * columns)
        buffer = self.buffer if needs_products else None
        self.fused = sums and gradient and setup.options.energy == SIGMOID and self.kernels.fuses_sums(query)
        for begin in range(0, setup.count, height):
            rows = slice(begin, min(begin + height, setup.count))
            tiles = [(spec, self._tile(spec, products)) for spec, products in self._tile_specs(rows, buffer)]
            if weighted:
                self._add_weighted(rows, tiles)
                continue
            if sums:
                for spec, tile in tiles:
                    self._add_sums(spec, tile)
            if sums and not self.fused:
                self._finish_rows(rows)
            if gradient:
                for spec, tile in tiles:
                    self._add_gradient(spec, tile)
            if self.fused:
                self._finish_rows(rows)

    def _candidates_are_frozen(self) -> bool:
        """Whether this is a softmax over rows of which only the queries get a gradient, made of probabilities alone."""
        plain = self.row.share is None and self.row.smoothing is None and self.statistics is None
        frozen = all(candidates.gradient is None for candidates in self.candidates)
        softmax = self.setup.options.energy == SOFTMAX and not self.two_pass
        return softmax and plain and frozen and self.grads.query is not None and len(self.candidates) > 0

    def _add_weighted(self, rows: slice, tiles: list[tuple[_TileSpec, Tile]]) -> None:
        """Sums and gradient of rows whose candidates are frozen: the gradient is a sum of candidates weighted by
        probabilities, which are known up to one factor per row."""
        setup, sums = self.setup, _sliced(self.row_sums, rows)
        weighted = setup.query.new_zeros(setup.query[rows].shape, dtype=setup.acc)
        weighted_u = torch.zeros_like(setup.score[rows])
        for _, tile in tiles:
            self.kernels.weighted_sums(tile, sums, weighted, weighted_u)
        self._finish_rows(rows)
        factor = self.row.weight[rows] * (sums.max - self.row.reference[rows]).exp()
        self.grads.dot[rows] += factor * weighted_u
        if setup.query_norm is not None:
            factor = factor * setup.query_norm[rows]
        self.grads.query[rows] += weighted.mul_(factor.unsqueeze(1))

    def _tile_specs(self, rows: slice, buffer: Tensor | None) -> Iterator[tuple[_TileSpec, Tensor | None]]:
        """The tiles of a row block, each with its part of the buffer."""
        begin, height = 0, rows.stop - rows.start
        for candidates in self.candidates:
            every = slice(0, candidates.values.shape[0])
            specs = [_TileSpec(candidates, rows, every, candidates.rows, candidates.columns)]
            if self.setup.mutual:
                later = slice(rows.stop, self.setup.count)
                specs = [
                    _TileSpec(candidates, rows, rows, rows_summed=True, columns_summed=False, twice=True),
                    _TileSpec(candidates, rows, later, rows_summed=True, columns_summed=True),
                ]
            for spec in specs:
                width = spec.columns.stop - spec.columns.start
                if width > 0:
                    end = begin + height * width
                    yield spec, None if buffer is None else buffer[begin:end].view(height, width)
                    begin = end

    def _tile(self, spec: _TileSpec, products: Tensor | None) -> Tile:
        setup, candidates, rows, columns = self.setup, spec.candidates, spec.rows, spec.columns
        labels: list[Tensor | None] = []
        for row, column in zip(setup.positives.row_labels, candidates.labels, strict=True):
            paired = row is not None and column is not None
            labels += [row[rows], column[columns]] if paired else [None, None]
        tile = Tile(
            setup.query[rows],
            candidates.values[columns],
            products,
            None if setup.query_norm is None else setup.query_norm[rows],
            None if candidates.norm is None else candidates.norm[columns],
            setup.inputs.logit_scale,
            setup.inputs.logit_bias,
            setup.options.energy,
            Labels(*labels),
            setup.options.ids_positive,
        )
        self.kernels.begin(tile)
        return tile

    def _add_sums(self, spec: _TileSpec, tile: Tile) -> None:
        setup, statistics, rows, columns = self.setup, self.statistics, spec.rows, spec.columns
        thresholds = Thresholds(
            None if setup.row_threshold is None else setup.row_threshold[rows],
            None if setup.column_threshold is None else setup.column_threshold[columns],
            None if statistics is None else statistics.above_positive[rows],
        )
        norms = None
        if statistics is not None and spec.candidates.keys:
            query_norm, key_norm = statistics.cosine_norms
            norms = (query_norm[rows], key_norm[columns])

        def row_sums(sums: RowSums) -> RowSums:
            part = _sliced(sums, rows)
            return part if norms is not None else part._replace(uniformity_sum=None)

        by_row = row_sums(self.row_sums) if spec.rows_summed and not self.fused else None
        by_column = _sliced(self.column_sums, columns) if spec.columns_summed else None
        if by_row is not None or by_column is not None:
            self.kernels.sums(tile, by_row, by_column, thresholds, norms)
        if statistics is not None and not statistics.shares_sums and not spec.candidates.pairs:
            thresholds = thresholds._replace(row=None, column=None)
            self.kernels.sums(tile._replace(energy=SOFTMAX), row_sums(statistics.sums), None, thresholds, norms)

    def _add_gradient(self, spec: _TileSpec, tile: Tile) -> None:
        grads, candidates, rows, columns = self.grads, spec.candidates, spec.rows, spec.columns
        row = _sliced(self.row, rows) if candidates.rows else SideGrad()
        column = _sliced(self.column, columns) if candidates.columns else SideGrad()
        if self.setup.mutual:
            column = _sliced(self.row, columns)
        outputs = GradientOutputs(
            dot=torch.zeros_like(grads.dot[rows]) if spec.twice else grads.dot[rows],
            total=grads.total[rows],
            queries=None if grads.query is None else grads.query[rows],
            candidates=None if candidates.gradient is None or spec.twice else candidates.gradient[columns],
            row_sums=_sliced(self.row_sums, rows) if self.fused else None,
        )
        self.kernels.add_gradients(tile, row, column, outputs)
        if spec.twice:
            grads.dot[rows].add_(outputs.dot, alpha=0.5)

    def _finish_rows(self, rows: slice) -> None:
        """The losses of rows whose sums are complete, and what their gradient needs."""
        setup, options = self.setup, self.setup.options
        if not options.rows:
            return
        sums = _sliced(self.row_sums, rows)
        score, counted = setup.score[rows], setup.positives.counted[rows]
        if options.energy == SOFTMAX:
            others = log_sum(sums).to(setup.acc)
            negatives = self._add_negatives(rows, torch.where(counted, torch.logaddexp(others, score), others))
            if negatives is not None:
                others = torch.logaddexp(others, torch.logsumexp(negatives.scores, 1))
            self.state.row_others[rows] = others
            counts = (setup.positives.row_positives[rows], setup.row_candidates[rows])
            negative_scores = None if negatives is None else negatives.scores
            loss = softmax_loss(setup, others, score, sums, *counts, negative_scores)
            self._finish_row_side(rows)
        else:
            negatives = self._add_negatives(rows, None if setup.row_threshold is None else setup.row_threshold[rows])
            loss = sums.sum.to(setup.acc)
            if negatives is not None:
                loss = loss + negatives.value
            if options.energy == SIGMOID:
                loss = loss + torch.where(counted, -F.logsigmoid(score), 0)
            if setup.wants_gradients:
                slope = torch.where(counted, torch.sigmoid(-score), 0) if options.energy == SIGMOID else sums.active
                self.grads.positive_score[rows] -= (self.row.weight[rows] * slope).to(setup.acc)
        if negatives is not None and self.statistics is not None:
            self.statistics.add_negatives(rows, negatives.scores)
        self.loss[rows] += setup.half * torch.where(setup.has_loss[rows], loss, 0)

    def _add_negatives(self, rows: slice, reference: Tensor | None, final: bool = False) -> NegativeOutputs | None:
        """The per-query negatives of the rows: accumulates their gradients."""
        setup, grads, inputs = self.setup, self.grads, self.setup.inputs
        if setup.negatives is None:
            return None
        weight = self.row.weight[rows] if setup.wants_gradients else None
        count = rows.stop - rows.start
        nothing = setup.score.new_empty(0)
        value = setup.score.new_empty(count)
        outputs = NegativeOutputs(
            scores=setup.score.new_empty(count, setup.negatives.shape[1]),
            value=value,
            grad_query=nothing if grads.query_of_negatives is None else grads.query_of_negatives[rows],
            grad_negatives=nothing if grads.negatives is None else grads.negatives[rows],
            grad_scale=nothing if weight is None else torch.empty_like(value),
            grad_bias=nothing if weight is None else torch.empty_like(value),
        )
        operands = NegativeInputs(
            inputs.query[rows].to(setup.negatives.dtype),
            setup.negatives[rows],
            None if inputs.negatives_mask is None else inputs.negatives_mask[rows],
            None if setup.query_norm is None else setup.query_norm[rows],
            inputs.logit_scale,
            inputs.logit_bias,
        )
        smoothing = None if self.row.smoothing is None else self.row.smoothing[rows]
        query_negatives_(operands, RowMerge(setup.options.energy, reference, weight, smoothing, final), outputs)
        if weight is not None:
            grads.dot[rows] += outputs.grad_scale
            grads.total[rows] += outputs.grad_bias
            if setup.options.energy == HINGE:
                grads.positive_score[rows] -= outputs.grad_bias
        return outputs

    def finish_columns(self) -> None:
        """The losses of the column direction, whose sums are complete after the last row block."""
        setup, sums, score = self.setup, self.column_sums, self.setup.score
        positives = setup.positives
        if setup.options.energy == HINGE:
            loss = sums.sum[: setup.count].to(setup.acc)
            if setup.wants_gradients:
                self.grads.positive_score -= (setup.weight * sums.active[: setup.count]).to(setup.acc)
        else:
            lse, others = positives.log_sum_exp(log_sum(sums).to(setup.acc), score)
            self.state.column_lse.copy_(lse)
            self.state.column_others.copy_(others)
            wide = score.double().masked_fill(~positives.has, 0)

            def without_own_pair(values: Tensor | None) -> Tensor | None:
                """Sums over the column of each row, without its own pair but with the positives of other rows."""
                return None if values is None else positives.gather(positives.scatter_add(wide, values.clone())) - score

            others_sums = sums._replace(
                score_sum=without_own_pair(sums.score_sum), positive_sum=without_own_pair(sums.positive_sum)
            )
            counts = (positives.gather(n) for n in (positives.column_positives, positives.column_candidates))
            loss = softmax_loss(setup, others, score, others_sums, *counts)
            self._finish_column_side()
        self.loss += setup.half * torch.where(setup.has_loss, loss, 0)

    def restore(self, state: PairState) -> None:
        """Uses the state of a forward in place of sums."""
        setup = self.setup
        self.state = state
        if setup.options.rows:
            every = slice(0, setup.count)
            lse = torch.logaddexp(state.row_others, setup.score)
            self._add_negatives(every, torch.where(setup.positives.counted, lse, state.row_others), final=True)
            self._finish_row_side(every)
        if setup.options.columns:
            self._finish_column_side()

    def _finish_row_side(self, rows: slice) -> None:
        """The references of softmax rows and the gradient of their positives' scores."""
        setup = self.setup
        if not setup.wants_gradients:
            return
        others, score = self.state.row_others[rows], setup.score[rows]
        if self.row.reference is None:
            self.row = self.row._replace(reference=torch.empty_like(setup.score))
        # In a row without a positive every exponential is 0.
        reference = torch.logaddexp(others, score).masked_fill(~setup.positives.counted[rows], float("inf"))
        self.row.reference[rows] = reference
        self.grads.positive_score[rows] += softmax_slope(setup, _sliced(self.row, rows), others, score)

    def _finish_column_side(self) -> None:
        """The same for columns, where a key may be the positive of several rows."""
        setup, positives, state = self.setup, self.setup.positives, self.state
        if not setup.wants_gradients:
            return
        self.column = self.column._replace(
            reference=state.column_lse.masked_fill(positives.rows_of_key == 0, float("inf"))
        )
        # gather() returns an arbitrary key's value for a row without a positive; mask it.
        by_row = SideGrad(
            *(None if v is None else torch.where(positives.counted, positives.gather(v), 0) for v in self.column)
        )
        slope = softmax_slope(setup, by_row._replace(weight=setup.weight), state.column_others, setup.score)
        of_other_rows = by_row.weight - setup.weight
        probability = (setup.score - positives.gather(state.column_lse)).exp()
        self.grads.positive_score += slope + torch.where(of_other_rows != 0, of_other_rows * probability, 0)


def _sliced(record: Record, at: slice) -> Record:
    """A record of views of its tensors."""
    return type(record)(*(None if v is None else v[at] for v in record))
