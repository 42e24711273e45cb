"""Sums over the rows and the columns of a tile of pair scores, from scores that are computed once and never stored.

A program owns a supertile: some blocks of rows by some of columns. It keeps the sums of a block of rows in registers
and those of its columns in memory that is its own, and writes one partial of either for each supertile. A second
kernel adds the partials up in their order and merges them into the running sums.

A softmax of normalised features needs no maximum: |s - bias| is at most |logit_scale|, so that a fixed shift serves rows
and columns with one exponential. Where the sum of a row or column comes out so low that terms may have underflown, the
merge leaves it and raises a flag, on which the kernel with running maxima does what it else ends without.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.triton_kernels.launch import (
    DTYPE_NAMES,
    AotEntry,
    Config,
    capability,
    on_device_of,
    pointers_aligned,
    processors,
)
from sslkernels.triton_kernels.numerics import log1p_unit
from sslkernels.triton_kernels.pair_scores import (
    ENERGY_HINGE,
    ENERGY_SIGMOID,
    ENERGY_SOFTMAX,
    SIGMOID,
    SOFTMAX,
    block_products,
    block_scores,
    config,
    load_or_none,
    operand_types,
    operands,
    row_scale,
    shift_of_bound,
    splits,
)

NOT_SPECIALIZED = ["rows", "columns", "row_tiles", "column_tiles", "count", "partials", "least"]
# Rows and columns of the largest supertile.
SUPERTILE = 1024
# Pairs from which a fixed shift pays for its launches.
FIXED_SHIFT_PAIRS = 1 << 24
# Terms below the normal numbers of float32 are lost: a sum of n terms is complete to 2^-24 from n times this on.
COMPLETE = 2.0**-102
MERGE_BLOCK = 256


@triton.jit
def _costs(s, further, threshold, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr):
    """Softplus or hinge of scores; what is left out has none."""
    if ENERGY == SIGMOID:
        if IDS_POSITIVE:
            s = tl.where(further, -s, s)
        return tl.maximum(s, 0.0) + log1p_unit(tl.exp(-tl.abs(s)))
    else:
        over = s - threshold
        return tl.where(over <= 0.0, 0.0, over)  # of NaN NaN


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_sums_kernel(
    queries, candidates, row_norm, column_norm, row_positive, column_positive, row_self, column_self, row_id,
    column_id, logit_scale, logit_bias, row_threshold, column_threshold, positive_score, row_cosine, column_cosine,
    flag, row_max, row_sum, row_active, row_score, row_further, row_spread, row_beaten, column_max, column_sum,
    column_active, column_score, column_further, rows, columns, row_tiles, column_tiles,
    DIM: tl.constexpr, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if flag is not None:
        if tl.load(flag) == 0:
            return
    first_row = tl.program_id(0) * row_tiles
    last_row = tl.minimum(first_row + row_tiles, tl.cdiv(rows, BLOCK_M))
    first_column = tl.program_id(1) * column_tiles
    last_column = tl.minimum(first_column + column_tiles, tl.cdiv(columns, BLOCK_N))
    row_part = tl.program_id(1).to(tl.int64) * rows
    column_part = tl.program_id(0).to(tl.int64) * columns
    shift = 0.0
    if FIXED:
        shift = shift_of_bound(logit_scale, logit_bias)
    for row_tile in range(first_row, last_row):
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = row < rows
        scale = row_scale(logit_scale, load_or_none(row_norm, row, row_inside, 0.0))
        positive_of_row = load_or_none(row_positive, row, row_inside, 0)
        self_of_row = load_or_none(row_self, row, row_inside, 0)
        id_of_row = load_or_none(row_id, row, row_inside, 0)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        active = tl.zeros((BLOCK_M,), tl.float32)
        score_sum = tl.zeros((BLOCK_M,), tl.float32)
        further_sum = tl.zeros((BLOCK_M,), tl.float32)
        spread = tl.zeros((BLOCK_M,), tl.float32)
        beaten = tl.zeros((BLOCK_M,), tl.float32)
        for column_tile in range(first_column, last_column):
            column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            column_inside = column < columns
            column_at = column_part + column
            old = column_inside & (row_tile > first_row)
            products = block_products(
                queries, candidates, row, row_inside, column, column_inside, DIM, BLOCK_M, BLOCK_N, BLOCK_D
            )
            if row_spread is not None:
                cosine = products * tl.load(row_cosine + row, row_inside, other=0.0)[:, None]
                cosine *= tl.load(column_cosine + column, column_inside, other=0.0)[None, :]
            _, s, out, further = block_scores(
                products, load_or_none(column_norm, column, column_inside, 0.0), scale, logit_bias, row_inside,
                column_inside, positive_of_row, load_or_none(column_positive, column, column_inside, 0), self_of_row,
                load_or_none(column_self, column, column_inside, 0), id_of_row,
                load_or_none(column_id, column, column_inside, 0), IDS_POSITIVE,
            )  # fmt: skip
            tl.debug_barrier()  # the sums of columns that the block of rows before has left are seen
            if ENERGY == SOFTMAX:
                if FIXED:
                    e = tl.exp(s - shift)
                    if row_sum is not None:
                        total += tl.sum(e, 1)
                    if column_sum is not None:
                        before = tl.load(column_sum + column_at, old, other=0.0)
                        tl.store(column_sum + column_at, before + tl.sum(e, 0), column_inside)
                else:
                    if row_sum is not None:
                        moved = tl.maximum(largest, tl.max(s, 1))
                        anchor = tl.where(moved == float("-inf"), 0.0, moved)
                        total = total * tl.exp(largest - anchor) + tl.sum(tl.exp(s - anchor[:, None]), 1)
                        largest = moved
                    if column_sum is not None:
                        before_max = tl.load(column_max + column_at, old, other=float("-inf"))
                        before = tl.load(column_sum + column_at, old, other=0.0)
                        moved_column = tl.maximum(before_max, tl.max(s, 0))
                        base = tl.where(moved_column == float("-inf"), 0.0, moved_column)
                        before = before * tl.exp(before_max - base) + tl.sum(tl.exp(s - base[None, :]), 0)
                        tl.store(column_max + column_at, moved_column, column_inside)
                        tl.store(column_sum + column_at, before, column_inside)
            else:
                if row_sum is not None:
                    threshold = 0.0
                    if row_threshold is not None:
                        threshold = tl.load(row_threshold + row, row_inside, other=0.0)[:, None]
                    cost = _costs(s, further, threshold, ENERGY, IDS_POSITIVE)
                    total += tl.sum(cost, 1)
                    if row_active is not None:
                        active += tl.sum((cost > 0.0).to(tl.float32), 1)
                if column_sum is not None:
                    limit = 0.0
                    if column_threshold is not None:
                        limit = tl.load(column_threshold + column, column_inside, other=0.0)[None, :]
                    cost_of_column = _costs(s, further, limit, ENERGY, IDS_POSITIVE)
                    before = tl.load(column_sum + column_at, old, other=0.0)
                    tl.store(column_sum + column_at, before + tl.sum(cost_of_column, 0), column_inside)
                    if column_active is not None:
                        count = tl.sum((cost_of_column > 0.0).to(tl.float32), 0)
                        before = tl.load(column_active + column_at, old, other=0.0)
                        tl.store(column_active + column_at, before + count, column_inside)
            if row_score is not None:
                score_sum += tl.sum(tl.where(out, 0.0, s), 1)
            if column_score is not None:
                before = tl.load(column_score + column_at, old, other=0.0)
                tl.store(column_score + column_at, before + tl.sum(tl.where(out, 0.0, s), 0), column_inside)
            if IDS_POSITIVE:
                if row_further is not None:
                    further_sum += tl.sum(tl.where(further, s, 0.0), 1)
                if column_further is not None:
                    before = tl.load(column_further + column_at, old, other=0.0)
                    part = tl.sum(tl.where(further, s, 0.0), 0)
                    tl.store(column_further + column_at, before + part, column_inside)
            if row_spread is not None:
                spread += tl.sum(tl.where(out, 0.0, tl.exp(4.0 * cosine - 4.0)), 1)
            if row_beaten is not None:
                better = s > tl.load(positive_score + row, row_inside, other=0.0)[:, None]
                if IDS_POSITIVE:
                    better = better & ~further
                beaten += tl.sum(better.to(tl.float32), 1)
        row_at = row_part + row
        if row_max is not None:
            tl.store(row_max + row_at, largest, row_inside)
        if row_sum is not None:
            tl.store(row_sum + row_at, total, row_inside)
        if row_active is not None:
            tl.store(row_active + row_at, active, row_inside)
        if row_score is not None:
            tl.store(row_score + row_at, score_sum, row_inside)
        if row_further is not None:
            tl.store(row_further + row_at, further_sum, row_inside)
        if row_spread is not None:
            tl.store(row_spread + row_at, spread, row_inside)
        if row_beaten is not None:
            tl.store(row_beaten + row_at, beaten, row_inside)


@triton.jit
def _add_up(running, part, at, inside, count, partials):
    if running is not None:
        if part is not None:
            total = tl.zeros(at.shape, tl.float64)
            for i in range(0, partials):
                total += tl.load(part + i * count.to(tl.int64) + at, inside, other=0.0).to(tl.float64)
            before = tl.load(running + at, inside, other=0)
            tl.store(running + at, before + total.to(before.dtype), inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_merge_kernel(
    running_max, running_sum, running_active, running_score, running_further, running_spread, running_beaten,
    part_max, part_sum, part_active, part_score, part_further, part_spread, part_beaten,
    logit_scale, logit_bias, incomplete, flag, count, partials, least, FIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the partials (partials, count) into the running sums. FIXED: the softmax is relative to the shift; what
    is below `least` is written to `incomplete`, and left for a call with maxima that takes nothing else."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stride = count.to(tl.int64)
    if running_max is not None:
        taken = inside
        if incomplete is not None:
            if not FIXED:
                taken = inside & (tl.load(incomplete + at, inside, other=0) != 0)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        if FIXED:
            largest = tl.zeros((BLOCK,), tl.float32) + shift_of_bound(logit_scale, logit_bias)
        else:
            for i in range(0, partials):
                largest = tl.maximum(largest, tl.load(part_max + i * stride + at, taken, other=float("-inf")))
        anchor = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.zeros((BLOCK,), tl.float64)
        for i in range(0, partials):
            part = tl.load(part_sum + i * stride + at, taken, other=0.0)
            if not FIXED:
                part *= tl.exp(tl.load(part_max + i * stride + at, taken, other=0.0) - anchor)
            total += part.to(tl.float64)
        if FIXED:
            low = inside & (total < least)
            tl.store(incomplete + at, low.to(tl.int8), inside)
            if tl.max(low.to(tl.int32), 0) > 0:
                tl.store(flag, 1)
            taken = inside & ~low
        before_max = tl.load(running_max + at, taken, other=0.0)
        before = tl.load(running_sum + at, taken, other=0.0)
        moved = tl.maximum(before_max, largest)
        base = tl.where(moved == float("-inf"), 0.0, moved)
        total = before * tl.exp(before_max - base).to(tl.float64) + total * tl.exp(largest - base).to(tl.float64)
        tl.store(running_max + at, moved, taken)
        tl.store(running_sum + at, total, taken)
    else:
        _add_up(running_sum, part_sum, at, inside, count, partials)
    _add_up(running_active, part_active, at, inside, count, partials)
    _add_up(running_score, part_score, at, inside, count, partials)
    _add_up(running_further, part_further, at, inside, count, partials)
    _add_up(running_spread, part_spread, at, inside, count, partials)
    _add_up(running_beaten, part_beaten, at, inside, count, partials)


class _Sums(NamedTuple):
    """Of rows or of columns, as the kernels take them: running ones, or partials of supertiles."""

    max: Tensor | None = None
    sum: Tensor | None = None
    active: Tensor | None = None
    score: Tensor | None = None
    further: Tensor | None = None
    spread: Tensor | None = None
    beaten: Tensor | None = None

    def partials(self, count: int) -> "_Sums":
        return _Sums(*(None if v is None else v.new_empty(count, v.shape[0], dtype=torch.float32) for v in self))


def supertile(rows: int, columns: int, chosen: Config, processors: int) -> tuple[int, int]:
    """Blocks of rows and of columns of a supertile: at most `SUPERTILE`, and less where programs would be few."""
    blocks = [chosen.constexprs["BLOCK_M"], chosen.constexprs["BLOCK_N"]]
    counts = [triton.cdiv(rows, blocks[0]), triton.cdiv(columns, blocks[1])]
    tiles = [max(1, min(SUPERTILE // block, count)) for block, count in zip(blocks, counts, strict=True)]

    def programs() -> int:
        return triton.cdiv(counts[0], tiles[0]) * triton.cdiv(counts[1], tiles[1])

    while programs() < 4 * processors and max(tiles) > 1:
        longer = int(tiles[1] > tiles[0])
        tiles[longer] = triton.cdiv(tiles[longer], 2)
    return tiles[0], tiles[1]


def add_sums(tile: Any, rows: Any, columns: Any, thresholds: Any, cosine_norms: tuple[Tensor, Tensor] | None) -> None:
    """Adds a tile to the running sums of its rows and columns, of which either may be None."""
    exchanged = rows is None
    by_row, by_column = (_Sums() if sums is None else _Sums(*sums) for sums in (rows, columns))
    if exchanged:
        by_row, by_column = by_column, by_row
    tensors = operands(tile, exchanged)
    (count, dim), width = tensors[0].shape, tensors[1].shape[0]
    if count == 0 or width == 0:
        return
    limits: tuple[Tensor | None, ...] = (None, None)
    if tile.energy == ENERGY_HINGE:
        limits = (thresholds.column, None) if exchanged else (thresholds.row, thresholds.column)
    cosine_norms = (None, None) if by_row.spread is None else cosine_norms
    inputs = (*tensors, *limits, None if by_row.beaten is None else thresholds.positive_score, *cosine_norms)

    chosen = config("sums", count, width, dim, tensors[0].dtype, capability(tensors[0]))
    if by_column.sum is None:
        row_tiles, (row_parts, column_tiles) = 1, splits(count, width, chosen, processors(tensors[0]))
        column_parts = triton.cdiv(count, chosen.constexprs["BLOCK_M"])
    else:
        row_tiles, column_tiles = supertile(count, width, chosen, processors(tensors[0]))
        column_parts = triton.cdiv(count, row_tiles * chosen.constexprs["BLOCK_M"])
        row_parts = triton.cdiv(width, column_tiles * chosen.constexprs["BLOCK_N"])
    sides = ((by_row, row_parts, count, width), (by_column, column_parts, width, count))

    def launch(row_partials: _Sums, column_partials: _Sums, flag: Tensor | None, fixed: bool) -> None:
        pair_sums_kernel[(column_parts, row_parts)](
            *(*inputs, flag, *row_partials, *column_partials[:5], count, width, row_tiles, column_tiles),
            DIM=dim,
            ENERGY=tile.energy,
            IDS_POSITIVE=tile.ids_positive and tile.labels.row_id is not None,
            FIXED=fixed,
            **chosen.constexprs,
            **chosen.options,
        )

    def merge(
        running: _Sums, partials: _Sums, parts: int, size: int, terms: int, incomplete: Tensor | None = None,
        flag: Tensor | None = None, fixed: bool = False,
    ) -> None:  # fmt: skip
        pair_merge_kernel[(triton.cdiv(size, MERGE_BLOCK),)](
            *(*running, *partials, tile.logit_scale, tile.logit_bias, incomplete, flag),
            *(size, parts, terms * COMPLETE),
            FIXED=fixed,
            BLOCK=MERGE_BLOCK,
            num_warps=4,
        )

    with on_device_of(tensors[0]):
        partials = [running.partials(parts) for running, parts, *_ in sides]
        if by_row.max is None or tile.row_norm is None or count * width < FIXED_SHIFT_PAIRS:
            launch(*partials, None, False)
            for (running, *sizes), part in zip(sides, partials, strict=True):
                if running.sum is not None:
                    merge(running, part, *sizes)
            return
        flag = torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
        launch(*(part._replace(max=None) for part in partials), flag=None, fixed=True)
        incomplete = [flag.new_empty(size, dtype=torch.int8) for _, _, size, _ in sides]
        for (running, *sizes), part, low in zip(sides, partials, incomplete, strict=True):
            if running.sum is not None:
                merge(running, part._replace(max=None), *sizes, low, flag, fixed=True)
        softmax = [_Sums(part.max, part.sum) for part in partials]
        launch(*softmax, flag=flag, fixed=False)
        for (running, *sizes), part, low in zip(sides, softmax, incomplete, strict=True):
            if running.sum is not None:
                merge(_Sums(running.max, running.sum), part, *sizes, low)
