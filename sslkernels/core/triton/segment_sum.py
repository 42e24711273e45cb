"""Weighted sums of table rows by sorted key in Triton: a program scans the source rows of one chunk of entries by key,
however many output rows they belong to. The part of an output row that extends beyond a chunk is a partial sum; a
second kernel adds up the partial sums in the order of the chunks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import next_power_of_2

BLOCK_E = 16  # entries per chunk
BLOCK_BYTES = 512  # most bytes of a row per program, in the accumulation dtype
BLOCK_P = 16  # partial sums at a time
OPTIONS = {"num_warps": 1}  # one warp, so that a thread scans its columns in registers


@triton.jit
def _add_within_row(begins0, sum0, begins1, sum1):
    return begins0 | begins1, tl.where(begins1 != 0, sum1, sum0 + sum1)


@triton.jit
def weighted_row_sums_kernel(
    keys_ptr,
    order_ptr,
    coefficient_ptr,
    source_ptr,
    source_index_ptr,
    out_ptr,
    partials_ptr,
    entries,
    rows,
    source_rows,
    dim,
    entries_per_source,
    HAS_INDEX: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (column < dim)[None, :]
    lane = tl.arange(0, BLOCK_E)
    n = chunk * BLOCK_E + lane
    valid = n < entries
    key = tl.load(keys_ptr + n, mask=valid, other=rows).to(tl.int64)
    before = tl.load(keys_ptr + n - 1, mask=valid & (n > 0), other=-1).to(tl.int64)
    after = tl.load(keys_ptr + n + 1, mask=n + 1 < entries, other=-1).to(tl.int64)
    belongs = valid & (key < rows)

    entry = tl.load(order_ptr + n, mask=valid, other=0)
    row = entry // entries_per_source
    if HAS_INDEX:
        row = tl.load(source_index_ptr + row, mask=belongs, other=0).to(tl.int64)
    exists = (row >= 0) & (row < source_rows)
    weight = tl.load(coefficient_ptr + entry, mask=belongs, other=0)
    weight = tl.where(exists, weight, float("nan"))
    offset = tl.where(exists, row, 0)[:, None] * dim + column[None, :]
    values = tl.load(source_ptr + offset, mask=belongs[:, None] & in_row, other=0).to(weight.dtype)

    begins = (key != before).to(tl.int32)[:, None] + tl.zeros((BLOCK_E, BLOCK_D), tl.int32)
    _, sums = tl.associative_scan((begins, values * weight[:, None]), 0, _add_within_row)

    # The row of the first entries if it begins in an earlier chunk, else -1.
    continued_row = tl.sum(tl.where((lane == 0) & (key == before), key + 1, 0), 0) - 1
    continued = key == continued_row
    ends = key != after
    last = ends | (lane == BLOCK_E - 1)  # last entry of its row in this chunk
    whole = belongs & ends & ~continued
    tl.store(out_ptr + key[:, None] * dim + column[None, :], sums, mask=whole[:, None] & in_row)
    partial = belongs & last & ~whole
    slot = 2 * chunk + tl.where(continued, 0, 1)
    tl.store(partials_ptr + slot[:, None] * dim + column[None, :], sums, mask=partial[:, None] & in_row)


@triton.jit
def weighted_row_sums_finish_kernel(
    keys_ptr,
    starts_ptr,
    out_ptr,
    partials_ptr,
    entries,
    rows,
    dim,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Finishes the row that begins in this chunk and ends in a later one."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = column < dim
    end = (chunk + 1) * BLOCK_E
    key = tl.load(keys_ptr + end - 1, mask=end < entries, other=rows).to(tl.int64)
    belongs = key < rows
    start = tl.load(starts_ptr + key, mask=belongs, other=0)
    stop = tl.load(starts_ptr + key + 1, mask=belongs, other=0)
    if belongs & (start >= end - BLOCK_E) & (stop > end):
        total = tl.load(partials_ptr + (2 * chunk + 1) * dim + column, mask=in_row, other=0)
        last = (stop - 1) // BLOCK_E
        for first in range(chunk + 1, last + 1, BLOCK_P):
            other = first + tl.arange(0, BLOCK_P)
            offset = 2 * other[:, None] * dim + column[None, :]
            parts = tl.load(partials_ptr + offset, mask=(other <= last)[:, None] & in_row[None, :], other=0)
            total += tl.sum(parts, 0)
        tl.store(out_ptr + key * dim + column, total, mask=in_row)


def weighted_row_sums(
    keys: Tensor,
    order: Tensor,
    starts: Tensor,
    coefficient: Tensor,
    source: Tensor,
    source_index: Tensor | None,
    out: Tensor,
    entries_per_source: int,
) -> None:
    """Fills the rows of `out` that have entries. keys: sorted; the key `out.shape[0]` marks entries to ignore."""
    entries, (rows, dim) = keys.shape[0], out.shape
    if entries == 0 or dim == 0:
        return
    # By index the addresses of the rows take registers, too.
    row_bytes = BLOCK_BYTES if source_index is None else BLOCK_BYTES // 2
    block_d = min(row_bytes // coefficient.element_size(), next_power_of_2(dim))
    chunks = triton.cdiv(entries, BLOCK_E)
    partials = coefficient.new_empty((2 * chunks, dim))
    grid = (chunks, triton.cdiv(dim, block_d))
    weighted_row_sums_kernel[grid](
        keys, order, coefficient, source, source_index, out, partials, entries, rows, source.shape[0], dim,
        entries_per_source, HAS_INDEX=source_index is not None, BLOCK_E=BLOCK_E, BLOCK_D=block_d, **OPTIONS,
    )  # fmt: skip
    weighted_row_sums_finish_kernel[grid](
        keys, starts, out, partials, entries, rows, dim, BLOCK_E=BLOCK_E, BLOCK_P=BLOCK_P, BLOCK_D=block_d, **OPTIONS
    )
