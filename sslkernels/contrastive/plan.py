"""The contrastive energies over tiles of pair scores: the plan of every backend.

The products of a tile, some queries with some shared candidates (the keys, the bank), fit a buffer that is reused. For
sigmoid and hinge, and for a softmax over rows, a row block with all its candidates gives sums and then, from the same
products, the gradient: three matmuls in all, two where the candidates are frozen. A softmax over columns needs the sums
of all tiles before the first gradient. If the products of all tiles fit the workspace, they are kept; else they are
computed a second time, four matmuls in all, except for the last tile, where the second pass begins. If one tile holds
all scores, its gradient times the features is written, not added.

Where the queries are the keys and positives are mutual, scores are symmetric: a row block computes the columns from its
own first row on, each product stands for two, and the gradient matrix is G + G^T: two matmuls in all, or one and a half
if the products are kept.

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

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from sslkernels.contrastive.gradients import FeatureGradients
from sslkernels.contrastive.pair_rows import (
    HINGE,
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    LossOptions,
    LossOutputs,
    LossRows,
    SideGrad,
    log_sum,
    settled,
    softmax_loss,
    softmax_slope,
)
from sslkernels.contrastive.pair_setup import PairSetup
from sslkernels.contrastive.query_negatives import (
    NegativeInputs,
    NegativeOutputs,
    RowMerge,
    query_negatives_,
)
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
    GradientOutputs,
    PairKernels,
    RowSums,
    Thresholds,
    Tile,
    add_scores,
)
from sslkernels.contrastive.statistics import Statistics, running_sums
from sslkernels.contrastive.steps import Candidates, Steps, TileSpec, at, is_one_tile, length, shared_candidates

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
    setup = PairSetup(kernels, inputs, options, coefficient, any(wanted), stats)
    plan = Plan(kernels, setup, wanted, stats)
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
    plan = Plan(kernels, PairSetup(kernels, inputs, options, grad_loss, any(wanted)), wanted, stats=False)
    if options.energy == SOFTMAX:
        plan.restore(state)
        plan.walk(sums=False, gradient=True)
    else:
        plan.walk(sums=True, gradient=True)
        if options.columns:
            plan.finish_columns()
    return plan.grads.results()


class Plan:
    """Walks over the steps and accumulates losses, statistics and gradients."""

    def __init__(self, kernels: PairKernels, setup: PairSetup, wanted: PairWanted, stats: bool) -> None:
        self.kernels = kernels
        self.setup = setup
        options = setup.options
        self.row, self.column = setup.row, setup.column
        self.two_pass = options.energy == SOFTMAX and (options.columns or setup.mutual)
        self.fused = False
        one_tile = self._is_one_tile(stats)
        self.grads = self._gradients(wanted, one_tile)
        self.steps = Steps(kernels, setup, list(self._candidates(stats)), one_tile)

        softmax = options.energy == SOFTMAX
        sums = running_sums(setup, setup.count, softmax)
        self.row_sums = RowSums(*sums, uniformity_sum=None, num_above_positive=None, num_equal_positive=None)
        columns = setup.hinge_columns() if options.energy == HINGE else setup.keys
        self.column_sums = sums if setup.mutual else running_sums(setup, columns, softmax)
        self.statistics = Statistics(kernels, setup, self.row_sums) if stats else None
        if self.statistics is not None and self.statistics.shares_sums:
            self.row_sums = self.statistics.sums
        self.loss = setup.query.new_zeros(setup.count, dtype=setup.acc)
        self.state = self._empty_state()

    def _is_one_tile(self, stats: bool) -> bool:
        return is_one_tile(self.kernels, self.setup, whole_rows=stats or not self.two_pass)

    def _gradients(self, wanted: PairWanted, one_product: bool) -> FeatureGradients:
        return FeatureGradients(self.kernels, self.setup, wanted, one_product)

    def _candidates(self, stats: bool) -> Iterable[Candidates]:
        return shared_candidates(self.setup, self.grads, stats)

    def _empty_state(self) -> PairState:
        return empty_state(self.setup.inputs, self.setup.options)

    def walk(self, sums: bool, gradient: bool) -> None:
        """Processes the steps in order. sums: computes the sums of rows and columns, and the losses of complete rows;
        gradient: adds the gradients. Gradients alone run backwards: the last products are still in memory."""
        setup, query = self.setup, self.setup.query
        weighted = sums and gradient and self._candidates_are_frozen() and self.kernels.has_weighted_sums(query)
        # Statistics compare the scores of a row with its positive's, which is in one of its tiles.
        whole_rows = (sums and gradient) or self.statistics is not None
        steps = self.steps.lay_out(gradient and not weighted, whole_rows)
        self.fused = sums and gradient and setup.options.energy == SIGMOID and self.kernels.fuses_sums(query)
        for step in steps if sums else reversed(steps):
            self.steps.begin(step)
            if weighted:
                self._add_weighted(step.rows, step.tiles)
                continue
            if sums:
                for spec, tile in step.tiles:
                    self._add_sums(spec, tile)
            if sums and step.ends_rows and not self.fused:
                self._finish_rows(step.rows)
            if gradient:
                for spec, tile in step.tiles:
                    if spec.candidates.in_loss:
                        self._add_gradient(spec, tile)
            if self.fused:
                self._finish_rows(step.rows)

    def _candidates_are_frozen(self) -> bool:
        """Whether this is a softmax over rows of which only the queries get a gradient, made of probabilities alone."""
        plain = self.row.share is None and self.row.smoothing is None and self.statistics is None
        frozen = all(candidates.gradient is None for candidates in self.steps.candidates)
        softmax = self.setup.options.energy == SOFTMAX and not self.two_pass
        return softmax and plain and frozen and self.grads.query is not None and len(self.steps.candidates) > 0

    def _add_weighted(self, rows: slice, tiles: list[tuple[TileSpec, Tile]]) -> None:
        """Sums and gradient of rows whose candidates are frozen: the gradient is a sum of candidates weighted by
        probabilities, whose common factor per row is known only after the last tile."""
        setup, sums = self.setup, _sliced(self.row_sums, rows)
        weighted = setup.query.new_zeros(setup.query[rows].shape, dtype=setup.acc)
        weighted_u = torch.zeros_like(setup.score[rows])
        for _, tile in tiles:
            self.kernels.weighted_sums(tile, sums, weighted, weighted_u)
        shift = sums.max.clone()  # per-query negatives may raise it
        self._finish_rows(rows)
        factor = self.row.weight[rows] * (shift - self.row.reference[rows]).exp()
        self.grads.dot[rows] += factor * weighted_u
        if setup.query_norm is not None:
            factor = factor * setup.query_norm[rows]
        self.grads.query[rows] += weighted.mul_(factor.unsqueeze(1))

    def _add_sums(self, spec: TileSpec, tile: Tile) -> None:
        setup, statistics, rows, columns = self.setup, self.statistics, spec.rows, spec.among_all
        thresholds = Thresholds(
            at(setup.row_threshold, rows),
            at(setup.column_threshold, columns),
            None if statistics is None else at(statistics.positive_score, rows),
        )
        norms = None
        if statistics is not None and spec.candidates.keys:
            query_norm, key_norm = statistics.cosine_norms
            norms = (at(query_norm, rows), at(key_norm, columns))
            positive = at(statistics.positive_index, rows) - columns.start
            self.kernels.positives_in_tile(tile, positive, thresholds.positive_score)
            if not spec.candidates.in_loss or tile.has_exclusions:  # uniformity is over all pairs
                all_pairs = tile.with_all_pairs
                no_thresholds = Thresholds(None, None, None)
                self.kernels.sums(all_pairs, _sliced(statistics.uniformity_sums, rows), None, no_thresholds, norms)
                norms = None

        def row_sums(sums: RowSums) -> RowSums:
            part = _sliced(sums, rows)
            return part if norms is not None or part.uniformity_sum is None else part._replace(uniformity_sum=None)

        by_row = row_sums(self.row_sums) if spec.rows_summed and not self.fused else None
        by_column = _sliced(self.column_sums, columns) if spec.columns_summed else None
        if by_row is not None or by_column is not None:
            self.kernels.sums(tile, by_row, by_column, thresholds, norms)
        # The columns of a hinge over shared positives are pairs; the statistics of a row are over the keys themselves.
        ranked = (
            setup.options.in_batch if spec.candidates.keys else spec.candidates.in_loss and not spec.candidates.pairs
        )
        if statistics is not None and not statistics.shares_sums and ranked:
            thresholds = thresholds._replace(row=None, column=None)
            self.kernels.sums(tile._replace(energy=SOFTMAX), row_sums(statistics.sums), None, thresholds, norms)

    def _add_gradient(self, spec: TileSpec, tile: Tile) -> None:
        grads, candidates, rows, columns = self.grads, spec.candidates, spec.rows, spec.among_all
        row = _sliced(self.row, rows) if candidates.rows else SideGrad()
        column = _sliced(self.column, columns) if candidates.columns else SideGrad()
        if self.setup.mutual:
            column = _sliced(self.row, columns)
        outputs = GradientOutputs(
            dot=torch.zeros_like(grads.dot[rows]) if spec.twice else at(grads.dot, rows),
            total=at(grads.total, rows),
            queries=at(grads.query, rows),
            candidates=None if spec.twice else at(candidates.gradient, spec.columns),
            row_sums=_sliced(self.row_sums, rows) if self.fused else None,
        )
        self.kernels.add_gradients(tile, row, column, outputs, grads.one_product)
        if spec.twice:
            grads.dot[rows].add_(outputs.dot, alpha=0.5)

    def _finish_rows(self, rows: slice) -> None:
        """The losses of rows whose sums are complete, and what their gradient needs."""
        setup = self.setup
        if not setup.options.rows:
            return
        if setup.negatives is not None:
            self._merge_negatives(rows)
        others = at(self.state.row_others, rows) if setup.options.energy == SOFTMAX else None
        self._add_row_losses(rows, _sliced(self.row_sums, rows).without_statistics, others, at(self.loss, rows))

    def _add_row_losses(self, rows: slice, sums: ColumnSums, others: Tensor | None, loss: Tensor | None) -> None:
        setup, positives = self.setup, self.setup.positives
        if setup.options.energy == SOFTMAX and setup.wants_gradients and self.row.reference is None:
            self.row = _unsettled(setup.row, setup.count)
        self._add_losses(
            LossRows(
                sums,
                at(setup.score, rows),
                at(setup.positive_u, rows),
                at(setup.inputs.positive, rows),
                at(positives.row_positives, rows) if setup.options.ids_positive else None,
                at(setup.row_candidates, rows) if setup.options.label_smoothing > 0 else None,
                _sliced(setup.row, rows),
            ),
            rows,
            others,
            _sliced(self.row, rows),
            loss,
        )

    def _add_losses(
        self, loss_rows: LossRows, rows: slice, others: Tensor | None, side: SideGrad, loss: Tensor | None
    ) -> None:
        """side: of a softmax, the part in the gradient of its tiles whose reference and weight are written."""
        grads, softmax = self.grads, self.setup.options.energy == SOFTMAX
        self.kernels.add_losses(
            loss_rows,
            self._loss_options(),
            LossOutputs(
                others,
                side.reference if softmax else None,
                side.weight if softmax else None,
                loss,
                at(grads.positive_score, rows),
                at(grads.dot, rows),
                at(grads.total, rows),
            ),
        )

    def _loss_options(self) -> LossOptions:
        options = self.setup.options
        return LossOptions(options.energy, self.setup.half, options.label_smoothing, options.ids_positive)

    def _merge_negatives(self, rows: slice) -> None:
        """Adds the per-query negatives of the rows to their sums."""
        setup, sums = self.setup, _sliced(self.row_sums, rows)
        reference = None if setup.row_threshold is None else at(setup.row_threshold, rows).double()
        softmax = setup.options.energy == SOFTMAX
        if softmax:
            score, counted = at(setup.score, rows).double(), at(setup.positives.counted, rows)
            others = log_sum(sums.without_statistics)
            reference = torch.where(counted, torch.logaddexp(others, score), others)
        negatives = self._add_negatives(rows, reference)
        if softmax:
            add_scores(sums.without_statistics, negatives.scores)
        else:
            sums.sum.add_(negatives.value)
        if self.statistics is not None:
            self.statistics.add_negatives(rows, negatives.scores, self._positives_as_negatives(rows))

    def _positives_as_negatives(self, rows: slice) -> Tensor:
        """The scores (rows, 1) of the positives, rounded as the per-query negatives are; -inf without a positive."""
        setup, positives = self.setup, self.setup.positives
        count, nothing = length(rows), setup.score.new_empty(0)
        scores, value = setup.score.new_empty(count, 1), setup.score.new_empty(count, dtype=torch.float64)
        negatives = setup.positives_as_negatives(rows)
        if negatives is None:
            return scores.fill_(float("-inf"))
        outputs = NegativeOutputs(scores, value, nothing, nothing, nothing, nothing)
        merge = RowMerge(SIGMOID, None, None, None, False)
        self._score_negatives(rows, negatives, at(positives.has, rows).unsqueeze(1), merge, outputs)
        return scores

    def _score_negatives(
        self, rows: slice, negatives: Tensor, mask: Tensor | None, merge: RowMerge, outputs: NegativeOutputs
    ) -> None:
        """negatives: per-query negatives of the rows, or their indices."""
        setup, inputs = self.setup, self.setup.inputs
        key, bank = setup.drawn_from
        norm = None if setup.query_norm is None else setup.query_norm[rows]
        if negatives.is_floating_point():
            features = inputs.query[rows].to(negatives.dtype), negatives, None, None
        else:
            features = setup.query[rows], key, negatives, bank
        query_negatives_(NegativeInputs(*features, mask, norm, inputs.logit_scale, inputs.logit_bias), merge, outputs)

    def _add_negatives(self, rows: slice, reference: Tensor | None, final: bool = False) -> NegativeOutputs:
        """The per-query negatives of the rows: accumulates their gradients."""
        setup, grads, inputs = self.setup, self.grads, self.setup.inputs
        weight = setup.row.weight[rows] if setup.wants_gradients else None
        count = rows.stop - rows.start
        nothing = setup.score.new_empty(0)
        outputs = NegativeOutputs(
            scores=setup.score.new_empty(count, setup.negatives.shape[1]),
            value=setup.score.new_empty(count, dtype=torch.float64),
            grad_query=nothing if grads.query_of_negatives is None else grads.query_of_negatives[rows],
            grad_negatives=nothing if grads.negatives is None else grads.negatives[rows],
            grad_scale=nothing if weight is None else setup.score.new_empty(count),
            grad_bias=nothing if weight is None else setup.score.new_empty(count),
        )
        mask = None if inputs.negatives_mask is None else inputs.negatives_mask[rows]
        smoothing = None if self.row.smoothing is None else self.row.smoothing[rows]
        merge = RowMerge(setup.options.energy, reference, weight, smoothing, final)
        self._score_negatives(rows, setup.negatives[rows], mask, merge, outputs)
        if weight is not None:
            grads.dot[rows] += outputs.grad_scale
            grads.total[rows] += outputs.grad_bias
            if setup.options.energy == HINGE:
                slope = -outputs.grad_bias
                grads.positive_score[rows] += slope
                grads.dot[rows] += torch.where(slope != 0, slope * setup.positive_u[rows], 0)
        return outputs

    def finish_columns(self) -> None:
        """The losses of the column direction, whose sums are complete after the last row block."""
        setup, sums = self.setup, self.column_sums
        every, positives = slice(0, setup.count), setup.positives
        if setup.options.energy == HINGE:  # a column per pair
            side = SideGrad(weight=setup.weight) if setup.wants_gradients else SideGrad()
            columns = LossRows(sums, setup.score, setup.positive_u, setup.inputs.positive, None, None, side)
            self._add_losses(columns, every, None, SideGrad(), self.loss)
        elif positives.in_order:
            self._add_column_losses(sums, self.state.column_others, self.loss)
        else:
            self._add_shared_columns()

    def _add_column_losses(self, sums: ColumnSums, others: Tensor | None, loss: Tensor | None) -> None:
        """The columns of keys that are the positives of rows in order."""
        setup, positives = self.setup, self.setup.positives
        if setup.options.energy == SOFTMAX and setup.wants_gradients:
            self.column = _unsettled(setup.column, setup.keys)
        columns = LossRows(
            sums,
            setup.score,
            setup.positive_u,
            None,
            positives.column_positives if setup.options.ids_positive else None,
            positives.column_candidates if setup.options.label_smoothing > 0 else None,
            setup.column,
        )
        self._add_losses(columns, slice(0, setup.count), others, self.column, loss)

    def _add_shared_columns(self) -> None:
        """The columns of keys that may be the positives of several rows, each of which is a candidate of the others."""
        setup, sums, score, positives = self.setup, self.column_sums, self.setup.pair_score, self.setup.pairs
        lse, others = positives.log_sum_exp(log_sum(sums), score.double())
        self.state.column_lse.copy_(lse.masked_fill(positives.rows_of_key == 0, float("inf")))
        self.state.column_others.copy_(others)
        wide = score.double().masked_fill(~positives.has, 0)

        def without_own_pair(values: Tensor | None) -> Tensor | None:
            """Sums over the column of each row, without its own pair but with the positives of other rows."""
            return None if values is None else positives.gather(positives.scatter_add(wide, values.clone())) - score

        others_sums = sums._replace(
            score_sum=without_own_pair(sums.score_sum), positive_sum=without_own_pair(sums.positive_sum)
        )
        counts = (positives.gather(n) for n in (positives.column_positives, positives.column_candidates))
        columns = LossRows(others_sums, score, score, positives.positive, *counts, SideGrad())
        loss = softmax_loss(columns, self._loss_options(), others)
        self.loss += setup.half * torch.where(positives.counted, loss, 0)[setup.own]
        self._finish_shared_columns()

    def _finish_shared_columns(self) -> None:
        setup, positives, state = self.setup, self.setup.pairs, self.state
        if not setup.wants_gradients:
            return
        # gather() returns an arbitrary key's value for a row without a positive; mask it.
        by_row = SideGrad(
            *(None if v is None else torch.where(positives.counted, positives.gather(v), 0) for v in setup.column)
        )
        reference = state.column_lse.to(setup.acc)
        weight = settled(setup.column.weight, reference, state.column_lse)
        self.column = setup.column._replace(reference=reference, weight=weight)
        slope = softmax_slope(
            by_row._replace(weight=setup.pair_weight), self._loss_options(), state.column_others, setup.pair_score
        )
        of_other_rows = by_row.weight - setup.pair_weight
        probability = (setup.pair_score - positives.gather(state.column_lse)).exp().to(setup.acc)
        slope = slope + torch.where(of_other_rows != 0, of_other_rows * probability, 0)
        slope = slope[setup.own]
        self.grads.positive_score += slope
        self.grads.dot += torch.where(slope != 0, slope * setup.positive_u, 0)

    def restore(self, state: PairState) -> None:
        """Uses the state of a forward in place of sums."""
        setup = self.setup
        self.state = state
        if setup.options.rows:
            every = slice(0, setup.count)
            if setup.negatives is not None:
                lse = torch.logaddexp(state.row_others, setup.score.double())
                self._add_negatives(every, torch.where(setup.positives.counted, lse, state.row_others), final=True)
            self._add_row_losses(every, sums_of(state.row_others, setup.acc), None, None)
        if setup.options.columns and setup.positives.in_order:
            self._add_column_losses(sums_of(state.column_others, setup.acc), None, None)
        elif setup.options.columns:
            self._finish_shared_columns()


def sums_of(others: Tensor, acc: torch.dtype) -> ColumnSums:
    """Sums whose log-sum-exp is `others`, float64."""
    largest = others.to(acc)
    return ColumnSums(largest, torch.where(largest == others, 0, others - largest).exp(), None, None, None)


def _unsettled(side: SideGrad, count: int) -> SideGrad:
    """The part of `count` rows or columns in the gradient, whose reference and weight are yet to be written."""
    return side._replace(reference=side.weight.new_empty(count), weight=side.weight.new_empty(count))


def _sliced(record: Record, part: slice) -> Record:
    """A record of views of its tensors; the record itself if they have no more rows."""
    for values in record:
        if values is not None:  # all have as many rows
            if values.shape[0] == part.stop - part.start:
                return record
            break
    return type(record)(*(at(values, part) for values in record))
