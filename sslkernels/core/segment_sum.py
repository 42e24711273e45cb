"""Weighted sums of table rows by key: the gradient of a gather, without float atomics.

    out[r] = sum over the entries e with keys[e] == r, in their order, of coefficient[e] * source[row(e)]

where row(e) = source_index[e // n], or e // n without an index, and each source row has n entries. A source without an
index may be one row, expanded. Keys outside
[0, rows) are ignored. An entry whose source row is out of range must have coefficient NaN; any row may then be read in
its place. Sums are in the accumulation dtype and rounded once to the dtype of `out`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_rows(keys: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted keys, order, starts): the entries by key, where row r has [starts[r], starts[r + 1]). Entries to ignore
    come last, with the key `rows`. Nothing synchronises."""
    narrow = rows < 2**31 - 1  # half the passes of a radix sort
    keys = (keys if narrow else keys.long()).masked_fill((keys < 0) | (keys >= rows), rows)
    keys, order = torch.sort(keys.to(torch.int32) if narrow else keys, stable=True)
    return keys, order, torch.searchsorted(keys, torch.arange(rows + 1, dtype=keys.dtype, device=keys.device))


def reference(keys: Tensor, coefficient: Tensor, source: Tensor, source_index: Tensor | None, out: Tensor) -> None:
    source = _stored_rows(source, source_index)
    _, order, starts = sort_rows(keys, out.shape[0])
    row = order // _entries_per_source(keys, source, source_index)
    if source_index is not None:
        row = source_index[row].long().clamp(0, source.shape[0] - 1)
    terms = coefficient[order, None] * source[row].to(coefficient.dtype)
    out.copy_(torch.segment_reduce(terms, "sum", lengths=starts.diff(), unsafe=True))


def native(keys: Tensor, coefficient: Tensor, source: Tensor, source_index: Tensor | None, out: Tensor) -> None:
    source = _stored_rows(source, source_index)
    if keys.is_cuda:
        _, order, starts = sort_rows(keys, out.shape[0])
    else:
        order, starts = (keys.new_empty(n, dtype=torch.int64) for n in (keys.numel(), out.shape[0] + 1))
        torch.ops.sslkernels_native.sort_rows(keys, order, starts)
    per_source = _entries_per_source(keys, source, source_index)
    torch.ops.sslkernels_native.weighted_row_sums(starts, order, coefficient, source, source_index, out, per_source)


def triton(keys: Tensor, coefficient: Tensor, source: Tensor, source_index: Tensor | None, out: Tensor) -> None:
    from sslkernels.core.triton.segment_sum import weighted_row_sums

    source = _stored_rows(source, source_index)
    keys, order, starts = sort_rows(keys, out.shape[0])
    per_source = _entries_per_source(keys, source, source_index)
    weighted_row_sums(keys, order, starts, coefficient, source, source_index, out.zero_(), per_source)


def _stored_rows(source: Tensor, source_index: Tensor | None) -> Tensor:
    """One row of an expanded source, to which all entries then belong; contiguous otherwise."""
    if source_index is None and source.shape[0] > 1 and source.stride(0) == 0:
        source = source[:1]
    return source.contiguous()


def _entries_per_source(keys: Tensor, source: Tensor, source_index: Tensor | None) -> int:
    rows = source.shape[0] if source_index is None else source_index.shape[0]
    return max(keys.shape[0] // max(rows, 1), 1)
