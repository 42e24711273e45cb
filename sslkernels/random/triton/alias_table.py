"""Indices from an alias table in Triton: a program draws for BLOCK groups of four columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.random.triton.philox import column_offsets, philox_words, token_groups

BLOCK = 128


@triton.jit(do_not_specialize=["size", "groups"])
def alias_draw_kernel(
    seed_ptr,
    row_ids_ptr,
    table_ptr,
    out_ptr,
    size,
    rows,
    columns,
    groups,
    HAS_ROW_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, group, in_range = token_groups(first, rows, groups, BLOCK)
    number = first + tl.arange(0, BLOCK)
    if HAS_ROW_IDS:
        number = tl.load(row_ids_ptr + row, mask=in_range, other=0) * groups + group
    seed = tl.load(seed_ptr)
    high = philox_words(seed, number, tl.full((), 0, tl.int64)).to(tl.uint64)
    low = philox_words(seed, number, tl.full((), 1, tl.int64)).to(tl.uint64)
    buckets = size.to(tl.uint64)
    product = high * buckets + ((low * buckets) >> 32)
    bucket = (product >> 32).to(tl.int64)

    offset, valid = column_offsets(row, group, in_range, columns, BLOCK)
    threshold = tl.load(table_ptr + 2 * bucket, mask=valid, other=0).to(tl.uint32, bitcast=True)
    alias = tl.load(table_ptr + 2 * bucket + 1, mask=valid, other=0).to(tl.int64)
    fraction = (product & 0xFFFFFFFF).to(tl.uint32)
    tl.store(out_ptr + offset, tl.where(fraction < threshold, bucket, alias), mask=valid)


def alias_draw(seed: Tensor, row_ids: Tensor | None, table: Tensor, out: Tensor) -> None:
    """Fills `out` (rows, columns), contiguous."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    groups = (columns + 3) // 4
    alias_draw_kernel[(triton.cdiv(rows * groups, BLOCK),)](
        seed, row_ids, table, out, table.shape[0], rows, columns, groups, HAS_ROW_IDS=row_ids is not None, BLOCK=BLOCK
    )
