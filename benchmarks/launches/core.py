"""Scaling in place, and weighted sums of rows by key."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launches.call import DTYPES, FP16, FP32, Call, binding, call, indices
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.triton.scale import scale_
from sslkernels.core.triton.segment_sum import weighted_row_sums


def calls() -> Iterator[Call]:
    for dtype in DTYPES:
        yield call(scale, dtype, 2**31 + 1)  # the number of elements is an int64
        if dtype != FP16:  # as bfloat16, but for the conversions
            for dim in (128, 100):
                yield call(row_sums, dtype, dim, by_index=True)
                yield call(row_sums, dtype, dim)
    for count in (1, 4096, 1003):
        yield binding(scale, FP32, count)
    yield binding(row_sums, FP16, 1, sources=1)
    yield binding(row_sums, FP16, 128, sources=1024, rows=30001, by_index=True, ids=torch.int32)
    yield binding(row_sums, FP16, 100, sources=1024, rows=30001)


def scale(dtype: torch.dtype, count: int) -> None:
    scale_(torch.empty(count, dtype=dtype), torch.empty((), dtype=accumulation_dtype(dtype)))


def row_sums(
    dtype: torch.dtype, dim: int, sources: int = 4097, rows: int = 30000, by_index: bool = False,
    ids: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    """The gradient of a table: rows of another table by index, or one row in the accumulation dtype for each entry."""
    acc = accumulation_dtype(dtype)
    per_source = 5 if by_index else 1
    entries = sources * per_source
    keys, order, starts = torch.empty(entries, dtype=torch.int32), indices(entries), indices(rows + 1)
    source = torch.empty(sources, dim, dtype=dtype if by_index else acc)
    source_index = torch.empty(sources, dtype=ids) if by_index else None
    out = torch.empty(rows, dim, dtype=dtype)
    weighted_row_sums(keys, order, starts, torch.empty(entries, dtype=acc), source, source_index, out, per_source)
