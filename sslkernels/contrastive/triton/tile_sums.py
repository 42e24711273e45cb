"""Sums over the rows and the columns of a tile of pair scores, from scores that are computed once and never stored.

A program owns a supertile: several blocks of rows by several of columns. It keeps the sums of a block of rows in
registers and the sums of its columns in memory of its own, and writes one partial of each per supertile. A second
kernel adds up the partials in their order and merges them into the running sums.

A softmax of normalised features needs no maximum: |s - bias| is at most |logit_scale|, so that a fixed shift serves
rows and columns with one exponential. If the sum of a row or column is so low that terms may have underflowed, the
merge skips it and sets a flag; only then does the kernel with running maxima, which is always launched, do any work.
On sm_90, for a block of 128 x 128 at D = 512, a thread issues 1203 instructions with the fixed shift (64 exponentials,
112 shuffles) and 1901 with maxima (132 exponentials, 224 shuffles).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.contrastive.triton.score_tiles import (
    ENERGY_HINGE,
    ENERGY_SIGMOID,
    ENERGY_SOFTMAX,
    SOFTMAX,
    absent_operands,
    block_products,
    block_scores,
    burden_of,
    config,
    costs_of,
    excluded_pairs,
    extra_positives,
    inside_of,
    is_even,
    load_block,
    masked,
    operand_types,
    operands,
    row_scale,
    shift_of_bound,
)
from sslkernels.core.triton.launch import (
    DTYPE_NAMES,
    AotEntry,
    Config,
    capability,
    on_device_of,
    pointers_aligned,
    processors,
)
from sslkernels.core.triton.numerics import exp_flushed
from sslkernels.core.triton.products import feature_offsets, splits

NOT_SPECIALIZED = ["rows", "columns", "row_tiles", "column_tiles", "count", "partials", "least"]
# Rows and columns of the largest supertile.
SUPERTILE = 1024
# Bytes of the partials of a row or a column of a supertile: at most twelve float32.
PARTIAL_BYTES = 48
# Number of pairs from which a fixed shift pays for its launches.
FIXED_SHIFT_PAIRS = 1 << 24
# Subnormal float32 terms are lost: a sum of n terms is complete to 2^-24 if it is at least n times this.
COMPLETE = 2.0**-102
MERGE_BLOCK = 256


@triton.jit
def _stage(staged, slot: tl.constexpr, lane, value, BLOCK_N: tl.constexpr):
    tl.store((staged + slot * BLOCK_N) + lane, value)


@triton.jit
def _add_staged(staged, slot: tl.constexpr, total, start, lane, inside, later, BLOCK_N: tl.constexpr):
    before = tl.load((total + start) + lane, inside & later, other=0.0)
    tl.store((total + start) + lane, before + tl.load((staged + slot * BLOCK_N) + lane), inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_sums_kernel(
    queries, candidates, row_norm, column_norm, row_positive, column_positive, row_self, column_self, row_id,
    column_id, logit_scale, logit_bias, row_threshold, column_threshold, positive_score, row_cosine, column_cosine,
    flag, staged, row_max, row_sum, row_active, row_score_sum, row_positive_sum, row_uniformity_sum,
    row_num_above_positive, column_max, column_sum, column_active, column_score_sum, column_positive_sum,
    rows, columns, row_tiles, column_tiles,
    DIM: tl.constexpr, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr, FIXED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """staged (programs, 5, BLOCK_N): scratch memory through which the column sums of a block are redistributed from the
    threads that compute them, with many columns each, to the threads that accumulate them, with one each."""
    if flag is not None:
        needed = tl.load(flag)
        if needed == 0:
            return
    first_row = tl.program_id(0) * row_tiles
    last_row = tl.minimum(first_row + row_tiles, tl.cdiv(rows, BLOCK_M))
    first_column = tl.program_id(1) * column_tiles
    last_column = tl.minimum(first_column + column_tiles, tl.cdiv(columns, BLOCK_N))
    row_part = tl.program_id(1).to(tl.int64) * rows
    column_part = tl.program_id(0).to(tl.int64) * columns
    if staged is not None:
        staged += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 5 * BLOCK_N
    row_lane = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    shift = 0.0
    if FIXED:
        shift = shift_of_bound(logit_scale, logit_bias)
    for row_tile in range(first_row, last_row):
        row = row_tile * BLOCK_M
        row_inside = inside_of(row_lane, row, rows, EVEN)
        scale = row_scale(logit_scale, load_block(row_norm, row, row_lane, row_inside, 0.0))
        positive_of_row = load_block(row_positive, row, row_lane, row_inside, 0)
        self_of_row = load_block(row_self, row, row_lane, row_inside, 0)
        id_of_row = load_block(row_id, row, row_lane, row_inside, 0)
        query_offsets = feature_offsets(row_lane, row_inside, DIM)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        active = tl.zeros((BLOCK_M,), tl.float32)
        score_sum = tl.zeros((BLOCK_M,), tl.float32)
        extra_sum = tl.zeros((BLOCK_M,), tl.float32)
        uniformity = tl.zeros((BLOCK_M,), tl.float32)
        num_above = tl.zeros((BLOCK_M,), tl.float32)
        for column_tile in range(first_column, last_column):
            column = column_tile * BLOCK_N
            column_inside = inside_of(lane, column, columns, EVEN)
            products = block_products(
                queries + row.to(tl.int64) * DIM, candidates + column.to(tl.int64) * DIM, query_offsets,
                feature_offsets(lane, column_inside, DIM), DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            u = products
            if column_norm is not None:
                u = products * load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
            id_of_column = load_block(column_id, column, lane, column_inside, 0)
            excluded = excluded_pairs(
                row_inside, column_inside, positive_of_row, load_block(column_positive, column, lane, column_inside, 0),
                self_of_row, load_block(column_self, column, lane, column_inside, 0), id_of_row, id_of_column,
                IDS_POSITIVE,
            )  # fmt: skip
            extra = extra_positives(excluded, id_of_row, id_of_column, IDS_POSITIVE)
            s = block_scores(u, scale, logit_bias, excluded)
            if ENERGY == SOFTMAX:
                if FIXED:
                    e = exp_flushed(s - shift)
                    if row_sum is not None:
                        total += tl.sum(e, 1)
                    if column_sum is not None:
                        _stage(staged, 1, lane, tl.sum(e, 0), BLOCK_N)
                else:
                    if row_sum is not None:
                        new_max = tl.maximum(largest, tl.max(s, 1))
                        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
                        total = total * exp_flushed(largest - anchor) + tl.sum(exp_flushed(s - anchor[:, None]), 1)
                        largest = new_max
                    if column_sum is not None:
                        block_max = tl.max(s, 0)
                        base = tl.where(block_max == float("-inf"), 0.0, block_max)
                        _stage(staged, 0, lane, block_max, BLOCK_N)
                        _stage(staged, 1, lane, tl.sum(exp_flushed(s - base[None, :]), 0), BLOCK_N)
            else:
                if row_sum is not None:
                    threshold = load_block(row_threshold, row, row_lane, row_inside, 0.0)
                    if threshold is not None:
                        threshold = threshold[:, None]
                    cost = costs_of(s, extra, threshold, ENERGY, IDS_POSITIVE)
                    total += tl.sum(cost, 1)
                    if row_active is not None:
                        active += tl.sum((cost > 0.0).to(tl.float32), 1)
                if column_sum is not None:
                    threshold_of_column = load_block(column_threshold, column, lane, column_inside, 0.0)
                    if threshold_of_column is not None:
                        threshold_of_column = threshold_of_column[None, :]
                    cost_of_column = costs_of(s, extra, threshold_of_column, ENERGY, IDS_POSITIVE)
                    _stage(staged, 1, lane, tl.sum(cost_of_column, 0), BLOCK_N)
                    if column_active is not None:
                        _stage(staged, 2, lane, tl.sum((cost_of_column > 0.0).to(tl.float32), 0), BLOCK_N)
            if row_score_sum is not None:
                score_sum += tl.sum(masked(excluded, s, 0.0), 1)
            if column_score_sum is not None:
                _stage(staged, 3, lane, tl.sum(masked(excluded, s, 0.0), 0), BLOCK_N)
            if row_positive_sum is not None:
                extra_sum += tl.sum(tl.where(extra, s, 0.0), 1)
            if column_positive_sum is not None:
                _stage(staged, 4, lane, tl.sum(tl.where(extra, s, 0.0), 0), BLOCK_N)
            if row_uniformity_sum is not None:
                # For normalised features, u already contains the column's norm.
                cosine = u
                if column_norm is None:
                    cosine = u * load_block(column_cosine, column, lane, column_inside, 0.0)[None, :]
                cosine *= load_block(row_cosine, row, row_lane, row_inside, 0.0)[:, None]
                distance = 4.0 * cosine - 4.0
                distance = tl.where(distance > 0.0, 0.0, distance)  # a cosine may round above 1
                uniformity += tl.sum(masked(excluded, exp_flushed(distance), 0.0), 1)
            if row_num_above_positive is not None:
                better = s > load_block(positive_score, row, row_lane, row_inside, 0.0)[:, None]
                if IDS_POSITIVE:
                    better = better & ~extra
                num_above += tl.sum(better.to(tl.float32), 1)

            if column_sum is not None:
                tl.debug_barrier()
                existing = lane < columns - column
                later = row_tile > first_row
                at = column_part + column
                if column_max is not None:
                    part_max = tl.load(staged + lane)
                    before_max = tl.load((column_max + at) + lane, existing & later, other=float("-inf"))
                    before_sum = tl.load((column_sum + at) + lane, existing & later, other=0.0)
                    new_column_max = tl.maximum(before_max, part_max)
                    column_anchor = tl.where(new_column_max == float("-inf"), 0.0, new_column_max)
                    part = tl.load((staged + BLOCK_N) + lane) * exp_flushed(part_max - column_anchor)
                    tl.store((column_max + at) + lane, new_column_max, existing)
                    tl.store(
                        (column_sum + at) + lane, before_sum * exp_flushed(before_max - column_anchor) + part, existing
                    )
                else:
                    _add_staged(staged, 1, column_sum, at, lane, existing, later, BLOCK_N)
                if column_active is not None:
                    _add_staged(staged, 2, column_active, at, lane, existing, later, BLOCK_N)
                if column_score_sum is not None:
                    _add_staged(staged, 3, column_score_sum, at, lane, existing, later, BLOCK_N)
                if column_positive_sum is not None:
                    _add_staged(staged, 4, column_positive_sum, at, lane, existing, later, BLOCK_N)
                tl.debug_barrier()
        exists = row_lane < rows - row
        at_row = row_part + row
        if row_max is not None:
            tl.store((row_max + at_row) + row_lane, largest, exists)
        if row_sum is not None:
            tl.store((row_sum + at_row) + row_lane, total, exists)
        if row_active is not None:
            tl.store((row_active + at_row) + row_lane, active, exists)
        if row_score_sum is not None:
            tl.store((row_score_sum + at_row) + row_lane, score_sum, exists)
        if row_positive_sum is not None:
            tl.store((row_positive_sum + at_row) + row_lane, extra_sum, exists)
        if row_uniformity_sum is not None:
            tl.store((row_uniformity_sum + at_row) + row_lane, uniformity, exists)
        if row_num_above_positive is not None:
            tl.store((row_num_above_positive + at_row) + row_lane, num_above, exists)


@triton.jit
def _add_up(running, part, at, inside, count, partials):
    if running is not None:
        total = tl.zeros(at.shape, tl.float64)
        for i in range(0, partials):
            total += tl.load(part + i * count.to(tl.int64) + at, inside, other=0.0).to(tl.float64)
        before = tl.load(running + at, inside, other=0)
        tl.store(running + at, before + total.to(before.dtype), inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_merge_kernel(
    running_max, running_sum, running_active, running_score_sum, running_positive_sum, running_uniformity_sum,
    running_num_above_positive, part_max, part_sum, part_active, part_score_sum, part_positive_sum, part_uniformity_sum,
    part_num_above_positive,
    logit_scale, logit_bias, incomplete, flag, count, partials, least, FIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partials (partials, count) to the running sums. FIXED: the softmax is relative to the shift; sums below
    `least` are marked in `incomplete` and left to a second call, with maxima, that merges only those."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stride = count.to(tl.int64)
    if running_max is not None:
        valid = inside
        if incomplete is not None and not FIXED:
            valid = inside & (tl.load(incomplete + at, inside, other=0) != 0)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        if FIXED:
            largest = tl.zeros((BLOCK,), tl.float32) + shift_of_bound(logit_scale, logit_bias)
        else:
            for i in range(0, partials):
                largest = tl.maximum(largest, tl.load(part_max + i * stride + at, valid, other=float("-inf")))
        anchor = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.zeros((BLOCK,), tl.float64)
        for i in range(0, partials):
            part = tl.load(part_sum + i * stride + at, valid, other=0.0)
            if not FIXED:
                part *= exp_flushed(tl.load(part_max + i * stride + at, valid, other=0.0) - anchor)
            total += part.to(tl.float64)
        if FIXED:
            low = inside & (total < least)
            tl.store(incomplete + at, low.to(tl.int8), inside)
            if tl.max(low.to(tl.int32), 0) > 0:
                tl.store(flag, 1)
            valid = inside & ~low
        before_max = tl.load(running_max + at, valid, other=0.0)
        before = tl.load(running_sum + at, valid, other=0.0)
        new_max = tl.maximum(before_max, largest)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        total = before * exp_flushed(before_max - base).to(tl.float64) + total * exp_flushed(largest - base).to(
            tl.float64
        )
        tl.store(running_max + at, new_max, valid)
        tl.store(running_sum + at, total, valid)
    else:
        _add_up(running_sum, part_sum, at, inside, count, partials)
    _add_up(running_active, part_active, at, inside, count, partials)
    _add_up(running_score_sum, part_score_sum, at, inside, count, partials)
    _add_up(running_positive_sum, part_positive_sum, at, inside, count, partials)
    _add_up(running_uniformity_sum, part_uniformity_sum, at, inside, count, partials)
    _add_up(running_num_above_positive, part_num_above_positive, at, inside, count, partials)


class _Sums(NamedTuple):
    """Running sums of rows or columns, or partials of supertiles, in the order of the kernels' parameters."""

    max: Tensor | None = None
    sum: Tensor | None = None
    active: Tensor | None = None
    score_sum: Tensor | None = None
    positive_sum: Tensor | None = None
    uniformity_sum: Tensor | None = None
    num_above_positive: Tensor | None = None

    def partials(self, count: int) -> "_Sums":
        return _Sums(*(None if v is None else v.new_empty(count, v.shape[0], dtype=torch.float32) for v in self))

    @property
    def softmax(self) -> "_Sums":
        return _Sums(self.max, self.sum)

    @property
    def without_statistics(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in COLUMN_SUMS)


COLUMN_SUMS = ("max", "sum", "active", "score_sum", "positive_sum")


class _Side(NamedTuple):
    """The running sums of the rows, or of the columns, of a tile: `size` of them, each over `terms` scores, from
    `parts` partials."""

    running: _Sums
    parts: int
    size: int
    terms: int


def supertile(rows: int, columns: int, chosen: Config, processors: int) -> tuple[int, int]:
    """(blocks of rows, blocks of columns) of a supertile: at most `SUPERTILE` rows and columns, less if there would be
    too few programs."""
    blocks = [chosen.constexprs["BLOCK_M"], chosen.constexprs["BLOCK_N"]]
    counts = [triton.cdiv(rows, blocks[0]), triton.cdiv(columns, blocks[1])]
    tiles = [max(1, min(SUPERTILE // block, count)) for block, count in zip(blocks, counts, strict=True)]

    def programs() -> int:
        return triton.cdiv(counts[0], tiles[0]) * triton.cdiv(counts[1], tiles[1])

    while programs() < 4 * processors and max(tiles) > 1:
        longer = int(tiles[1] > tiles[0])
        tiles[longer] = triton.cdiv(tiles[longer], 2)
    return tiles[0], tiles[1]


def row_block(count: int, columns: int, workspace: int) -> int:
    """Rows of a row block whose partials, and the partials of its columns, fit `workspace` bytes."""
    fit = workspace * SUPERTILE // (PARTIAL_BYTES * max(columns, 1))
    return min(max(count, 1), max(fit // SUPERTILE, 1) * SUPERTILE)


class _Launch(NamedTuple):
    """What launches of `pair_sums_kernel` for a tile share. inputs: its tensors up to `positive_score` and the cosine
    norms."""

    tile: Any
    inputs: tuple[Tensor | None, ...]
    ids_positive: bool
    chosen: Config
    sizes: tuple[int, int]
    tiles: tuple[int, int]
    grid: tuple[int, int]
    staged: Tensor | None

    def sums(self, rows: _Sums, columns: _Sums, flag: Tensor | None, fixed: bool) -> None:
        pair_sums_kernel[self.grid](
            *(*self.inputs, flag, self.staged, *rows, *columns.without_statistics, *self.sizes, *self.tiles),
            DIM=self.tile.queries.shape[1],
            ENERGY=self.tile.energy,
            IDS_POSITIVE=self.ids_positive,
            FIXED=fixed,
            EVEN=is_even(*self.sizes, self.chosen),
            **self.chosen.constexprs,
            **self.chosen.options,
        )

    def merge(
        self, side: _Side, partials: _Sums, incomplete: Tensor | None = None, flag: Tensor | None = None,
        fixed: bool = False,
    ) -> None:  # fmt: skip
        if side.running.sum is None:
            return
        pair_merge_kernel[(triton.cdiv(side.size, MERGE_BLOCK),)](
            *(*side.running, *partials, self.tile.logit_scale, self.tile.logit_bias, incomplete, flag),
            *(side.size, side.parts, side.terms * COMPLETE),
            FIXED=fixed,
            BLOCK=MERGE_BLOCK,
            num_warps=4,
        )


def add_sums(tile: Any, rows: Any, columns: Any, thresholds: Any, cosine_norms: tuple[Tensor, Tensor] | None) -> None:
    """Adds a tile to the running sums of its rows and columns, either of which may be None; the arguments are the
    records of `score_tiles`."""
    if tile.queries.shape[0] == 0 or tile.candidates.shape[0] == 0:
        return
    transposed = rows is None
    by_row, by_column = (_Sums() if sums is None else _Sums(*sums) for sums in (rows, columns))
    ids_positive = tile.ids_positive and tile.labels.row_id is not None
    if not ids_positive:
        by_row, by_column = by_row._replace(positive_sum=None), by_column._replace(positive_sum=None)
    if transposed:
        by_row, by_column = by_column, by_row
    limits: tuple[Tensor | None, ...] = (None, None)
    if tile.energy == ENERGY_HINGE:
        limits = (thresholds.column, None) if transposed else (thresholds.row, thresholds.column)
    positive_score = None if by_row.num_above_positive is None else thresholds.positive_score
    cosine_norms = (None, None) if by_row.uniformity_sum is None else cosine_norms
    inputs = (*operands(tile, transposed), *limits, positive_score, *cosine_norms)
    with on_device_of(tile.queries):
        launch, sides = _plan(tile, inputs, by_row, by_column, ids_positive)
        _run(launch, sides)


def _plan(
    tile: Any, inputs: tuple[Tensor | None, ...], by_row: _Sums, by_column: _Sums, ids_positive: bool
) -> tuple[_Launch, tuple[_Side, _Side]]:
    queries, candidates, *_ = inputs
    (count, dim), width = queries.shape, candidates.shape[0]
    statistics = (by_row.score_sum, by_row.positive_sum, by_row.uniformity_sum, by_row.num_above_positive)
    burden = burden_of(tile.labels, *statistics)
    chosen = config("sums", tile.energy, count, width, dim, queries.dtype, capability(queries), burden)
    staged = None
    if by_column.sum is None:
        row_tiles, (row_parts, column_tiles) = 1, splits(count, width, chosen, processors(queries))
        column_parts = triton.cdiv(count, chosen.constexprs["BLOCK_M"])
    else:
        block_n = chosen.constexprs["BLOCK_N"]
        row_tiles, column_tiles = supertile(count, width, chosen, processors(queries))
        column_parts = triton.cdiv(count, row_tiles * chosen.constexprs["BLOCK_M"])
        row_parts = triton.cdiv(width, column_tiles * block_n)
        staged = queries.new_empty(column_parts * row_parts, 5, block_n, dtype=torch.float32)
    sizes, tiles, grid = (count, width), (row_tiles, column_tiles), (column_parts, row_parts)
    launch = _Launch(tile, inputs, ids_positive, chosen, sizes, tiles, grid, staged)
    return launch, (_Side(by_row, row_parts, count, width), _Side(by_column, column_parts, width, count))


def _run(launch: _Launch, sides: tuple[_Side, _Side]) -> None:
    partials = [side.running.partials(side.parts) for side in sides]
    by_row, _ = sides
    if by_row.running.max is None or launch.tile.row_norm is None or by_row.size * by_row.terms < FIXED_SHIFT_PAIRS:
        launch.sums(*partials, flag=None, fixed=False)
        for side, part in zip(sides, partials, strict=True):
            launch.merge(side, part)
        return
    flag = torch.zeros(1, dtype=torch.int32, device=launch.tile.queries.device)
    without_max = [part._replace(max=None) for part in partials]
    launch.sums(*without_max, flag=None, fixed=True)
    incomplete = [flag.new_empty(side.size, dtype=torch.int8) for side in sides]
    for side, part, low in zip(sides, without_max, incomplete, strict=True):
        launch.merge(side, part, low, flag, fixed=True)
    softmax = [part.softmax for part in partials]
    launch.sums(*softmax, flag=flag, fixed=False)
    for side, part, low in zip(sides, softmax, incomplete, strict=True):
        launch.merge(side._replace(running=side.running.softmax), part, low)


def aot_signatures() -> Iterator[AotEntry]:
    softmax, hinge = ("max", "sum"), ("sum", "active")
    every_softmax, statistics = (*softmax, "score_sum", "positive_sum"), ("uniformity_sum", "num_above_positive")
    for name, dtype, dim, energy, fixed, rows, columns, options in (
        ("plain", torch.bfloat16, 512, ENERGY_SOFTMAX, False, softmax, softmax, ("norm",)),
        ("plain", torch.bfloat16, 512, ENERGY_SOFTMAX, True, softmax[1:], softmax[1:], ("norm",)),
        ("rows", torch.bfloat16, 512, ENERGY_SOFTMAX, False, softmax, (), ("norm",)),
        ("rows", torch.bfloat16, 128, ENERGY_SOFTMAX, True, softmax[1:], (), ("norm",)),
        ("every", torch.bfloat16, 770, ENERGY_SOFTMAX, False, (*every_softmax, *statistics), every_softmax, None),
        ("every", torch.float16, 64, ENERGY_SOFTMAX, True, (*every_softmax[1:], *statistics), every_softmax[1:], None),
        ("every", torch.float32, 128, ENERGY_SOFTMAX, False, (*every_softmax, *statistics), every_softmax, None),
        ("plain", torch.float32, 128, ENERGY_SOFTMAX, True, softmax[1:], softmax[1:], ("norm",)),
        ("mutual", torch.bfloat16, 512, ENERGY_SOFTMAX, False, softmax, softmax, ("norm", "self")),
        ("mutual", torch.bfloat16, 128, ENERGY_SOFTMAX, True, softmax[1:], softmax[1:], ("norm", "self")),
        ("ragged", torch.bfloat16, 19, ENERGY_SOFTMAX, False, softmax, softmax, ("norm",)),
        ("rerun", torch.float16, 768, ENERGY_SOFTMAX, False, softmax, softmax, ("norm", "flag")),
        ("plain", torch.bfloat16, 768, ENERGY_SIGMOID, False, ("sum",), (), ("norm", "bias")),
        ("id", torch.float16, 768, ENERGY_SIGMOID, False, ("sum",), (), ("norm", "bias", "id")),
        ("plain", torch.bfloat16, 768, ENERGY_HINGE, False, hinge, hinge, ("norm",)),
        ("plain", torch.float32, 19, ENERGY_HINGE, False, hinge, hinge, ()),
    ):  # fmt: skip
        options = ("norm", "bias", "self", "id") if options is None else options
        for generation in ((8, 0), (9, 0), (10, 0)):
            size = 8192 if dim % 16 == 0 else 8191
            burden = 2 if "score_sum" in rows else int(bool({"self", "id"} & set(options)))
            chosen = config("sums", energy, size, size, dim, dtype, generation, burden)
            constexprs = {"DIM": dim, "ENERGY": energy, "IDS_POSITIVE": "id" in options, "FIXED": fixed}
            constexprs["EVEN"] = dim % 16 == 0
            constexprs |= chosen.constexprs | absent_operands(options)
            for side, present in (("row", rows), ("column", columns)):
                names = _Sums._fields if side == "row" else COLUMN_SUMS
                constexprs |= {f"{side}_{name}": None for name in names if name not in present}
                constexprs |= {f"{side}_threshold": None} if "active" not in present else {}
            if "uniformity_sum" not in rows:
                constexprs |= {"row_cosine": None, "column_cosine": None, "positive_score": None}
            if not columns:
                constexprs["staged"] = None
            if "flag" not in options:
                constexprs["flag"] = None
            types = dict.fromkeys(pair_sums_kernel.arg_names, "*fp32") | operand_types(DTYPE_NAMES[dtype])
            types |= {"flag": "*i32"} | dict.fromkeys(("rows", "columns", "row_tiles", "column_tiles"), "i32")
            energies = ("softmax", "sigmoid", "hinge")
            label = f"pair-sums-{DTYPE_NAMES[dtype]}-{dim}-{energies[energy]}-{name}{'-fixed' * fixed}"
            entry = pointers_aligned(label, pair_sums_kernel, types, constexprs, chosen.options)
            yield entry._replace(architectures=(10 * generation[0],))
    types = dict.fromkeys(pair_merge_kernel.arg_names, "*fp32")
    types |= {f"running_{name}": "*fp64" for name in _Sums._fields if name != "max"}
    types |= {"running_num_above_positive": "*i64", "incomplete": "*i8", "flag": "*i32", "least": "fp32"}
    types |= {"count": "i32", "partials": "i32"}
    for name, present, none, fixed in (
        ("every", _Sums._fields, ("incomplete", "flag"), False),
        ("fixed", _Sums._fields, ("part_max",), True),
        ("rerun", softmax, ("flag",), False),
        ("plain", ("sum",), ("incomplete", "flag"), False),
    ):
        lacking = [f"{way}_{field}" for way in ("running", "part") for field in _Sums._fields if field not in present]
        constexprs = dict.fromkeys((*lacking, *none)) | {"FIXED": fixed, "BLOCK": MERGE_BLOCK}
        yield pointers_aligned(f"pair-merge-{name}", pair_merge_kernel, types, constexprs, {"num_warps": 4})
