"""Sums over the rows and the columns of a tile of pair scores, from scores that are computed once and never stored.

A program owns a supertile: some blocks of rows by some of columns. It keeps the sums of a block of rows in registers
and those of its columns in memory that is its own, and writes one partial of either for each supertile. A second
kernel adds the partials up in their order and merges them into the running sums.

A softmax of normalised features needs no maximum: |s - bias| is at most |logit_scale|, so that a fixed shift serves
rows and columns with one exponential. Where the sum of a row or column comes out so low that terms may have
underflown, the merge leaves it and raises a flag, on which the kernel with running maxima does what it else ends
without. On sm_90, for a block of 128 x 128 at D = 512, a thread issues 1203 instructions with the fixed shift and 1901
with maxima; of them 64 and 132 exponentials, 112 and 224 shuffles.
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
    further_positives,
    inside_of,
    is_even,
    left_out,
    load_block,
    operand_types,
    operands,
    row_scale,
    shift_of_bound,
    without,
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
# Partials of a row or a column of a supertile: twelve kinds at most, in float32.
PARTIAL_BYTES = 48
# Pairs from which a fixed shift pays for its launches.
FIXED_SHIFT_PAIRS = 1 << 24
# Terms below the normal numbers of float32 are lost: a sum of n terms is complete to 2^-24 from n times this on.
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
    flag, staged, row_max, row_sum, row_active, row_score, row_further, row_spread, row_beaten, column_max, column_sum,
    column_active, column_score, column_further, rows, columns, row_tiles, column_tiles,
    DIM: tl.constexpr, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr, FIXED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """staged (programs, 5, BLOCK_N): where the sums of a block over its columns change hands: its threads hold many
    columns each, those that add them up hold one."""
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
        further_sum = tl.zeros((BLOCK_M,), tl.float32)
        spread = tl.zeros((BLOCK_M,), tl.float32)
        beaten = tl.zeros((BLOCK_M,), tl.float32)
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
            out = left_out(
                row_inside, column_inside, positive_of_row, load_block(column_positive, column, lane, column_inside, 0),
                self_of_row, load_block(column_self, column, lane, column_inside, 0), id_of_row, id_of_column,
                IDS_POSITIVE,
            )  # fmt: skip
            further = further_positives(out, id_of_row, id_of_column, IDS_POSITIVE)
            s = block_scores(u, scale, logit_bias, out)
            if ENERGY == SOFTMAX:
                if FIXED:
                    e = exp_flushed(s - shift)
                    if row_sum is not None:
                        total += tl.sum(e, 1)
                    if column_sum is not None:
                        _stage(staged, 1, lane, tl.sum(e, 0), BLOCK_N)
                else:
                    if row_sum is not None:
                        moved = tl.maximum(largest, tl.max(s, 1))
                        anchor = tl.where(moved == float("-inf"), 0.0, moved)
                        total = total * exp_flushed(largest - anchor) + tl.sum(exp_flushed(s - anchor[:, None]), 1)
                        largest = moved
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
                    cost = costs_of(s, further, threshold, ENERGY, IDS_POSITIVE)
                    total += tl.sum(cost, 1)
                    if row_active is not None:
                        active += tl.sum((cost > 0.0).to(tl.float32), 1)
                if column_sum is not None:
                    threshold_of_column = load_block(column_threshold, column, lane, column_inside, 0.0)
                    if threshold_of_column is not None:
                        threshold_of_column = threshold_of_column[None, :]
                    cost_of_column = costs_of(s, further, threshold_of_column, ENERGY, IDS_POSITIVE)
                    _stage(staged, 1, lane, tl.sum(cost_of_column, 0), BLOCK_N)
                    if column_active is not None:
                        _stage(staged, 2, lane, tl.sum((cost_of_column > 0.0).to(tl.float32), 0), BLOCK_N)
            if row_score is not None:
                score_sum += tl.sum(without(out, s, 0.0), 1)
            if column_score is not None:
                _stage(staged, 3, lane, tl.sum(without(out, s, 0.0), 0), BLOCK_N)
            if row_further is not None:
                further_sum += tl.sum(tl.where(further, s, 0.0), 1)
            if column_further is not None:
                _stage(staged, 4, lane, tl.sum(tl.where(further, s, 0.0), 0), BLOCK_N)
            if row_spread is not None:
                # Of normalised features the product holds the norm of the column already.
                cosine = u
                if column_norm is None:
                    cosine = u * load_block(column_cosine, column, lane, column_inside, 0.0)[None, :]
                cosine *= load_block(row_cosine, row, row_lane, row_inside, 0.0)[:, None]
                distance = 4.0 * cosine - 4.0
                distance = tl.where(distance > 0.0, 0.0, distance)  # a cosine may round above 1
                spread += tl.sum(without(out, exp_flushed(distance), 0.0), 1)
            if row_beaten is not None:
                better = s > load_block(positive_score, row, row_lane, row_inside, 0.0)[:, None]
                if IDS_POSITIVE:
                    better = better & ~further
                beaten += tl.sum(better.to(tl.float32), 1)

            if column_sum is not None:
                tl.debug_barrier()
                existing = lane < columns - column
                later = row_tile > first_row
                at = column_part + column
                if column_max is not None:
                    part_max = tl.load(staged + lane)
                    before_max = tl.load((column_max + at) + lane, existing & later, other=float("-inf"))
                    before_sum = tl.load((column_sum + at) + lane, existing & later, other=0.0)
                    moved_max = tl.maximum(before_max, part_max)
                    anchor_max = tl.where(moved_max == float("-inf"), 0.0, moved_max)
                    part = tl.load((staged + BLOCK_N) + lane) * exp_flushed(part_max - anchor_max)
                    tl.store((column_max + at) + lane, moved_max, existing)
                    tl.store(
                        (column_sum + at) + lane, before_sum * exp_flushed(before_max - anchor_max) + part, existing
                    )
                else:
                    _add_staged(staged, 1, column_sum, at, lane, existing, later, BLOCK_N)
                if column_active is not None:
                    _add_staged(staged, 2, column_active, at, lane, existing, later, BLOCK_N)
                if column_score is not None:
                    _add_staged(staged, 3, column_score, at, lane, existing, later, BLOCK_N)
                if column_further is not None:
                    _add_staged(staged, 4, column_further, at, lane, existing, later, BLOCK_N)
                tl.debug_barrier()
        exists = row_lane < rows - row
        at_row = row_part + row
        if row_max is not None:
            tl.store((row_max + at_row) + row_lane, largest, exists)
        if row_sum is not None:
            tl.store((row_sum + at_row) + row_lane, total, exists)
        if row_active is not None:
            tl.store((row_active + at_row) + row_lane, active, exists)
        if row_score is not None:
            tl.store((row_score + at_row) + row_lane, score_sum, exists)
        if row_further is not None:
            tl.store((row_further + at_row) + row_lane, further_sum, exists)
        if row_spread is not None:
            tl.store((row_spread + at_row) + row_lane, spread, exists)
        if row_beaten is not None:
            tl.store((row_beaten + at_row) + row_lane, beaten, exists)


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
        if incomplete is not None and not FIXED:
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
                part *= exp_flushed(tl.load(part_max + i * stride + at, taken, other=0.0) - anchor)
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
        total = before * exp_flushed(before_max - base).to(tl.float64) + total * exp_flushed(largest - base).to(
            tl.float64
        )
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


def strip_rows(count: int, columns: int, workspace: int) -> int:
    """Rows whose partials fit `workspace` bytes, with those of their columns."""
    fit = workspace * SUPERTILE // (PARTIAL_BYTES * max(columns, 1))
    return min(max(count, 1), max(fit // SUPERTILE, 1) * SUPERTILE)


def add_sums(tile: Any, rows: Any, columns: Any, thresholds: Any, cosine_norms: tuple[Tensor, Tensor] | None) -> None:
    """Adds a tile to the running sums of its rows and columns, of which either may be None."""
    exchanged = rows is None
    by_row, by_column = (_Sums() if sums is None else _Sums(*sums) for sums in (rows, columns))
    ids_positive = tile.ids_positive and tile.labels.row_id is not None
    if not ids_positive:
        by_row, by_column = by_row._replace(further=None), by_column._replace(further=None)
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

    burden = burden_of(tile.labels, by_row.score, by_row.further, by_row.spread, by_row.beaten)
    chosen = config("sums", tile.energy, count, width, dim, tensors[0].dtype, capability(tensors[0]), burden)
    if by_column.sum is None:
        row_tiles, (row_parts, column_tiles) = 1, splits(count, width, chosen, processors(tensors[0]))
        column_parts = triton.cdiv(count, chosen.constexprs["BLOCK_M"])
    else:
        row_tiles, column_tiles = supertile(count, width, chosen, processors(tensors[0]))
        column_parts = triton.cdiv(count, row_tiles * chosen.constexprs["BLOCK_M"])
        row_parts = triton.cdiv(width, column_tiles * chosen.constexprs["BLOCK_N"])
    sides = ((by_row, row_parts, count, width), (by_column, column_parts, width, count))
    block_n = chosen.constexprs["BLOCK_N"]
    staged = None
    if by_column.sum is not None:
        staged = tensors[0].new_empty(column_parts * row_parts, 5, block_n, dtype=torch.float32)

    def launch(row_partials: _Sums, column_partials: _Sums, flag: Tensor | None, fixed: bool) -> None:
        pair_sums_kernel[(column_parts, row_parts)](
            *(*inputs, flag, staged, *row_partials, *column_partials[:5], count, width, row_tiles, column_tiles),
            DIM=dim,
            ENERGY=tile.energy,
            IDS_POSITIVE=ids_positive,
            FIXED=fixed,
            EVEN=is_even(count, width, chosen),
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


def aot_signatures() -> Iterator[AotEntry]:
    softmax, hinge = ("max", "sum"), ("sum", "active")
    every_softmax, statistics = (*softmax, "score", "further"), ("spread", "beaten")
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
        ("further", torch.float16, 768, ENERGY_SIGMOID, False, ("sum",), (), ("norm", "bias", "further")),
        ("plain", torch.bfloat16, 768, ENERGY_HINGE, False, hinge, hinge, ("norm",)),
        ("plain", torch.float32, 19, ENERGY_HINGE, False, hinge, hinge, ()),
    ):  # fmt: skip
        options = ("norm", "bias", "self", "further") if options is None else options
        for generation in ((8, 0), (9, 0), (10, 0)):
            size = 8192 if dim % 16 == 0 else 8191
            burden = 2 if "score" in rows else int(bool({"self", "further"} & set(options)))
            chosen = config("sums", energy, size, size, dim, dtype, generation, burden)
            constexprs = {"DIM": dim, "ENERGY": energy, "IDS_POSITIVE": "further" in options, "FIXED": fixed}
            constexprs["EVEN"] = dim % 16 == 0
            constexprs |= chosen.constexprs | absent_operands(options)
            for side, present in (("row", rows), ("column", columns)):
                names = _Sums._fields if side == "row" else _Sums._fields[:5]
                constexprs |= {f"{side}_{name}": None for name in names if name not in present}
                constexprs |= {f"{side}_threshold": None} if "active" not in present else {}
            if "spread" not in rows:
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
    types |= {"running_beaten": "*i64", "incomplete": "*i8", "flag": "*i32", "least": "fp32"}
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
