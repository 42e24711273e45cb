"""Sums over frozen candidates weighted by exp(s - max), from scores that are computed once: the work of two matmuls.

A program owns a block of rows and a split of the columns: it loops over the blocks of candidates and adds exp(s - max)
times their features in registers, relative to the running maximum (as FlashAttention). A second kernel merges the
partials of the splits, in their order, into the running sums.

float16 kernels multiply the weights by a power of two, like the gradients in `tile_gradients`.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.contrastive.triton.score_tiles import (
    ENERGY_SOFTMAX,
    block_scores,
    burden_of,
    config,
    excluded_pairs,
    gain_of,
    inside_of,
    is_even,
    load_block,
    load_features,
    masked,
    masked_pairs,
    narrowed,
    operands,
    row_scale,
)
from sslkernels.core.triton.launch import capability, next_power_of_2, on_device_of, processors
from sslkernels.core.triton.numerics import exp_flushed
from sslkernels.core.triton.products import splits

# Elements that a program of the merge handles at a time.
MERGE_SIZE = 1024


@triton.jit(do_not_specialize=["rows", "columns", "column_tiles"])
def pair_weighted_sums_kernel(
    queries, candidates, row_norm, column_norm, row_positive, column_positive, row_self, column_self, row_id,
    column_id, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask,
    logit_scale, logit_bias, gain, max_out, sum_out, u_out, weighted_out, rows, columns, column_tiles,
    DIM: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per split of the columns: max, and the sums of exp(s - max), of exp(s - max) * u, and of exp(s - max) *
    column_norm * candidate (rows, D)."""
    row = tl.program_id(0) * BLOCK_M
    row_lane = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    row_inside = inside_of(row_lane, row, rows, EVEN)
    scale = row_scale(logit_scale, load_block(row_norm, row, row_lane, row_inside, 0.0))
    positive_of_row = load_block(row_positive, row, row_lane, row_inside, 0)
    self_of_row = load_block(row_self, row, row_lane, row_inside, 0)
    id_of_row = load_block(row_id, row, row_lane, row_inside, 0)
    query = load_features(queries, row, row_lane, row_inside, depth, DIM, BLOCK_D)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = tl.program_id(1) * column_tiles
    for column_tile in range(first, tl.minimum(first + column_tiles, tl.cdiv(columns, BLOCK_N))):
        column = column_tile * BLOCK_N
        column_inside = inside_of(lane, column, columns, EVEN)
        values = load_features(candidates, column, lane, column_inside, depth, DIM, BLOCK_D)
        u = tl.dot(query, tl.trans(values), input_precision="ieee")
        if column_norm is not None:
            u *= load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
        excluded = excluded_pairs(
            row_inside, column_inside, positive_of_row, load_block(column_positive, column, lane, column_inside, 0),
            self_of_row, load_block(column_self, column, lane, column_inside, 0), id_of_row,
            load_block(column_id, column, lane, column_inside, 0), False,
        )  # fmt: skip
        excluded = masked_pairs(
            excluded, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask, row,
            row_lane, row_inside, column, lane, column_inside,
        )  # fmt: skip
        s = block_scores(u, scale, logit_bias, excluded)
        new_max = tl.maximum(largest, tl.max(s, 1))
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = exp_flushed(largest - anchor)
        largest = new_max
        weight = exp_flushed(s - anchor[:, None])
        total = total * decay + tl.sum(weight, 1)
        dot = dot * decay + tl.sum(masked(excluded, weight * u, 0.0), 1)
        if column_norm is not None:
            # Loaded again, to free its registers in between.
            weight *= load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
        weighted *= decay[:, None]
        weighted = tl.dot(narrowed(weight, gain, values.dtype), values, weighted, input_precision="ieee")
    if gain is not None:
        weighted /= tl.load(gain)
    if row_norm is not None:
        # Loaded again, like column_norm.
        dot *= load_block(row_norm, row, row_lane, row_inside, 0.0)
    at = tl.program_id(1).to(tl.int64) * rows + row
    exists = row_lane < rows - row
    tl.store((max_out + at) + row_lane, largest, exists)
    tl.store((sum_out + at) + row_lane, total, exists)
    tl.store((u_out + at) + row_lane, dot, exists)
    features_at = (weighted_out + at * DIM) + row_lane[:, None] * DIM + depth[None, :]
    tl.store(features_at, weighted, exists[:, None] & (depth[None, :] < DIM))


@triton.jit(do_not_specialize=["rows", "partials"])
def pair_weighted_merge_kernel(
    running_max, running_sum, running_u, running_weighted, part_max, part_sum, part_u, part_weighted, rows, partials,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the partials (partials, rows, ...) to the running sums, both rescaled to the largest maximum."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    inside = row < rows
    stride = rows.to(tl.int64)
    before_max = tl.load(running_max + row, inside, other=float("-inf"))
    largest = before_max
    for i in range(0, partials):
        largest = tl.maximum(largest, tl.load(part_max + i * stride + row, inside, other=float("-inf")))
    anchor = tl.where(largest == float("-inf"), 0.0, largest)
    decay = exp_flushed(before_max - anchor)
    features_at = row[:, None] * DIM + depth[None, :]
    features_inside = inside[:, None] & (depth[None, :] < DIM)
    total = tl.load(running_sum + row, inside, other=0.0) * decay.to(tl.float64)
    dot = tl.load(running_u + row, inside, other=0.0) * decay
    weighted = tl.load(running_weighted + features_at, features_inside, other=0.0) * decay[:, None]
    for i in range(0, partials):
        part = i * stride + row
        factor = exp_flushed(tl.load(part_max + part, inside, other=float("-inf")) - anchor)
        total += (tl.load(part_sum + part, inside, other=0.0) * factor).to(tl.float64)
        dot += tl.load(part_u + part, inside, other=0.0) * factor
        features = tl.load(part_weighted + i * stride * DIM + features_at, features_inside, other=0.0)
        weighted += features * factor[:, None]
    tl.store(running_max + row, largest, inside)
    tl.store(running_sum + row, total, inside)
    tl.store(running_u + row, dot, inside)
    tl.store(running_weighted + features_at, weighted, features_inside)


def add_weighted_sums(tile: Any, rows: Any, weighted: Tensor, weighted_u: Tensor) -> None:
    """Adds a softmax tile to rows.max, rows.sum, weighted and weighted_u, as `PairKernels.weighted_sums`."""
    tensors = operands(tile)
    queries, candidates, *_ = tensors
    (count, dim), width = queries.shape, candidates.shape[0]
    if count == 0 or width == 0:
        return
    burden = burden_of(tile)
    chosen = config("weighted", ENERGY_SOFTMAX, count, width, dim, queries.dtype, capability(queries), burden)
    parts, column_tiles = splits(count, width, chosen, processors(queries))
    with on_device_of(weighted):
        sums = weighted.new_empty(3, parts, count)
        features = weighted.new_empty(parts, count, dim)
        pair_weighted_sums_kernel[(triton.cdiv(count, chosen.constexprs["BLOCK_M"]), parts)](
            *(*tensors, gain_of(tile, False), *sums, features, count, width, column_tiles),
            DIM=dim,
            EVEN=is_even(count, width, chosen),
            **chosen.constexprs,
            **chosen.options,
        )
        merge = _merge_blocks(dim)
        pair_weighted_merge_kernel[(triton.cdiv(count, merge["BLOCK_M"]),)](
            *(rows.max, rows.sum, weighted_u, weighted, *sums, features, count, parts), DIM=dim, **merge, num_warps=4
        )


def _merge_blocks(dim: int) -> dict[str, int]:
    depth = next_power_of_2(dim)
    return {"BLOCK_M": max(MERGE_SIZE // depth, 1), "BLOCK_D": depth}
