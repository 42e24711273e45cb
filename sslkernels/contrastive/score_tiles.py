"""Tiles of pair scores: the mechanism of every contrastive energy.

A tile is the dot products of some queries (rows) with some candidates (columns). With u = product * row_norm *
column_norm, the score is s = logit_scale * u + logit_bias. A backend is a `PairKernels`: sums over the rows, sums over
the columns, and the gradient in place of the products. Sums are running sums, so that a row may occur in several tiles.

Every tile leaves out the positive of a row; `plan` adds it, in float32 whatever the dtype of the tile, so that a
confident pair keeps its loss and its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive import pair_rows
from sslkernels.contrastive.pair_rows import (
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    FeatureGradient,
    LossOptions,
    LossOutputs,
    LossRows,
    PositivePairs,
    SideGrad,
)
from sslkernels.core import segment_sum
from sslkernels.core.chunks import ROW_MULTIPLE, clear_padding, equal_rows, row_pitch
from sslkernels.core.products import add_product

# Bytes of the buffer for the products of tiles.
WORKSPACE_BYTES = {"cpu": 9 << 20, "cuda": 512 << 20}

TILE_COLUMNS = 2048  # columns of a tile that need not hold whole rows
ENERGIES = ("softmax", "sigmoid", "hinge")


class SideLabels(NamedTuple):
    """int32 labels of the rows, or of the columns: see `Labels`."""

    positive: Tensor | None = None
    itself: Tensor | None = None
    id: Tensor | None = None


class Labels(NamedTuple):
    """int32 labels of rows and columns. A pair with equal labels is the positive (positive), a sample with itself
    (self), or shares an id (id). The first two are left out of the tile, the third unless it makes extra positives."""

    row_positive: Tensor | None = None
    column_positive: Tensor | None = None
    row_self: Tensor | None = None
    column_self: Tensor | None = None
    row_id: Tensor | None = None
    column_id: Tensor | None = None

    @property
    def pairs(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """(row label, column label) of the positive, of the sample itself and of the id."""
        return (
            (self.row_positive, self.column_positive), (self.row_self, self.column_self), (self.row_id, self.column_id),
        )  # fmt: skip

    @property
    def without_ids(self) -> Labels:
        return self._replace(row_id=None, column_id=None)


class Masks(NamedTuple):
    """bool masks of a tile, False for pairs that are left out. pair (rows, width): of pairs, with any strides; index
    (columns,) int64: which of its columns belongs to each column of the tile, None for the same; column (columns,): of
    whole columns."""

    pair: Tensor | None = None
    index: Tensor | None = None
    column: Tensor | None = None


class Tile(NamedTuple):
    """queries (rows, D) and candidates (columns, D) in the dtype of the matmuls; products (rows, columns) in that
    dtype: scratch memory, None where the kernels need none; row_norm, column_norm: inverse norms of normalised
    features; ids_positive: whether equal ids make extra positives."""

    queries: Tensor
    candidates: Tensor
    products: Tensor | None
    row_norm: Tensor | None
    column_norm: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None
    energy: int
    labels: Labels
    ids_positive: bool
    masks: Masks = Masks()

    @property
    def with_all_pairs(self) -> Tile:
        """The tile for a sum over all pairs, candidates or not, except the positive and the sample itself."""
        return self._replace(energy=SOFTMAX, labels=self.labels.without_ids, masks=Masks())

    @property
    def has_exclusions(self) -> bool:
        """Whether ids or masks leave pairs out."""
        return any(part is not None for part in (self.labels.row_id, *self.masks))


class RowSums(NamedTuple):
    """Running sums per row: the fields of `ColumnSums`, and statistics.

    uniformity_sum: of exp(4 cosine - 4), which is exp(-2 distance^2) of the normalised features. num_above_positive,
    num_equal_positive (int64): how many s > positive_score and s = positive_score, extra positives not counted.
    """

    max: Tensor | None
    sum: Tensor
    active: Tensor | None
    score_sum: Tensor | None
    positive_sum: Tensor | None
    uniformity_sum: Tensor | None
    num_above_positive: Tensor | None
    num_equal_positive: Tensor | None

    @property
    def without_statistics(self) -> ColumnSums:
        return ColumnSums(self.max, self.sum, self.active, self.score_sum, self.positive_sum)


class Thresholds(NamedTuple):
    """Scores are compared with these: row and column for hinge; positive_score (rows) for the statistics."""

    row: Tensor | None
    column: Tensor | None
    positive_score: Tensor | None


class GradientOutputs(NamedTuple):
    """Accumulators of `add_gradients`.

    dot, total: per row the sum of gradient * u and the sum of the gradient, float64. queries, candidates: their
    gradients before logit_scale, in the accumulation dtype, None where not wanted. row_sums: the sums of the rows, if
    `fuses_sums`.
    """

    dot: Tensor
    total: Tensor
    queries: Tensor | None
    candidates: Tensor | None
    row_sums: RowSums | None = None


def workspace_bytes(features: Tensor) -> int:
    return WORKSPACE_BYTES.get(features.device.type, WORKSPACE_BYTES["cuda"])


class PairKernels:
    """The kernels of one backend. Here products come from torch's matmul, and other kernels read them.

    rounds_products: whether the products of half-precision features are rounded to their dtype.
    """

    rounds_products = True

    def tile_shape(
        self, scores: tuple[int, int], features: Tensor, gradient: bool, whole_rows: bool
    ) -> tuple[tuple[int, int], bool]:
        """(rows and columns of a tile, whether it needs memory for its products), for rows and columns of scores.

        gradient: whether `add_gradients` follows, and not `weighted_sums`; whole_rows: a row block with all its columns
        must fit the workspace. Otherwise tiles are wide and high, so that the gradients of the candidates, which every
        row block reads and writes, are touched less often.
        """
        count, columns = scores
        width = columns if whole_rows else min(columns, TILE_COLUMNS)
        fit = workspace_bytes(features) // max(row_pitch(width) * features.element_size(), 1)
        return (max(equal_rows(count, max(fit // ROW_MULTIPLE, 1) * ROW_MULTIPLE), 1), width), True

    def keeps_products(self, features: Tensor) -> bool:
        """Whether the products that `begin` computed stay in the tile until its gradient."""
        return True

    def pitch(self, columns: int, features: Tensor) -> int:
        """Elements from one row of products to the next."""
        return row_pitch(columns)

    def inverse_norm(self, values: Tensor, acc: torch.dtype) -> Tensor:
        return pair_rows.inverse_norm(values, acc)

    def positive_scores(
        self, pairs: PositivePairs, scale: Tensor, bias: Tensor | None, u: Tensor, score: Tensor
    ) -> None:
        pair_rows.positive_scores(pairs, scale, bias, u, score)

    def norms_and_scores(
        self, query: Tensor, key: Tensor, scale: Tensor, bias: Tensor | None, u: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The inverse norms of queries and keys; writes u and s of the pairs (i, i) as `positive_scores` does."""
        query_norm, key_norm = self.inverse_norm(query, u.dtype), self.inverse_norm(key, u.dtype)
        self.positive_scores(PositivePairs(query, key, query_norm, key_norm, None), scale, bias, u, score)
        return query_norm, key_norm

    def add_losses(self, rows: LossRows, options: LossOptions, outputs: LossOutputs) -> None:
        pair_rows.add_losses(rows, options, outputs)

    def finish_gradient(self, gradient: FeatureGradient, scale: Tensor, out: Tensor) -> None:
        pair_rows.finish_gradient(gradient, scale, out)

    def begin(self, tile: Tile) -> None:
        """Computes the products of a tile, once, before its sums and gradients."""
        torch.mm(tile.queries, tile.candidates.t(), out=tile.products)
        clear_padding(tile.products)  # the buffer may have held the products of another tile

    def sum_rows(self, index: Tensor, coefficient: Tensor, source: Tensor, out: Tensor) -> None:
        """out[r] = sum of coefficient[i, k] * source[i] over the pairs (i, k) with index[i, k] == r, in their order."""
        segment_sum.reference(index.flatten(), coefficient.flatten(), source, None, out)

    def positives_in_tile(self, tile: Tile, column: Tensor, score: Tensor) -> None:
        """Writes the scores of the pairs (i, column[i]) of the tile, rounded as its other scores are, so that equal
        features give equal scores. column (rows,) int64; `score` stays where it is outside the tile."""
        has = (column >= 0) & (column < tile.products.shape[1])
        if tile.products.shape[1] == 0:
            return
        at = torch.where(has, column, 0)
        u = tile.products.gather(1, at.unsqueeze(1)).squeeze(1).to(score.dtype)
        if tile.row_norm is not None:
            u = u * (tile.row_norm * tile.column_norm[at])
        s = tile.logit_scale * u
        if tile.logit_bias is not None:
            s = s + tile.logit_bias
        score.copy_(torch.where(has, s, score))

    def sums(
        self,
        tile: Tile,
        rows: RowSums | None,
        columns: ColumnSums | None,
        thresholds: Thresholds,
        cosine_norms: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Adds the tile to the running sums of its rows and columns. cosine_norms: the inverse norms of both, for
        uniformity_sum."""
        if rows is not None:
            self.row_sums(tile, thresholds.row, thresholds.positive_score, cosine_norms, rows)
        if columns is not None:
            self.column_sums(tile, thresholds.column, columns)

    def add_gradients(
        self, tile: Tile, row: SideGrad, column: SideGrad, outputs: GradientOutputs, first: bool = False
    ) -> None:
        """With G the gradient of the scores times both norms, adds G @ candidates to outputs.queries and G.T @ queries
        to outputs.candidates. first: these are uninitialised, and may have the dtype of the tile."""
        cost = None if outputs.row_sums is None else outputs.row_sums.sum
        self.gradient(tile, row, column, outputs.dot, outputs.total, cost)
        if outputs.queries is not None:
            self._add_product(outputs.queries, tile.products, tile.candidates, first)
        if outputs.candidates is not None:
            self._add_product(outputs.candidates, tile.products.t(), tile.queries, first)

    def fuses_sums(self, features: Tensor) -> bool:
        """Whether `add_gradients` of a sigmoid energy also gives its sums, so that products are computed once."""
        return False

    def has_weighted_sums(self, features: Tensor) -> bool:
        """Whether `weighted_sums` exists, so that products with frozen candidates are computed once."""
        return False

    def weighted_sums(self, tile: Tile, rows: RowSums, weighted: Tensor, weighted_u: Tensor) -> None:
        """Adds a softmax tile to max and sum of `rows`, and to the running sums over candidates of exp(s - max) *
        column_norm * candidate (rows, D) and exp(s - max) * u (rows,), in the accumulation dtype."""
        raise NotImplementedError

    def _add_product(self, total: Tensor, gradient: Tensor, values: Tensor, first: bool = False) -> None:
        """total = (0 if first else total) + gradient @ values, in the dtype of total."""
        if total.dtype == values.dtype or total.is_cuda:
            add_product(total, gradient, values, first)
        else:
            self.add(total, torch.mm(gradient, values))

    def row_sums(
        self,
        tile: Tile,
        threshold: Tensor | None,
        positive_score: Tensor | None,
        cosine_norms: tuple[Tensor, Tensor] | None,
        sums: RowSums,
    ) -> None:
        raise NotImplementedError

    def column_sums(self, tile: Tile, threshold: Tensor | None, sums: ColumnSums) -> None:
        raise NotImplementedError

    def gradient(
        self, tile: Tile, row: SideGrad, column: SideGrad, dot: Tensor, total: Tensor, cost: Tensor | None
    ) -> None:
        """Replaces the products by G, and adds to dot, total and, for a sigmoid energy with `fuses_sums`, the sums
        `cost` of the rows."""
        raise NotImplementedError

    def add(self, total: Tensor, part: Tensor) -> None:
        """total += part, of different dtypes."""
        total.add_(part)


class ReferencePairs(PairKernels):
    """Plain torch: it defines the sums and the gradient."""

    def row_sums(self, tile, threshold, positive_score, cosine_norms, sums):
        _, s, excluded, extra = _scores(tile)
        _add_sums(tile.energy, s, excluded, extra, threshold, sums, 1)
        if sums.uniformity_sum is not None:
            row_norm, column_norm = cosine_norms
            cosine = tile.products.to(s.dtype) * (row_norm.unsqueeze(1) * column_norm)
            sums.uniformity_sum.add_((4 * cosine - 4).clamp(max=0).exp().masked_fill(excluded, 0).sum(1))
        if sums.num_above_positive is not None:
            sums.num_above_positive.add_(((s > positive_score.unsqueeze(1)) & ~extra).sum(1))
            sums.num_equal_positive.add_(((s == positive_score.unsqueeze(1)) & ~extra).sum(1))

    def column_sums(self, tile, threshold, sums):
        _, s, excluded, extra = _scores(tile)
        _add_sums(tile.energy, s, excluded, extra, threshold, sums, 0)

    def weighted_sums(self, tile, rows, weighted, weighted_u):
        u, s, excluded, extra = _scores(tile)
        before = rows.max.clone()
        _add_sums(SOFTMAX, s, excluded, extra, None, rows, 1)
        shift = torch.where(rows.max == float("-inf"), 0, rows.max)
        decay, exp = (before - shift).exp(), (s - shift.unsqueeze(1)).exp()
        candidates = tile.candidates.to(s.dtype)
        if tile.column_norm is not None:
            candidates = candidates * tile.column_norm.unsqueeze(1)
        weighted.mul_(decay.unsqueeze(1)).add_(exp @ candidates)
        weighted_u.mul_(decay).add_((exp * u.masked_fill(excluded, 0)).sum(1))

    def gradient(self, tile, row, column, dot, total, cost):
        u, s, excluded, extra = _scores(tile)
        if cost is not None:
            cost.sub_(F.logsigmoid(torch.where(extra, s, -s)).sum(1, dtype=torch.float64))
        gradient = torch.zeros_like(s)
        for side, dim in ((row, 1), (column, 0)):
            if side.weight is None:
                continue
            weight, reference, share, smoothing = (None if v is None else v.unsqueeze(dim) for v in side)
            if tile.energy == SOFTMAX:
                gradient += weight * (s - reference).exp()
                if share is not None:
                    gradient -= torch.where(extra, share, 0)
                if smoothing is not None:
                    gradient -= smoothing
            elif tile.energy == SIGMOID:
                gradient += weight * torch.where(extra, -torch.sigmoid(-s), torch.sigmoid(s))
            else:
                over = s - reference
                gradient += torch.where(over.isnan(), over, weight * (over > 0))
        gradient.masked_fill_(excluded, 0)
        dot.add_((gradient * u.masked_fill(excluded, 0)).sum(1))
        total.add_(gradient.sum(1))
        if tile.row_norm is not None:
            gradient *= tile.row_norm.unsqueeze(1) * tile.column_norm
        tile.products.copy_(gradient)


def _scores(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u; s, -inf for excluded pairs; which pairs are excluded; which are extra positives."""
    u = tile.products.to(tile.logit_scale.dtype)
    if tile.row_norm is not None:
        u = u * (tile.row_norm.unsqueeze(1) * tile.column_norm)
    s = tile.logit_scale * u
    if tile.logit_bias is not None:
        s = s + tile.logit_bias
    none = torch.zeros_like(s, dtype=torch.bool)
    positive, itself, same_id = (
        none if row is None else row.unsqueeze(1) == column for row, column in tile.labels.pairs
    )
    excluded = positive | itself
    if tile.masks.column is not None:
        excluded = excluded | ~tile.masks.column
    if tile.masks.pair is not None:
        pair, index = tile.masks.pair, tile.masks.index
        excluded = excluded | ~(pair if index is None else pair[:, index])
    extra = same_id & ~excluded
    if not tile.ids_positive:
        excluded, extra = excluded | extra, none
    return u, s.masked_fill(excluded, float("-inf")), excluded, extra


def add_scores(sums: ColumnSums, scores: Tensor) -> None:
    """Adds further scores of each row (rows, K), -inf where there is none, to the sums of a softmax."""
    excluded = scores == float("-inf")
    _add_sums(SOFTMAX, scores, excluded, excluded, None, sums._replace(positive_sum=None), 1)


def _add_sums(
    energy: int,
    s: Tensor,
    excluded: Tensor,
    extra: Tensor,
    threshold: Tensor | None,
    sums: RowSums | ColumnSums,
    dim: int,
) -> None:
    """Adds the sums over `dim` of a tile to the running ones."""
    if s.shape[dim] == 0:
        return
    if energy == SOFTMAX:
        moved = torch.maximum(sums.max, s.amax(dim))
        shift = torch.where(moved == float("-inf"), 0, moved)  # no score yet: every exponential is 0
        sums.sum.mul_((sums.max - shift).exp()).add_((s - shift.unsqueeze(dim)).exp().sum(dim, dtype=torch.float64))
        sums.max.copy_(moved)
    elif energy == SIGMOID:
        cost = torch.where(extra, -s, s)
        sums.sum.sub_(F.logsigmoid(-cost).sum(dim, dtype=torch.float64))
    else:
        over = s - threshold.unsqueeze(dim)
        sums.sum.add_(over.clamp_min(0).sum(dim, dtype=torch.float64))
        sums.active.add_((over > 0).sum(dim))
    if sums.score_sum is not None:
        sums.score_sum.add_(s.masked_fill(excluded, 0).sum(dim, dtype=torch.float64))
    if sums.positive_sum is not None:
        sums.positive_sum.add_(s.masked_fill(~extra, 0).sum(dim, dtype=torch.float64))
