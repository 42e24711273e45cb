"""The compiled and the Triton kernels of pair scores and of the rows of a contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.contrastive.pair_rows import SOFTMAX
from sslkernels.contrastive.score_tiles import PairKernels, ReferencePairs, Tile, workspace_bytes
from sslkernels.core import segment_sum


class NativePairs(PairKernels):
    """The compiled extension on a CPU: `score_tiles_cpu.cpp` and `pair_rows_cpu.cpp` in `csrc/contrastive`."""

    SCORE_OPS = ("pair_inverse_norm", "pair_positive_scores", "pair_norms_and_scores")
    ROW_OPS = (*SCORE_OPS, "pair_losses", "pair_finish_gradient")
    SUM_OPS = ("pair_row_sums", "pair_column_sums", "pair_softmax_sums")
    TILE_OPS = (*SUM_OPS, "pair_positives_in_tile", "pair_gradient", "scale_add")
    OPS = (*TILE_OPS, *ROW_OPS, "sort_rows", "weighted_row_sums")

    def inverse_norm(self, values, acc):
        norm = values.new_empty(values.shape[0], dtype=acc)
        torch.ops.sslkernels_native.pair_inverse_norm(values, norm)
        return norm

    def positive_scores(self, pairs, scale, bias, u, score):
        torch.ops.sslkernels_native.pair_positive_scores(*pairs, scale, bias, u, score)

    def norms_and_scores(self, query, key, scale, bias, u, score):
        query_norm, key_norm = torch.empty_like(u), u.new_empty(key.shape[0])
        torch.ops.sslkernels_native.pair_norms_and_scores(query, key, scale, bias, query_norm, key_norm, u, score)
        return query_norm, key_norm

    def add_losses(self, rows, options, outputs):
        sums, score, u, positive, positives, candidates, (weight, _, share, smoothing) = rows
        torch.ops.sslkernels_native.pair_losses(
            *sums, score, u, positive, positives, candidates, weight, share, smoothing, *options, *outputs
        )

    def finish_gradient(self, gradient, scale, out):
        torch.ops.sslkernels_native.pair_finish_gradient(*gradient, scale, out)

    def sum_rows(self, index, coefficient, source, out):
        segment_sum.native(index.flatten(), coefficient.flatten(), source, None, out)

    def positives_in_tile(self, tile, column, score):
        torch.ops.sslkernels_native.pair_positives_in_tile(*_flat(tile), column, score)

    def sums(self, tile, rows, columns, thresholds, cosine_norms):
        if tile.energy == SOFTMAX and rows is not None and columns is not None:
            (row_max, row_sum, *others), (column_max, column_sum, *other_columns) = rows, columns
            if not any(sums is not None for sums in (*others, *other_columns)):
                torch.ops.sslkernels_native.pair_softmax_sums(*_flat(tile), row_max, row_sum, column_max, column_sum)
                return
        super().sums(tile, rows, columns, thresholds, cosine_norms)

    def row_sums(self, tile, threshold, positive_score, cosine_norms, sums):
        torch.ops.sslkernels_native.pair_row_sums(
            *_flat(tile), threshold, positive_score, *(cosine_norms or (None, None)), *sums
        )

    def column_sums(self, tile, threshold, sums):
        torch.ops.sslkernels_native.pair_column_sums(*_flat(tile), threshold, *sums)

    def fuses_sums(self, features):
        return True

    def gradient(self, tile, row, column, dot, total, cost):
        torch.ops.sslkernels_native.pair_gradient(*_flat(tile), *row, *column, dot, total, cost)

    def add(self, total, part):
        torch.ops.sslkernels_native.scale_add(part, None, total, True)


def _flat(tile: Tile) -> tuple:
    """The arguments of the native operators that describe a tile."""
    _, _, products, row_norm, column_norm, scale, bias, energy, labels, ids_positive, masks = tile
    return products, row_norm, column_norm, scale, bias, energy, *labels, ids_positive, *masks


class CudaPairs(PairKernels):
    """The compiled extension on a GPU, which has kernels for the per-query negatives alone, and none for tiles."""

    OPS = ("query_negatives", "weighted_row_sums")

    def sum_rows(self, index, coefficient, source, out):
        segment_sum.native(index.flatten(), coefficient.flatten(), source, None, out)


class TritonPairs(ReferencePairs):
    """The Triton kernels, imported at the first call; they compute the products themselves. float64: the reference."""

    rounds_products = False

    def tile_shape(self, scores, features, gradient, whole_rows):
        from sslkernels.contrastive.triton import tile_gradients, tile_sums

        if features.dtype == torch.float64:
            return super().tile_shape(scores, features, gradient, whole_rows)
        count, columns = scores
        workspace = workspace_bytes(features)
        rows, written = max(count, 1), False
        if gradient:
            rows, written = tile_gradients.row_block(count, columns, features, workspace)
        return (min(rows, tile_sums.row_block(count, columns, workspace)), columns), written

    def inverse_norm(self, values, acc):
        from sslkernels.contrastive.triton.pair_rows import inverse_norm

        norm = values.new_empty(values.shape[0], dtype=acc)
        inverse_norm(values, norm)
        return norm

    def positive_scores(self, pairs, scale, bias, u, score):
        from sslkernels.contrastive.triton.pair_rows import positive_scores

        positive_scores(pairs, scale, bias, u, score)

    def add_losses(self, rows, options, outputs):
        from sslkernels.contrastive.triton.pair_rows import add_losses

        add_losses(rows, options, outputs)

    def finish_gradient(self, gradient, scale, out):
        from sslkernels.contrastive.triton.pair_rows import finish_gradient

        finish_gradient(gradient, scale, out)

    def sum_rows(self, index, coefficient, source, out):
        segment_sum.triton(index.flatten(), coefficient.flatten(), source, None, out)

    def keeps_products(self, features):
        return features.dtype == torch.float64

    def pitch(self, columns, features):
        return super().pitch(columns, features) if features.dtype == torch.float64 else columns

    def begin(self, tile):
        if tile.queries.dtype == torch.float64:
            super().begin(tile)

    def positives_in_tile(self, tile, column, score):
        from sslkernels.contrastive.triton.tile_positives import positives_in_tile

        if tile.queries.dtype == torch.float64:
            return super().positives_in_tile(tile, column, score)
        positives_in_tile(tile, column, score)

    def sums(self, tile, rows, columns, thresholds, cosine_norms):
        from sslkernels.contrastive.triton.tile_sums import add_sums

        if tile.queries.dtype == torch.float64:
            return super().sums(tile, rows, columns, thresholds, cosine_norms)
        add_sums(tile, rows, columns, thresholds, cosine_norms)

    def add_gradients(self, tile, row, column, outputs, first=False):
        from sslkernels.contrastive.triton.tile_gradients import add_gradients

        if tile.queries.dtype == torch.float64:
            return super().add_gradients(tile, row, column, outputs, first)
        gain, written = add_gradients(tile, row, column, outputs)
        if written and outputs.queries is not None:
            self._add_scaled_product(outputs.queries, tile.products, tile.candidates, gain)
        if written and outputs.candidates is not None:
            self._add_scaled_product(outputs.candidates, tile.products.t(), tile.queries, gain)

    def fuses_sums(self, features):
        return features.dtype != torch.float64

    def has_weighted_sums(self, features):
        from sslkernels.contrastive.triton.score_tiles import has_weighted_sums

        return has_weighted_sums(features.shape[1], features.dtype)

    def weighted_sums(self, tile, rows, weighted, weighted_u):
        from sslkernels.contrastive.triton.tile_weighted_sums import add_weighted_sums

        add_weighted_sums(tile, rows, weighted, weighted_u)

    def _add_scaled_product(self, total: Tensor, gradient: Tensor, values: Tensor, gain: Tensor | None) -> None:
        """total += gradient @ values / gain."""
        if gain is None:
            return self._add_product(total, gradient, values)
        part = torch.zeros_like(total)
        self._add_product(part, gradient, values)
        total.addcmul_(part, 1 / gain)
