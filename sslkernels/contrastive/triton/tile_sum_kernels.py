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

import triton
import triton.language as tl

from sslkernels.contrastive.triton.score_tiles import (
    SOFTMAX,
    block_products,
    block_scores,
    costs_of,
    excluded_pairs,
    extra_positives,
    inside_of,
    load_block,
    masked,
    masked_pairs,
    row_scale,
    shift_of_bound,
)
from sslkernels.core.triton.numerics import exp_flushed
from sslkernels.core.triton.products import feature_offsets

NOT_SPECIALIZED = ["rows", "columns", "row_tiles", "column_tiles", "count", "partials", "least"]


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
    column_id, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask,
    logit_scale, logit_bias, row_threshold, column_threshold, positive_score, row_cosine, column_cosine,
    flag, staged, row_max, row_sum, row_active, row_score_sum, row_positive_sum, row_uniformity_sum,
    row_num_above_positive, row_num_equal_positive, column_max, column_sum, column_active, column_score_sum,
    column_positive_sum, rows, columns, row_tiles, column_tiles,
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
        num_equal = tl.zeros((BLOCK_M,), tl.float32)
        for column_tile in range(first_column, last_column):
            column = column_tile * BLOCK_N
            column_inside = inside_of(lane, column, columns, EVEN)
            products = block_products(
                queries + row.to(tl.int64) * DIM, candidates + column.to(tl.int64) * DIM, query_offsets,
                feature_offsets(lane, column_inside, DIM), DIM, BLOCK_D,
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
            excluded = masked_pairs(
                excluded, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask, row,
                row_lane, row_inside, column, lane, column_inside,
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
                score = load_block(positive_score, row, row_lane, row_inside, 0.0)[:, None]
                above, equal = s > score, s == score
                if IDS_POSITIVE:
                    above, equal = above & ~extra, equal & ~extra
                num_above += tl.sum(above.to(tl.float32), 1)
                num_equal += tl.sum(equal.to(tl.float32), 1)

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
            tl.store((row_num_equal_positive + at_row) + row_lane, num_equal, exists)


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
    running_num_above_positive, running_num_equal_positive, part_max, part_sum, part_active, part_score_sum,
    part_positive_sum, part_uniformity_sum, part_num_above_positive, part_num_equal_positive,
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
    _add_up(running_num_equal_positive, part_num_equal_positive, at, inside, count, partials)
