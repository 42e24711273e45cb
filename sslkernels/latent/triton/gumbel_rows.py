"""Gumbel-softmax over rows in Triton: a program computes several short rows, or one, and generates the noise of a tile
when it loads the tile.

A row that fits one tile stays in registers. A longer row is read tile by tile: each lane keeps a maximum, a sum and an
index, which are combined after the loop, and a second pass recomputes the values, noise included. One program a row: a
few long rows do not fill a GPU (the CUDA kernel shares such a row among the blocks of a cluster).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import VECTOR_BYTES, Config, next_power_of_2, on_device_of
from sslkernels.core.triton.numerics import exp_flushed
from sslkernels.random.triton import transforms
from sslkernels.random.triton.philox import group_words

_SOFT = tl.constexpr(1)  # an output; the others are none, 0, and hard, 2
_NO_INDEX = tl.constexpr(2147483647)
PROGRAMS = 1056  # programs of probability_sums: eight per multiprocessor of an H100
NOT_SPECIALIZED = ["row_count", "columns", "groups", "chunk_rows"]


@triton.jit
def _exp(x):
    return tl.exp(x) if x.dtype == tl.float64 else exp_flushed(x)


@triton.jit
def _gumbels(seed, number, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Noise (ROWS, BLOCK) of the columns from `start` on; number (ROWS,): the Philox group of column 0."""
    group = number[:, None] + (start // 4 + tl.arange(0, BLOCK // 4))[None, :]
    w0, w1, w2, w3 = group_words(seed, group, tl.full((), 0, tl.int64))
    g0, g1, g2, g3 = transforms.gumbel(w0), transforms.gumbel(w1), transforms.gumbel(w2), transforms.gumbel(w3)
    return tl.reshape(tl.join(tl.join(g0, g2), tl.join(g1, g3)), (ROWS, BLOCK))


@triton.jit
def _tile(start, columns, in_range, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Columns and which are valid; the mask is uniform over ALIGN columns, so that they stay one access."""
    cols = start + tl.arange(0, BLOCK)
    return cols, in_range[:, None] & (cols // ALIGN * ALIGN < columns)[None, :]


@triton.jit
def _load_tile(values, offset, cols, mask, other, ACC: tl.constexpr):
    return tl.load(values + (offset[:, None] + cols[None, :]), mask, other=other).to(ACC)


@triton.jit
def _row_offset(row, stride, ALIGN: tl.constexpr):
    return row * stride // ALIGN * ALIGN


@triton.jit
def _load_s(
    logits, offset, cols, mask, seed, number, start,
    NOISE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
    if NOISE:
        s += _gumbels(seed, number, start, ROWS, BLOCK).to(ACC)
    return s


@triton.jit
def _anchor(largest):
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _accumulate(s, cols, largest, total, col, inverse_tau):
    """Updates each lane's maximum, sum and column of the maximum by a tile. NaN is never a maximum."""
    better = s > largest
    new = tl.where(better, s, largest)
    anchor = _anchor(new)
    total = total * _exp((largest - anchor) * inverse_tau) + _exp((s - anchor) * inverse_tau)
    return new, total, tl.where(better, cols[None, :], col)


@triton.jit
def _combine(largest, total, col, inverse_tau):
    """(maximum, sum, index) of each row from its lanes."""
    top = tl.max(largest, 1)
    moved = _exp((largest - top[:, None]) * inverse_tau)
    index = tl.min(tl.where(largest == top[:, None], col, _NO_INDEX), 1)
    return top, tl.sum(total * moved, 1), tl.where(index == _NO_INDEX, 0, index)


@triton.jit
def _reduce(s, cols, inverse_tau):
    """(maximum, sum, index) of rows that fit one tile."""
    known = tl.where(s != s, float("-inf"), s)
    top = tl.max(known, 1)
    total = tl.sum(_exp((s - top[:, None]) * inverse_tau), 1)
    index = tl.min(tl.where((s == top[:, None]) & (s > float("-inf")), cols[None, :], _NO_INDEX), 1)
    return top, total, tl.where(index == _NO_INDEX, 0, index)


@triton.jit
def _softmax(s, top, total, inverse_tau):
    return _exp((s - top[:, None]) * inverse_tau) / total[:, None]


@triton.jit
def _output(s, cols, top, total, index, inverse_tau, OUTPUT: tl.constexpr):
    if OUTPUT == _SOFT:
        y = _softmax(s, top, total, inverse_tau)
    else:
        one_hot = tl.where(cols[None, :] == index[:, None], 1.0, 0.0).to(total.dtype)
        y = tl.where((total != total)[:, None], float("nan"), one_hot)
    return y


@triton.jit
def _program_rows(
    seed_ptr, row_ids, row_count, columns, NOISE: tl.constexpr, HAS_ROW_IDS: tl.constexpr, ROWS: tl.constexpr
):
    """The rows of a program, int64, which are valid, the Philox group of their column 0, and the seed."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = row < row_count
    number = row
    if HAS_ROW_IDS:
        number = tl.load(row_ids + row, in_range, other=0)
    seed = tl.full((), 0, tl.int64)
    if NOISE:
        seed = tl.load(seed_ptr)
    return row, in_range, number * ((columns + 3) // 4), seed


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gumbel_rows_fwd_kernel(
    logits, seed_ptr, row_ids, inverse_tau_ptr,
    y, index_out, max_out, sum_out, best_out, softmax_max_out, softmax_sum_out, row_count, columns, logits_stride,
    NOISE: tl.constexpr, HAS_ROW_IDS: tl.constexpr, OUTPUT: tl.constexpr, WITH_INDEX: tl.constexpr,
    STATS: tl.constexpr, ONE_TILE: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = max_out.dtype.element_ty
    inverse_tau = tl.load(inverse_tau_ptr).to(ACC)
    one = tl.full((), 1.0, ACC)
    row, in_range, number, seed = _program_rows(seed_ptr, row_ids, row_count, columns, NOISE, HAS_ROW_IDS, ROWS)
    offset = _row_offset(row, logits_stride, ALIGN)
    y_offset = _row_offset(row, columns, ALIGN)

    if ONE_TILE:
        cols, mask = _tile(0, columns, in_range, BLOCK, ALIGN)
        s = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
        if STATS:
            softmax_top, softmax_total, best = _reduce(s, cols, one)
        if NOISE:
            s += _gumbels(seed, number, 0, ROWS, BLOCK).to(ACC)
        top, total, index = _reduce(s, cols, inverse_tau)
        if OUTPUT > 0:
            values = _output(s, cols, top, total, index, inverse_tau, OUTPUT)
            tl.store(y + (y_offset[:, None] + cols[None, :]), values.to(y.dtype.element_ty), mask)
    else:
        largest = tl.full((ROWS, BLOCK), float("-inf"), ACC)
        totals = tl.zeros((ROWS, BLOCK), ACC)
        col = tl.full((ROWS, BLOCK), _NO_INDEX, tl.int32)
        if STATS:
            softmax_largest, softmax_totals, softmax_col = largest, totals, col
        for start in range(0, columns, BLOCK):
            cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
            s = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
            if STATS:
                softmax_largest, softmax_totals, softmax_col = _accumulate(
                    s, cols, softmax_largest, softmax_totals, softmax_col, one
                )
            if NOISE:
                s += _gumbels(seed, number, start, ROWS, BLOCK).to(ACC)
            largest, totals, col = _accumulate(s, cols, largest, totals, col, inverse_tau)
        top, total, index = _combine(largest, totals, col, inverse_tau)
        if STATS:
            softmax_top, softmax_total, best = _combine(softmax_largest, softmax_totals, softmax_col, one)
        if OUTPUT > 0:
            for start in range(0, columns, BLOCK):
                cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
                s = tl.zeros((ROWS, BLOCK), ACC)
                if OUTPUT == _SOFT:
                    s = _load_s(logits, offset, cols, mask, seed, number, start, NOISE, ACC, ROWS, BLOCK)
                values = _output(s, cols, top, total, index, inverse_tau, OUTPUT)
                tl.store(y + (y_offset[:, None] + cols[None, :]), values.to(y.dtype.element_ty), mask)

    tl.store(max_out + row, top, in_range)
    tl.store(sum_out + row, total, in_range)
    if WITH_INDEX:
        tl.store(index_out + row, index.to(tl.int64), in_range)
    if STATS:
        tl.store(softmax_max_out + row, softmax_top, in_range)
        tl.store(softmax_sum_out + row, softmax_total, in_range)
        tl.store(best_out + row, best.to(tl.int64), in_range)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def gumbel_rows_bwd_kernel(
    grad, grad_usage, mask_ptr, logits, seed_ptr, row_ids, inverse_tau_ptr,
    max_in, sum_in, softmax_max_in, softmax_sum_in, grad_logits, row_count, columns, logits_stride, grad_stride, groups,
    HAS_GRAD: tl.constexpr, HAS_USAGE: tl.constexpr, HAS_MASK: tl.constexpr, NOISE: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, FLOAT64: tl.constexpr, ONE_TILE: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    inverse_tau = tl.load(inverse_tau_ptr).to(ACC)
    one = tl.full((), 1.0, ACC)
    row, in_range, number, seed = _program_rows(seed_ptr, row_ids, row_count, columns, NOISE, HAS_ROW_IDS, ROWS)
    offset = _row_offset(row, logits_stride, ALIGN)
    out_offset = _row_offset(row, columns, ALIGN)
    if HAS_GRAD:
        grad_offset = _row_offset(row, grad_stride, ALIGN)
        top = tl.load(max_in + row, in_range, other=0.0)
        total = tl.load(sum_in + row, in_range, other=1.0)
    if HAS_USAGE:
        usage_offset = _row_offset(row % groups, columns, ALIGN)
        counted = in_range
        if HAS_MASK:
            counted &= tl.load(mask_ptr + row, in_range, other=0) != 0
        softmax_top = tl.load(softmax_max_in + row, counted, other=0.0)
        softmax_total = tl.load(softmax_sum_in + row, counted, other=1.0)

    tiles = tl.cdiv(columns, BLOCK)
    if ONE_TILE:
        tiles = 1
    lanes = tl.zeros((ROWS, BLOCK), ACC)
    usage_lanes = tl.zeros((ROWS, BLOCK), ACC)
    y = lanes
    for tile in range(0, tiles):
        start = tile * BLOCK
        cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
        if HAS_GRAD:
            s = _load_s(logits, offset, cols, mask, seed, number, start, NOISE, ACC, ROWS, BLOCK)
            y = _softmax(s, top, total, inverse_tau)
            lanes += y * _load_tile(grad, grad_offset, cols, mask, 0.0, ACC)
        if HAS_USAGE:
            mask &= counted[:, None]
            p = _softmax(_load_tile(logits, offset, cols, mask, float("-inf"), ACC), softmax_top, softmax_total, one)
            usage_lanes += p * _load_tile(grad_usage, usage_offset, cols, mask, 0.0, ACC)
    dot = tl.sum(lanes, 1)
    usage = tl.sum(usage_lanes, 1)
    for tile in range(0, tiles):
        start = tile * BLOCK
        cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
        value = tl.zeros((ROWS, BLOCK), ACC)
        if HAS_GRAD:
            if not ONE_TILE:
                s = _load_s(logits, offset, cols, mask, seed, number, start, NOISE, ACC, ROWS, BLOCK)
                y = _softmax(s, top, total, inverse_tau)
            value += y * (_load_tile(grad, grad_offset, cols, mask, 0.0, ACC) - dot[:, None]) * inverse_tau
        if HAS_USAGE:
            mask_counted = mask & counted[:, None]
            p = _softmax(
                _load_tile(logits, offset, cols, mask_counted, float("-inf"), ACC), softmax_top, softmax_total, one
            )
            value += p * (_load_tile(grad_usage, usage_offset, cols, mask_counted, 0.0, ACC) - usage[:, None])
        tl.store(grad_logits + (out_offset[:, None] + cols[None, :]), value.to(grad_logits.dtype.element_ty), mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def probability_sums_kernel(
    logits, softmax_max, softmax_sum, mask_ptr, partial, row_count, columns, logits_stride, groups, chunk_rows,
    HAS_MASK: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = softmax_max.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2) * BLOCK
    total = tl.zeros((ROWS, BLOCK), ACC)
    last = tl.minimum((chunk + 1) * chunk_rows * groups, row_count)
    for at in range(0, chunk_rows, ROWS):
        lane = at + tl.arange(0, ROWS)
        row = (chunk * chunk_rows + lane) * groups + group
        valid = (row < last) & (lane < chunk_rows)
        if HAS_MASK:
            valid &= tl.load(mask_ptr + row, valid, other=0) != 0
        cols, mask = _tile(start, columns, valid, BLOCK, ALIGN)
        offset = _row_offset(row, logits_stride, ALIGN)
        values = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
        top = tl.load(softmax_max + row, valid, other=0.0)
        total += _softmax(values, top, tl.load(softmax_sum + row, valid, other=1.0), 1.0)
    cols = start + tl.arange(0, BLOCK)
    out = partial + _row_offset(chunk * groups + group, columns, ALIGN)
    tl.store(out + cols, tl.sum(total, 0), cols // ALIGN * ALIGN < columns)


def config(columns: int, dtype: torch.dtype) -> Config:
    """Rows and columns of a program; 8 elements a thread, 4 of float64, 2 in a row of several tiles: 4 spill registers
    on sm_80."""
    per_warp, most = (128, 1024) if dtype == torch.float64 else (256, 8192)
    size = max(4, next_power_of_2(columns))
    if size <= most:
        rows = max(1, 4 * per_warp // size)
        return Config({"ONE_TILE": True, "ROWS": rows, "BLOCK": size}, {"num_warps": rows * size // per_warp})
    block = (4 if dtype == torch.float64 else 8) * per_warp
    return Config({"ONE_TILE": False, "ROWS": 1, "BLOCK": block}, {"num_warps": 8})


def sums_config(columns: int, dtype: torch.dtype) -> Config:
    per_warp = 128 if dtype == torch.float64 else 256
    block = min(max(4, next_power_of_2(columns)), 2 * per_warp)
    return Config({"ROWS": 4 * per_warp // block, "BLOCK": block}, {"num_warps": 4})


def _align(logits: Tensor, *strides: int) -> int:
    """Elements of a 16-byte access if all rows start at a multiple of 16 bytes, else 1."""
    vector = VECTOR_BYTES // logits.element_size()
    return vector if all(size % vector == 0 for size in (logits.shape[1], logits.stride(0), *strides)) else 1


def gumbel_rows_fwd(source: Any, output: int, filled: Any) -> None:
    """Fills the tensors of `filled`, the record `RowOutputs`; `source` is the record `NoisyLogits`."""
    logits = source.logits
    rows, columns = logits.shape
    if rows == 0:
        return
    y, index, state, best, softmax_state = filled
    chosen = config(columns, logits.dtype)
    with on_device_of(logits):
        gumbel_rows_fwd_kernel[(triton.cdiv(rows, chosen.constexprs["ROWS"]),)](
            *source, y, index, *state, best, *(softmax_state or (None, None)), rows, columns, logits.stride(0),
            NOISE=source.seed is not None, HAS_ROW_IDS=source.row_ids is not None, OUTPUT=output,
            WITH_INDEX=index is not None, STATS=softmax_state is not None, ALIGN=_align(logits),
            **chosen.constexprs, **chosen.options,
        )  # fmt: skip


def gumbel_rows_bwd(grads: Any, source: Any, state: Any, softmax_state: Any, grad_logits: Tensor) -> None:
    """Fills grad_logits; `grads` is the record `RowGrads`, and the states are the record `State`, of None if unused."""
    logits, mask = source.logits, grads.mask
    rows, columns = logits.shape
    if rows == 0:
        return
    chosen = config(columns, logits.dtype)
    grad_stride = 0 if grads.y is None else grads.y.stride(0)
    groups = 1 if grads.usage is None else grads.usage.shape[0]
    with on_device_of(logits):
        gumbel_rows_bwd_kernel[(triton.cdiv(rows, chosen.constexprs["ROWS"]),)](
            grads.y, grads.usage, None if mask is None else mask.view(torch.uint8), *source, *state, *softmax_state,
            grad_logits, rows, columns, logits.stride(0), grad_stride, groups,
            HAS_GRAD=grads.y is not None, HAS_USAGE=grads.usage is not None, HAS_MASK=mask is not None,
            NOISE=source.seed is not None, HAS_ROW_IDS=source.row_ids is not None,
            FLOAT64=logits.dtype == torch.float64, ALIGN=_align(logits, grad_stride),
            **chosen.constexprs, **chosen.options,
        )  # fmt: skip


def sum_chunks(logits: Tensor, groups: int) -> int:
    """About how many partial sums of a group `probability_sums` computes in parallel."""
    columns = logits.shape[1]
    tiles = triton.cdiv(columns, sums_config(columns, logits.dtype).constexprs["BLOCK"])
    return max(PROGRAMS // (groups * tiles), 64)


def probability_sums(logits: Tensor, softmax_state: Any, mask: Tensor | None, partial: Tensor, chunk: int) -> None:
    """Fills partial (chunks, groups, V), sums over `chunk` rows of a group each."""
    rows, columns = logits.shape
    chunks, groups, _ = partial.shape
    chosen = sums_config(columns, logits.dtype)
    with on_device_of(logits):
        probability_sums_kernel[(chunks, groups, triton.cdiv(columns, chosen.constexprs["BLOCK"]))](
            logits, *softmax_state, None if mask is None else mask.view(torch.uint8), partial,
            rows, columns, logits.stride(0), groups, chunk,
            HAS_MASK=mask is not None, ALIGN=_align(logits), **chosen.constexprs, **chosen.options,
        )  # fmt: skip
