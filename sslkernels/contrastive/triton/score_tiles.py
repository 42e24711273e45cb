"""Shared by the kernels of tiles of pair scores: products, scores, their masks, and block sizes.

Queries (rows, D) and candidates (columns, D) are row-major. A block of scores is s = (product * column_norm) *
(logit_scale * row_norm) + logit_bias in float32. The formulas are symmetric in rows and columns, so that the
kernels also compute the transpose, from swapped arguments. What is absent is None, which helpers return by a bare
`return`: Triton 3.6 cannot compile `return None`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, next_power_of_2
from sslkernels.core.triton.numerics import exp_flushed, log1p_unit
from sslkernels.core.triton.products import feature_offsets, tile_products

ENERGY_SOFTMAX, ENERGY_SIGMOID, ENERGY_HINGE = 0, 1, 2
SOFTMAX = tl.constexpr(ENERGY_SOFTMAX)
SIGMOID = tl.constexpr(ENERGY_SIGMOID)

# Largest padded D for which a block of output rows stays in registers.
OWNED_DIM = 256
# Steps of a mask from which the places in a block of 128 need more than 32 bits.
WIDE_STEP = 1 << 24
# log2 of what float16 kernels scale a gradient of 1 to, for a score of a pair with average norms.
GAIN = 8


@triton.jit
def inside_of(lane, start, count, EVEN: tl.constexpr):
    """Which lanes of the block at `start` are inside; None if every block is full."""
    if EVEN:
        return
    else:
        return lane < count - start


@triton.jit
def load_block(pointer, start, lane, inside, other):
    """A vector, None if absent. `start` is added first: the remaining offsets are constants of a thread."""
    if pointer is None:
        return
    else:
        if inside is None:
            return tl.load((pointer + start) + lane)
        else:
            return tl.load((pointer + start) + lane, inside, other=other)


@triton.jit
def row_scale(logit_scale, row_norm):
    scale = tl.load(logit_scale)
    if row_norm is None:
        return scale
    else:
        return (scale * row_norm)[:, None]


@triton.jit
def block_products(
    queries, candidates, query_offsets, candidate_offsets,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The dot products (BLOCK_M, BLOCK_N) of a block; the offsets are the elements before each row."""
    depth = tl.arange(0, BLOCK_D)
    query_at = queries + query_offsets[:, None] + depth[None, :]
    candidate_at = candidates + candidate_offsets[None, :] + depth[:, None]
    return tile_products(query_at, candidate_at, depth, DIM, BLOCK_D, "ieee")


@triton.jit
def masked(excluded, values, other: tl.constexpr):
    """`values`, with `other` for excluded pairs; excluded None: no pair is."""
    if excluded is None:
        return values
    else:
        return tl.where(excluded, other, values)


@triton.jit
def _or(excluded, equal):
    if excluded is None:
        return equal
    else:
        return excluded | equal


@triton.jit
def excluded_pairs(
    row_inside, column_inside, row_positive, column_positive, row_self, column_self, row_id, column_id,
    IDS_POSITIVE: tl.constexpr,
):  # fmt: skip
    """Which pairs of a block are outside the tile or no candidates; None if no pair can be."""
    excluded = None
    if row_inside is not None:
        excluded = ~(row_inside[:, None] & column_inside[None, :])
    if row_positive is not None:
        excluded = _or(excluded, row_positive[:, None] == column_positive[None, :])
    if row_self is not None:
        excluded = _or(excluded, row_self[:, None] == column_self[None, :])
    if row_id is not None and not IDS_POSITIVE:
        excluded = _or(excluded, row_id[:, None] == column_id[None, :])
    return excluded


@triton.jit
def masked_pairs(
    excluded, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask, row, row_lane,
    row_inside, column, lane, column_inside,
):  # fmt: skip
    """`excluded`, and the pairs, rows and columns whose byte in a mask is 0. row_index, column_index: where the rows
    and columns of the tile are in pair_mask; at the same place without them."""
    if row_mask is not None:
        excluded = _or(excluded, load_block(row_mask, row, row_lane, row_inside, 1)[:, None] == 0)
    if column_mask is not None:
        excluded = _or(excluded, load_block(column_mask, column, lane, column_inside, 1)[None, :] == 0)
    if pair_mask is not None:
        row_start, row_at = _places(row_index, row, row_lane, row_inside)
        column_start, column_at = _places(column_index, column, lane, column_inside)
        block = pair_mask + row_start * row_step + column_start * column_step
        kept = tl.load(block + (row_at * row_step)[:, None] + (column_at * column_step)[None, :])
        excluded = _or(excluded, kept == 0)
    return excluded


@triton.jit
def _places(index, start, lane, inside):
    """(int64 start, offsets from it) of a block of a mask of pairs; lanes outside get the first offset. Offsets have 32
    bits if there is no index: `_masks` passes an index where they need more."""
    if index is not None:
        return tl.full((), 0, tl.int64), load_block(index, start, lane, inside, 0)
    else:
        if inside is not None:
            lane = tl.where(inside, lane, 0)
        return start.to(tl.int64), lane


@triton.jit
def extra_positives(excluded, row_id, column_id, IDS_POSITIVE: tl.constexpr):
    if IDS_POSITIVE:
        same = row_id[:, None] == column_id[None, :]
        if excluded is not None:
            same = same & ~excluded
        return same
    else:
        return


@triton.jit
def block_scores(u, scale, logit_bias, excluded):
    """Scores from u, products times the norms of columns; -inf for excluded pairs."""
    s = u * scale
    if logit_bias is not None:
        s += tl.load(logit_bias)
    return masked(excluded, s, float("-inf"))


@triton.jit
def costs_of(s, extra, threshold, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr):
    """Softplus or hinge of scores; 0 where the score is -inf."""
    if ENERGY == SIGMOID:
        if IDS_POSITIVE:
            s = tl.where(extra, -s, s)
        return tl.maximum(s, 0.0) + log1p_unit(exp_flushed(-tl.abs(s)))
    else:
        over = s - threshold
        return tl.where(over <= 0.0, 0.0, over)  # NaN for NaN


@triton.jit
def narrowed(gradient, gain, dtype: tl.constexpr):
    """The gradient times `gain` in the dtype of the features, clamped to the largest float16."""
    if gain is not None:
        gradient *= tl.load(gain)
        gradient = tl.where(gradient > 65504.0, 65504.0, tl.where(gradient < -65504.0, -65504.0, gradient))
    return gradient.to(dtype)


@triton.jit
def load_features(pointer, start, lane, inside, depth, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """All features of the rows of a block; rows outside the tile read the first row of the block instead."""
    at = (pointer + start.to(tl.int64) * DIM) + feature_offsets(lane, inside, DIM)[:, None] + depth[None, :]
    if DIM == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, depth[None, :] < DIM, other=0.0)


@triton.jit
def shift_of_bound(logit_scale, logit_bias):
    """The smallest shift for which exp(s - shift) is at most 2^64 for all scores of normalised features, whose maximum
    need not be known."""
    shift = tl.maximum(tl.abs(tl.load(logit_scale)) - 44.3614195558365, 0.0)  # 64 log 2
    if logit_bias is not None:
        shift += tl.load(logit_bias)
    return shift


def operands(tile: Any, transposed: bool = False) -> tuple[Any, ...]:
    """The tensors of a tile, in the order of every kernel's parameters; transposed: with rows and columns swapped."""
    pairs = ((tile.row_norm, tile.column_norm), *tile.labels.pairs)
    vectors = [value for pair in pairs for value in (reversed(pair) if transposed else pair)]
    queries, candidates = tile.queries.contiguous(), tile.candidates.contiguous()
    features = (candidates, queries) if transposed else (queries, candidates)
    return *features, *vectors, *_masks(tile.masks, transposed), tile.logit_scale, tile.logit_bias


def _masks(masks: Any, transposed: bool) -> tuple[Any, ...]:
    """The parameters of `masked_pairs` that belong to a tile."""
    pair, index, column = masks
    steps, indices = (0, 0), (None, index)
    if pair is not None:
        steps = pair.stride()
        if max(steps) >= WIDE_STEP:
            every = (torch.arange(n, device=pair.device) for n in pair.shape)
            indices = tuple(i if given is None else given for i, given in zip(every, indices, strict=True))
    pair, column = (None if mask is None else mask.view(torch.uint8) for mask in (pair, column))
    if transposed:
        return pair, *reversed(steps), *reversed(indices), column, None
    return pair, *steps, *indices, None, column


def gain_of(tile: Any, both_norms: bool, transposed: bool = False) -> Tensor | None:
    """The power of two that scales a gradient of 1, times the average norms, to 2^`GAIN`; None for 1."""
    if tile.queries.dtype != torch.float16:
        return None
    exponent = torch.full((), float(GAIN), device=tile.queries.device)
    if tile.row_norm is not None:
        norms = (
            (tile.row_norm, tile.column_norm) if both_norms else ((tile.row_norm if transposed else tile.column_norm),)
        )
        for norm in norms:
            exponent -= norm.log2().nan_to_num(0.0, 40.0, -40.0).mean()
    return torch.exp2(exponent.round().clamp(-60, 60))


def burden_of(tile: Any, *more: Tensor | None) -> int:
    """Register pressure beside the scores. 0: one pair of labels; 1: more pairs; 2: any of `more`, or masks, too; 3:
    masks beside any of these, or with an index."""
    burden = int(sum(label is not None for label in tile.labels) > 2)
    if any(value is not None for value in more):
        burden = 2
    if any(mask is not None for mask in tile.masks):
        burden = 3 if burden > 0 or tile.masks.index is not None else 2
    return burden


def config(
    kernel: str,
    energy: int,
    rows: int,
    columns: int,
    dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    burden: int,
) -> Config:
    """Blocks of rows (M), columns (N) and features (D). kernel: "sums", "tile" (the gradient of a tile of scores),
    "owner" (the gradient of features: a program owns rows and keeps all D of them in registers) or "weighted" (sums of
    candidates, likewise).

    Large blocks read less from the cache. But a thread keeps a value of each vector for every column it has, so that
    more vectors need narrower blocks.
    """
    if capability[0] == 12:  # 99 KB of shared memory, as sm_86 and sm_89
        capability = (8, 9)
    block_m, block_n = (min(max(16, next_power_of_2(n)), 128) for n in (rows, columns))
    whole = rows % 64 == 0 and columns % 64 == 0
    hopper = capability >= (9, 0)
    depth = max(16, next_power_of_2(dim))
    if kernel == "owner":
        small = depth <= 128 and burden < 2
        narrow = energy == ENERGY_SIGMOID and capability >= (10, 0)
        medium = burden < 2 or (hopper and burden < 3)
        height = 128 if small and hopper and not narrow else 64 if medium else 32
        width = 64 if small and not (energy == ENERGY_SIGMOID and depth == 128 and burden > 0) else 32
        blocks = {"BLOCK_M": min(block_m, height), "BLOCK_N": min(block_n, width), "BLOCK_D": depth}
        # With 4 warps for the scores of 128 rows, sm_100 spills where Triton 3.6 compiles for it.
        many = blocks["BLOCK_M"] * depth >= 4096 or (capability >= (10, 0) and blocks["BLOCK_M"] == 128)
        return Config(blocks, {"num_warps": 8 if many else 4, "num_stages": 2})
    if kernel == "weighted":
        height = 32 if dtype == torch.float32 else 128 if capability[0] == 9 or (hopper and depth <= 128) else 64
        width = 32 if dtype == torch.float32 or (height == 128 and depth > 128 and burden > 0) else 64
        blocks = {"BLOCK_M": min(block_m, height), "BLOCK_N": min(block_n, width), "BLOCK_D": depth}
        elements = blocks["BLOCK_M"] * max(depth, blocks["BLOCK_N"])
        options = {"num_warps": 8 if elements >= 4096 else 4, "num_stages": 2}
        if dtype == torch.float32 and depth == 128 and burden == 0 and capability >= (10, 0):
            options["maxnreg"] = 128  # with Triton 3.6, ptxas limits itself to 80 otherwise, and spills 8 bytes
        return Config(blocks, options)
    if dtype == torch.float32:
        width = 32 if burden > 2 else 64
        blocks = {"BLOCK_M": min(block_m, 64), "BLOCK_N": min(block_n, width), "BLOCK_D": min(depth, 32)}
        return Config(blocks, {"num_warps": 8, "num_stages": 3})
    sums = kernel == "sums"
    wide = burden == 0 and whole and (sums or (energy == ENERGY_SOFTMAX and capability[0] == 9))
    medium = burden < 3 and (sums or whole or burden < 2)
    blocks = {
        "BLOCK_M": min(block_m, 128 if burden < 2 and (sums or whole) else 64),
        "BLOCK_N": min(block_n, 128 if wide else 64 if medium else 32),
        "BLOCK_D": min(depth, 64 if hopper else 32),
    }
    options = {"num_warps": 8, "num_stages": 3}
    if sums and capability >= (10, 0):
        options["maxnreg"] = 255  # ptxas limits itself to 128 otherwise, and spills
    chosen = Config(blocks, options)
    unwritten = kernel == "tile" and owns_rows(dim, dtype)  # only sums of G
    if unwritten and energy == ENERGY_SIGMOID and burden == 0 and not hopper and is_even(rows, columns, chosen):
        options["maxnreg"] = 128  # ptxas uses as many without a limit, and spills 16 bytes
    return chosen


def owns_rows(dim: int, dtype: torch.dtype) -> bool:
    """Whether the gradient comes from the "owner" kernel. Not in float32, whose products have no matrix instructions:
    the library's matmuls are faster there."""
    return dim <= OWNED_DIM and dtype != torch.float32


def has_weighted_sums(dim: int, dtype: torch.dtype) -> bool:
    """Whether the "weighted" kernel, whose programs also keep all D in registers, can run."""
    return dim <= OWNED_DIM and dtype != torch.float64


def is_even(rows: int, columns: int, chosen: Config) -> bool:
    """Whether every block is full, so that kernels need no masks."""
    return rows % chosen.constexprs["BLOCK_M"] == 0 and columns % chosen.constexprs["BLOCK_N"] == 0
