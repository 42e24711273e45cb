"""The contrastive energies over tiles of pair scores: the plan of every backend.

Queries are taken in strips of rows. A strip's products with every shared candidate (the keys, the bank) fit a buffer
that is reused; nothing of the size queries x keys lives. For sigmoid and hinge, and for a softmax over rows, one strip
gives sums and then, from the same products, the gradient: three matmuls in all, two where the candidates are frozen. A
softmax over columns needs the sums of all strips before the first gradient, and the products a second time: four.

Where the queries are the keys and designate each other, scores are symmetric: a strip computes the columns from its own
first row on, each product stands for two, and the gradient matrix is G + G^T: two matmuls in all.

For query i with designated key j = positive[i] and scores s over its candidates,

    softmax: (1 - e) * (lse_i - mean_{p in P_i} s_ip) + e * (lse_i - mean_c s_ic)      e = label_smoothing
    sigmoid: softplus(-s_ij) + sum of softplus(s) over negatives (of softplus(-s) over further positives)
    hinge:   sum of max(0, margin + s - s_ij) over negatives

with P_i the designated pair and the further positives. The column direction is the same over the queries of key j. The
designated pair never enters a tile: its score, loss and gradient are computed from the two rows in the accumulation
dtype, so that a confident pair keeps them in half precision too.

The gradient of a feature is accumulated as if u were the product of the features as they are: with r = 1 / norm, what
is accumulated is r times the gradient of the normalised feature, of which the gradient is what is left without its part
along x. No normalised copy of the features exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive.gradients import FeatureGradients
from sslkernels.contrastive.pair_setup import Problem, inverse_norm
from sslkernels.contrastive.query_negatives import own_negatives_
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
    Labels,
    PairKernels,
    RowSums,
    Side,
    Thresholds,
    Tile,
)

# Strips of a symmetric score matrix, whose products serve two rows each but in the blocks on the diagonal.
MUTUAL_STRIPS = 16
TILE_ROWS = 128


def forward(
    kernels: PairKernels,
    inputs: PairInputs,
    options: PairOptions,
    coefficient: Tensor | None,
    compute_dtype: torch.dtype,
    wanted: PairWanted,
    stats: bool,
) -> tuple[Tensor, PairState, PairStatistics, PairGradients]:
    """Losses and statistics, and the gradients of sum(coefficient * loss) where they are wanted."""
    plan = _Plan(kernels, inputs, options, coefficient, compute_dtype, wanted, stats)
    plan.walk(sums=True, gradient=plan.wants_gradients and not plan.two_pass)
    if options.columns:
        plan.finish_columns()
    if plan.wants_gradients and plan.two_pass:
        plan.walk(sums=False, gradient=True)
    return plan.loss, plan.state, plan.statistics(), plan.grads.results()


def backward(
    kernels: PairKernels,
    inputs: PairInputs,
    options: PairOptions,
    grad_loss: Tensor,
    state: PairState,
    compute_dtype: torch.dtype,
    wanted: PairWanted,
) -> PairGradients:
    """The gradients of sum(grad_loss * loss), from products computed again."""
    plan = _Plan(kernels, inputs, options, grad_loss, compute_dtype, wanted, False)
    if options.energy == SOFTMAX:
        plan.restore(state)
        plan.walk(sums=False, gradient=True)
    else:
        plan.walk(sums=True, gradient=True)
        if options.columns:
            plan.finish_columns()
    return plan.grads.results()


class _Block(NamedTuple):
    """Candidates that all queries share: their features, inverse norms, labels; whether a row's candidates and a
    column's queries are summed; whether they are the keys (`spread`), or a column for each pair (`pairs`); where their
    gradient accumulates."""

    values: Tensor
    norm: Tensor | None
    labels: tuple[Tensor | None, Tensor | None, Tensor | None]
    rows: bool
    columns: bool
    spread: bool
    pairs: bool
    gradient: Tensor | None


class _Piece(NamedTuple):
    """The columns of a block that a strip computes, and what is summed over them. twice: the tile holds each pair of
    the strip's rows in both orders."""

    block: _Block
    columns: slice
    rows_summed: bool
    columns_summed: bool
    twice: bool


class _Plan(Problem):
    """The walk over the strips of a problem, and what it adds up."""

    def __init__(
        self,
        kernels: PairKernels,
        inputs: PairInputs,
        options: PairOptions,
        coefficient: Tensor | None,
        compute_dtype: torch.dtype,
        wanted: PairWanted,
        stats: bool,
    ) -> None:
        super().__init__(inputs, options, coefficient, compute_dtype, any(wanted))
        self.kernels = kernels
        self.stats = stats
        self.two_pass = options.energy == SOFTMAX and (options.columns or self.mutual)
        self.grads = FeatureGradients(self, wanted)
        self.buffer: Tensor | None = None
        self._make_blocks()
        self._allocate_sums()

    def _make_blocks(self) -> None:
        options, pairs = self.options, self.designated
        self.blocks: list[_Block] = []
        if options.in_batch:
            gathers = options.energy == HINGE and options.columns and not pairs.in_order and self.key.shape[0] > 0
            labels = tuple(pairs.key_labels)
            columns = options.columns and not gathers
            self.blocks.append(
                _Block(self.key, self.key_norm, labels, options.rows, columns, True, False, self.grads.key)
            )
            if gathers:
                norm, *others = (None if v is None else v[pairs.index] for v in (self.key_norm, *labels[1:]))
                labels = (pairs.row_labels[0], *others)
                self.blocks.append(
                    _Block(self.key[pairs.index], norm, labels, False, True, False, True, self.grads.pair_key)
                )
        if self.bank is not None:
            none = (None, None, None)
            self.blocks.append(_Block(self.bank, self.bank_norm, none, True, False, False, False, self.grads.bank))

    def _allocate_sums(self) -> None:
        options = self.options
        softmax, hinge = options.energy == SOFTMAX, options.energy == HINGE

        def zeros(count: int, needed: bool = True) -> Tensor | None:
            return self.query.new_zeros(count, dtype=torch.float64) if needed else None

        def sums(count: int, softmax: bool) -> tuple[Tensor | None, ...]:
            lowest = self.query.new_full((count,), float("-inf"), dtype=self.acc) if softmax else None
            smooth, further = options.label_smoothing > 0, softmax and options.ids_positive
            return (
                lowest,
                zeros(count),
                zeros(count, not softmax and hinge),
                zeros(count, smooth),
                zeros(count, further),
            )

        n = self.count
        self.row_sums = RowSums(*sums(n, softmax), None, None)
        columns = self.hinge_columns() if hinge else self.key.shape[0]
        self.column_sums = ColumnSums(*(self.row_sums[:5] if self.mutual else sums(columns, softmax)))
        self.statistic_sums = None
        if self.stats:
            # Of all candidates as a softmax over rows has them, whatever the loss.
            counting = (zeros(n), self.query.new_zeros(n, dtype=torch.int64))
            shared = softmax and options.rows
            self.statistic_sums = RowSums(*(self.row_sums[:5] if shared else sums(n, True)), *counting)
            if shared:
                self.row_sums = self.statistic_sums
            self.own_lse = self.query.new_full((n,), float("-inf"), dtype=self.acc)
            self.cosine_norms = (self.query_norm, self.key_norm)
            if not options.normalize:
                self.cosine_norms = tuple(inverse_norm(values, self.acc) for values in (self.query, self.key))
            self.beating_score = self.score + self._rounding_of_scores()
        self.loss = self.query.new_zeros(n, dtype=self.acc)
        self.state = empty_state(self.inputs, options)

    def _rounding_of_scores(self) -> Tensor:
        """By how much the score of a tile may exceed that of the designated pair for the same features."""
        sizes = torch.ones_like(self.score)
        if not self.options.normalize:
            sizes = 1 / (self.cosine_norms[0] * self.designated.of_columns(self.cosine_norms[1]))
        rounding = 8 * torch.finfo(self.acc).eps * sizes
        if self.dtype.itemsize == 2:  # of the products themselves
            rounding = rounding + torch.finfo(self.dtype).eps * self.positive_u.abs()
        return self.inputs.logit_scale.abs() * rounding + torch.finfo(self.acc).eps * self.score.abs()

    def walk(self, sums: bool, gradient: bool) -> None:
        """Takes the strips one after the other. sums: of rows and columns, with the losses of the rows."""
        columns = sum(block.values.shape[0] for block in self.blocks)
        weighs = sums and gradient and self._candidates_are_frozen() and self.kernels.weighs(self.query)
        strip, needs_products = self.kernels.strip_rows(self.count, columns, self.query, gradient and not weighs)
        if self.mutual:
            strip = min(strip, -(-self.count // (MUTUAL_STRIPS * TILE_ROWS)) * TILE_ROWS or 1)
        if needs_products and self.buffer is None:
            self.buffer = self.query.new_empty(strip * columns)
        buffer = self.buffer if needs_products else None
        self.fused = sums and gradient and self.options.energy == SIGMOID and self.kernels.fuses_sums(self.query)
        for begin in range(0, self.count, strip):
            rows = slice(begin, min(begin + strip, self.count))
            tiles = [(piece, self._tile(rows, piece, products)) for piece, products in self._pieces(rows, buffer)]
            if weighs:
                self._walk_frozen(rows, tiles)
                continue
            if sums:
                for piece, tile in tiles:
                    self._add_sums(rows, piece, tile)
            if sums and not self.fused:
                self._finish_rows(rows)
            if gradient:
                for piece, tile in tiles:
                    self._add_gradient(rows, piece, tile)
            if self.fused:
                self._finish_rows(rows)

    def _candidates_are_frozen(self) -> bool:
        """A softmax over rows whose queries alone get a gradient, and nothing of it but probabilities."""
        plain = self.row.share is None and self.row.smoothing is None and not self.stats
        frozen = all(block.gradient is None for block in self.blocks)
        softmax = self.options.energy == SOFTMAX and not self.two_pass
        return softmax and plain and frozen and self.grads.query is not None and len(self.blocks) > 0

    def _walk_frozen(self, rows: slice, tiles: list[tuple[_Piece, Tile]]) -> None:
        """Of rows whose candidates are frozen: the gradient is a sum over candidates weighted by probabilities, which
        are known up to a factor of the row."""
        sums = RowSums(*_part(self.row_sums, rows))
        weighted = self.query.new_zeros(self.query[rows].shape, dtype=self.acc)
        weighted_u = torch.zeros_like(self.score[rows])
        for _, tile in tiles:
            self.kernels.weighted_sums(tile, sums, weighted, weighted_u)
        self._finish_rows(rows)
        factor = self.row.weight[rows] * (sums.max - self.row.reference[rows]).exp()
        self.grads.dot[rows] += factor * weighted_u
        if self.query_norm is not None:
            factor = factor * self.query_norm[rows]
        self.grads.query[rows] += weighted.mul_(factor.unsqueeze(1))

    def _pieces(self, rows: slice, buffer: Tensor | None) -> Iterator[tuple[_Piece, Tensor | None]]:
        """The pieces of a strip, each with the place of its products in the buffer."""
        begin, height = 0, rows.stop - rows.start
        for block in self.blocks:
            pieces = [_Piece(block, slice(0, block.values.shape[0]), block.rows, block.columns, False)]
            if self.mutual:
                later = slice(rows.stop, self.count)
                pieces = [_Piece(block, rows, True, False, True), _Piece(block, later, True, True, False)]
            for piece in pieces:
                width = piece.columns.stop - piece.columns.start
                if width > 0:
                    end = begin + height * width
                    yield piece, None if buffer is None else buffer[begin:end].view(height, width)
                    begin = end

    def _tile(self, rows: slice, piece: _Piece, products: Tensor | None) -> Tile:
        block, columns = piece.block, piece.columns
        labels: list[Tensor | None] = []
        for row, column in zip(self.designated.row_labels, block.labels, strict=True):
            paired = row is not None and column is not None
            labels += [row[rows], column[columns]] if paired else [None, None]
        tile = Tile(
            self.query[rows],
            block.values[columns],
            products,
            None if self.query_norm is None else self.query_norm[rows],
            None if block.norm is None else block.norm[columns],
            self.inputs.logit_scale,
            self.inputs.logit_bias,
            self.options.energy,
            Labels(*labels),
            self.options.ids_positive,
        )
        self.kernels.begin(tile)
        return tile

    def _add_sums(self, rows: slice, piece: _Piece, tile: Tile) -> None:
        block, columns = piece.block, piece.columns
        row_threshold = None if self.row_threshold is None else self.row_threshold[rows]
        column_threshold = None if self.column_threshold is None else self.column_threshold[columns]
        beating = self.beating_score[rows] if self.stats else None
        thresholds = Thresholds(row_threshold, column_threshold, beating)
        norms = (self.cosine_norms[0][rows], self.cosine_norms[1][columns]) if self.stats and block.spread else None

        def row_sums(sums: RowSums) -> RowSums:
            part = RowSums(*_part(sums, rows))
            return part if norms is not None else part._replace(spread=None)

        by_row = row_sums(self.row_sums) if piece.rows_summed and not self.fused else None
        by_column = ColumnSums(*_part(self.column_sums, columns)) if piece.columns_summed else None
        if by_row is not None or by_column is not None:
            self.kernels.sums(tile, by_row, by_column, thresholds, norms)
        if self.statistic_sums is not None and self.statistic_sums is not self.row_sums and not block.pairs:
            statistic = row_sums(self.statistic_sums)
            thresholds = Thresholds(None, None, beating)
            self.kernels.sums(tile._replace(energy=SOFTMAX), statistic, None, thresholds, norms)

    def _add_gradient(self, rows: slice, piece: _Piece, tile: Tile) -> None:
        block, columns = piece.block, piece.columns
        row = Side(*_part(self.row, rows)) if block.rows else Side()
        column = Side(*_part(self.column, columns)) if block.columns else Side()
        if self.mutual:
            column = Side(*_part(self.row, columns))
        dot = torch.zeros_like(self.grads.dot[rows]) if piece.twice else self.grads.dot[rows]
        grad_query = None if self.grads.query is None else self.grads.query[rows]
        grad_values = None if block.gradient is None or piece.twice else block.gradient[columns]
        row_sums = RowSums(*_part(self.row_sums, rows)) if self.fused else None
        total = self.grads.total[rows]
        self.kernels.add_gradients(tile, row, column, dot, total, grad_query, grad_values, row_sums)
        if piece.twice:
            self.grads.dot[rows].add_(dot, alpha=0.5)

    def _finish_rows(self, rows: slice) -> None:
        """The losses of rows whose sums are complete, and what their gradient needs."""
        options = self.options
        if not options.rows:
            return
        sums = RowSums(*_part(self.row_sums, rows))
        score, counted = self.score[rows], self.designated.counted[rows]
        if options.energy == SOFTMAX:
            others = _log_sum(sums).to(self.acc)
            own = self._add_own(rows, torch.where(counted, torch.logaddexp(others, score), others))
            if own is not None:
                others = torch.logaddexp(others, torch.logsumexp(own[0], 1))
            self.state.row_others[rows] = others
            loss = self._softmax_loss(
                others, sums, score, torch.logaddexp(others, score), self.designated.row_positives[rows],
                self.row_candidates[rows], None if own is None else own[0],
            )  # fmt: skip
            self._finish_row_side(rows)
        else:
            own = self._add_own(rows, None if self.row_threshold is None else self.row_threshold[rows])
            loss = sums.sum.to(self.acc)
            if own is not None:
                loss = loss + own[1]
            if options.energy == SIGMOID:
                loss = loss + torch.where(counted, -F.logsigmoid(score), 0)
            if self.wants_gradients:
                weight = self.row.weight[rows]
                slope = torch.where(counted, torch.sigmoid(-score), 0) if options.energy == SIGMOID else sums.active
                self.grads.designated[rows] -= (weight * slope).to(self.acc)
        if own is not None and self.statistic_sums is not None:
            self.statistic_sums.beaten[rows] += (own[0] > self.beating_score[rows].unsqueeze(1)).sum(1)
            self.own_lse[rows] = torch.logsumexp(own[0], 1)
        self.loss[rows] += self.half * torch.where(self.losing[rows], loss, 0)

    def _add_own(self, rows: slice, reference: Tensor | None, final: bool = False) -> tuple[Tensor, Tensor] | None:
        """(scores, value) of the rows' own negatives, as `own_negatives`; their gradients go where they are kept."""
        if self.own is None:
            return None
        options, inputs = self.options, self.inputs
        weight = self.row.weight[rows] if self.wants_gradients else None
        count = rows.stop - rows.start
        nothing = self.score.new_empty(0)
        scores, value = self.score.new_empty(count, self.own.shape[1]), self.score.new_empty(count)
        dot, total = (nothing if weight is None else torch.empty_like(value) for _ in range(2))
        own_negatives_(
            inputs.query[rows].to(self.own.dtype),
            self.own[rows],
            None if inputs.negatives_mask is None else inputs.negatives_mask[rows],
            None if self.query_norm is None else self.query_norm[rows],
            inputs.logit_scale,
            inputs.logit_bias,
            options.energy,
            reference,
            weight,
            None if self.row.smoothing is None else self.row.smoothing[rows],
            final,
            scores,
            value,
            nothing if self.grads.own_query is None else self.grads.own_query[rows],
            nothing if self.grads.own is None else self.grads.own[rows],
            dot,
            total,
        )
        if weight is not None:
            self.grads.dot[rows] += dot
            self.grads.total[rows] += total
            if options.energy == HINGE:
                self.grads.designated[rows] -= total
        return scores, value

    def _softmax_loss(
        self,
        others: Tensor,
        sums: RowSums | ColumnSums,
        score: Tensor,
        lse: Tensor,
        positives: Tensor,
        candidates: Tensor,
        own_scores: Tensor | None = None,
    ) -> Tensor:
        """Of pairs whose own score is left out of `others` and of the sums."""
        e = self.options.label_smoothing
        loss = -F.logsigmoid(score - others)
        if self.options.ids_positive:
            loss = (lse - (sums.positive_sum + score) / positives).to(self.acc)
        if e == 0:
            return loss
        score_sum = sums.score_sum + score
        if own_scores is not None:
            score_sum = score_sum + own_scores.masked_fill(own_scores == float("-inf"), 0).sum(1)
        return (1 - e) * loss + e * (lse - score_sum / candidates).to(self.acc)

    def finish_columns(self) -> None:
        """The losses of the column direction, whose sums are complete after the last strip."""
        pairs, sums, score = self.designated, self.column_sums, self.score
        if self.options.energy == HINGE:
            loss = sums.sum[: self.count].to(self.acc)
            if self.wants_gradients:
                self.grads.designated -= (self.weight * sums.active[: self.count]).to(self.acc)
        else:
            lse, others = pairs.log_sum_exp(_log_sum(sums).to(self.acc), score)
            self.state.column_lse.copy_(lse)
            self.state.column_others.copy_(others)
            wide = score.double().masked_fill(~pairs.has, 0)

            def without_own_pair(values: Tensor | None) -> Tensor | None:
                """Sums over the column of each row, its own pair left out and those of other rows not."""
                return None if values is None else pairs.of_columns(pairs.scatter(wide, values.clone())) - score

            others_sums = sums._replace(
                score_sum=without_own_pair(sums.score_sum), positive_sum=without_own_pair(sums.positive_sum)
            )
            loss = self._softmax_loss(
                others, others_sums, score, torch.logaddexp(others, score), pairs.of_columns(pairs.column_positives),
                pairs.of_columns(pairs.column_candidates),
            )  # fmt: skip
            self._finish_column_side()
        self.loss += self.half * torch.where(self.losing, loss, 0)

    def restore(self, state: PairState) -> None:
        """Takes the state of a forward instead of the sums."""
        self.state = state
        if self.options.rows:
            everything = slice(0, self.count)
            lse = torch.logaddexp(state.row_others, self.score)
            self._add_own(everything, torch.where(self.designated.counted, lse, state.row_others), final=True)
            self._finish_row_side(everything)
        if self.options.columns:
            self._finish_column_side()

    def _finish_row_side(self, rows: slice) -> None:
        """The references of softmax rows and the gradient of their designated scores."""
        if not self.wants_gradients:
            return
        others, score, counted = self.state.row_others[rows], self.score[rows], self.designated.counted[rows]
        if self.row.reference is None:
            self.row = self.row._replace(reference=torch.empty_like(self.score))
        # Nothing is weighed where nothing is designated: every exponential is 0.
        self.row.reference[rows] = torch.logaddexp(others, score).masked_fill(~counted, float("inf"))
        weight, _, share, smoothing = _part(self.row, rows)
        self.grads.designated[rows] += self._softmax_slope(weight, others, score, share, smoothing)

    def _finish_column_side(self) -> None:
        """The same of the columns, of which one may be designated by several rows."""
        if not self.wants_gradients:
            return
        pairs, state = self.designated, self.state
        self.column = self.column._replace(
            reference=state.column_lse.masked_fill(pairs.designations == 0, float("inf"))
        )
        # Of rows that designate nothing `of_columns` gives some key's: they take nothing of it.
        weight, _, share, smoothing = (
            None if v is None else torch.where(pairs.counted, pairs.of_columns(v), 0) for v in self.column
        )
        slope = self._softmax_slope(self.weight, state.column_others, self.score, share, smoothing)
        of_other_rows = weight - self.weight
        probability = (self.score - pairs.of_columns(state.column_lse)).exp()
        self.grads.designated += slope + torch.where(of_other_rows != 0, of_other_rows * probability, 0)

    def _softmax_slope(
        self, weight: Tensor, others: Tensor, score: Tensor, share: Tensor | None, smoothing: Tensor | None
    ) -> Tensor:
        """weight * (probability - 1) + weight - share - smoothing, without the cancellation of a confident pair."""
        if share is None:
            share = (1 - self.options.label_smoothing) * weight
        slope = (weight - share) - torch.where(weight != 0, weight * torch.sigmoid(others - score), 0)
        return slope if smoothing is None else slope - smoothing

    def statistics(self) -> PairStatistics:
        sums, pairs, counted = self.statistic_sums, self.designated, self.designated.counted
        if sums is None:
            return empty_statistics(self.query, False)
        others = torch.logaddexp(_log_sum(sums), self.own_lse.double())
        lse = torch.where(counted, torch.logaddexp(others, self.score.double()), others)
        positive = self.score
        if sums.positive_sum is not None:
            positive = (sums.positive_sum + self.score) / pairs.row_positives
        cosine = self.positive_u
        if not self.options.normalize:
            cosine = cosine * self.cosine_norms[0] * pairs.of_columns(self.cosine_norms[1])
        pair_count = (pairs.row_candidates - pairs.has.long()).sum() if self.options.in_batch else 0
        return PairStatistics(
            lse.to(self.acc),
            positive.to(self.acc).masked_fill(~counted, 0),
            sums.beaten.masked_fill(~counted, -1),
            torch.where(counted, 2 - 2 * cosine, 0).sum() / counted.sum(),
            (sums.spread.sum() / pair_count).log().to(self.acc),
        )


def _part(values: tuple[Tensor | None, ...], at: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v[at] for v in values)


def _log_sum(sums: RowSums | ColumnSums) -> Tensor:
    """log(sum) + max, -inf of nothing."""
    return torch.where(sums.sum == 0, float("-inf"), sums.max + sums.sum.log())
