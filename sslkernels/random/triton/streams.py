"""Random streams in Triton: a program computes BLOCK groups of four numbers, which may span several rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.random.triton import transforms
from sslkernels.random.triton.philox import column_offsets, philox_words, token_groups

BLOCK = 256


@triton.jit(do_not_specialize=["groups", "sample"])
def random_stream_kernel(
    seed_ptr,
    row_ids_ptr,
    out_ptr,
    rows,
    columns,
    groups,
    sample: tl.int64,
    STREAM: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, group, in_range = token_groups(first, rows, groups, BLOCK)
    number = first + tl.arange(0, BLOCK)
    if HAS_ROW_IDS:
        number = tl.load(row_ids_ptr + row, mask=in_range, other=0) * groups + group
    seed = tl.load(seed_ptr)
    draw = sample.to(tl.int64)
    if STREAM == "normal":
        values = transforms.normals(seed, number, draw)
    else:
        values = philox_words(seed, number, draw)
        if STREAM == "uniform":
            values = transforms.uniform(values)
        elif STREAM == "exponential":
            values = transforms.exponential(values)
        elif STREAM == "gumbel":
            values = transforms.gumbel(values)
        else:
            values = values.to(tl.int32, bitcast=True)

    values = values.to(out_ptr.dtype.element_ty)
    if WHOLE_GROUPS:  # rows of whole groups are contiguous, in the order of the groups
        at = tl.arange(0, 4 * BLOCK)
        tl.store(out_ptr + 4 * first + at, values, mask=at // 4 < rows.to(tl.int64) * groups - first)
    else:
        offset, valid = column_offsets(row, group, in_range, columns, BLOCK)
        tl.store(out_ptr + offset, values, mask=valid)


def random_stream(stream: str, seed: Tensor, row_ids: Tensor | None, sample: int, out: Tensor) -> None:
    """Fills `out` (rows, columns), contiguous."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    groups = (columns + 3) // 4
    random_stream_kernel[(triton.cdiv(rows * groups, BLOCK),)](
        seed, row_ids, out, rows, columns, groups, sample,
        STREAM=stream, HAS_ROW_IDS=row_ids is not None, WHOLE_GROUPS=columns % 4 == 0, BLOCK=BLOCK,
    )  # fmt: skip
