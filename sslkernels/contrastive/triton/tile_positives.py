"""The scores of the positives of a tile, from the same products as the kernels of its sums, rounded alike."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.contrastive.triton.score_tiles import (
    block_products,
    block_scores,
    config,
    inside_of,
    load_block,
    operands,
    row_scale,
)
from sslkernels.core.triton.launch import capability, on_device_of


@triton.jit(do_not_specialize=["rows", "columns"])
def positives_in_tile_kernel(
    queries, candidates, row_norm, column_norm, logit_scale, logit_bias, column, score, rows, columns,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program multiplies a block of rows with their own candidates; the diagonal has the positives."""
    row = tl.program_id(0) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    inside = inside_of(lane, row, rows, False)
    at = tl.load((column + row) + lane, inside, other=-1)
    has = inside & (at >= 0) & (at < columns)
    at = tl.where(has, at, 0)
    first = row.to(tl.int64) * DIM
    u = block_products(queries + first, candidates, tl.where(inside, lane, 0) * DIM, at * DIM, DIM, BLOCK_D)
    if column_norm is not None:
        u *= tl.load(column_norm + at)[None, :]
    s = block_scores(u, row_scale(logit_scale, load_block(row_norm, row, lane, inside, 0.0)), logit_bias, None)
    diagonal = tl.sum(tl.where(lane[:, None] == lane[None, :], s, 0.0), 1)
    tl.store((score + row) + lane, diagonal, has)


def positives_in_tile(tile: Any, column: Tensor, score: Tensor) -> None:
    """As `PairKernels.positives_in_tile`."""
    if tile.queries.shape[0] == 0 or tile.candidates.shape[0] == 0:
        return
    queries, candidates, row_norm, column_norm, *_, logit_scale, logit_bias = operands(tile)
    (rows, dim), columns = queries.shape, candidates.shape[0]
    chosen = config("sums", tile.energy, rows, rows, dim, queries.dtype, capability(queries), 2)
    block_m = chosen.constexprs["BLOCK_M"]
    with on_device_of(queries):
        positives_in_tile_kernel[(triton.cdiv(rows, block_m),)](
            *(queries, candidates, row_norm, column_norm, logit_scale, logit_bias, column.contiguous(), score),
            *(rows, columns),
            DIM=dim,
            BLOCK_M=block_m,
            BLOCK_D=chosen.constexprs["BLOCK_D"],
            **chosen.options,
        )
