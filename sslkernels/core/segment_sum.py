"""Weighted sums of table rows by key: the gradient of a gather, without float atomics.

    out[r] = sum over the entries e with keys[e] == r, in their order, of coefficient[e] * source[row(e)]

where row(e) = source_index[e // n], or e // n without an index, and each source row has n entries. A source without an
index may be one row, expanded. Keys outside [0, rows) are ignored. An entry whose source row is out of range must have
coefficient NaN; any row may then be read in its place. Sums are in the accumulation dtype and rounded once to the dtype
of `out`. `total` (rows,), where given, is filled with the sums of the coefficients themselves, by the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


def sort_rows(keys: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted keys, order, starts): the entries by key, where row r has [starts[r], starts[r + 1]). Entries to ignore
    come last, with the key `rows`. Nothing synchronises."""
    keys, order = _sorted_keys(keys, rows)
    return keys, order, torch.searchsorted(keys, torch.arange(rows + 1, dtype=keys.dtype, device=keys.device))


def _sorted_keys(keys: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    narrow = rows < 2**31 - 1  # half the passes of a radix sort
    outside = (keys < 0) | (keys >= rows)
    keys, order = torch.sort((keys.int() if narrow else keys.long()).masked_fill(outside, rows), stable=True)
    return keys, order


class SparseRows(NamedTuple):
    """The rows of a sparse gradient of (rows, dim), room for as many as can differ: index (R,), int64, and values
    (R, dim), of which the first count (0-d) are filled, in ascending order of their index."""

    index: Tensor
    values: Tensor
    count: Tensor

    @classmethod
    def empty(cls, table: Tensor, entries: int) -> SparseRows:
        most = min(entries, table.shape[0])
        index = table.new_empty(most, dtype=torch.int64)
        return cls(index, table.new_empty((most, table.shape[1])), table.new_empty((), dtype=torch.int64))

    def tensor(self, rows: int) -> Tensor:
        """A coalesced sparse tensor of `rows` rows. Reads the count on the host."""
        count, size = int(self.count), (rows, self.values.shape[1])
        return torch.sparse_coo_tensor(
            self.index[None, :count], self.values[:count], size, is_coalesced=True, check_invariants=False
        )


def sparse(
    sum_rows: Callable[..., None],
    keys: Tensor,
    coefficient: Tensor,
    source: Tensor,
    source_index: Tensor | None,
    rows: int,
    out: SparseRows,
) -> None:
    """Fills `out` with the sums of the rows that have entries, by the segment sum of one backend. Nothing synchronises,
    and nothing has the size of all rows."""
    ordered, order = _sorted_keys(keys, rows)
    begins = ordered < rows
    begins[1:] &= ordered[1:] != ordered[:-1]
    number = begins.cumsum(0)
    torch.sum(begins, 0, out=out.count)
    number = (number - 1).masked_fill_(ordered >= rows, out.index.shape[0])
    # The entry after the last takes the number of keys that are ignored.
    index = torch.zeros(out.index.shape[0] + 1, dtype=torch.int64, device=keys.device)
    out.index.copy_(index.scatter_(0, number, ordered.long())[:-1])
    sum_rows(torch.empty_like(number).scatter_(0, order, number), coefficient, source, source_index, out.values)


def native_sparse(
    keys: Tensor, coefficient: Tensor, source: Tensor, source_index: Tensor | None, rows: int, out: SparseRows
) -> None:
    if keys.is_cuda:
        return sparse(native, keys, coefficient, source, source_index, rows, out)
    source = _stored_rows(source, source_index)
    order, starts = (keys.new_empty(n, dtype=torch.int64) for n in (keys.numel(), out.index.shape[0] + 1))
    torch.ops.sslkernels_native.compact_rows(keys, rows, order, out.index, starts, out.count)
    per_source = _entries_per_source(keys, source, source_index)
    torch.ops.sslkernels_native.weighted_row_sums(
        starts, order, coefficient, source, source_index, out.values, per_source
    )


def reference(
    keys: Tensor,
    coefficient: Tensor,
    source: Tensor,
    source_index: Tensor | None,
    out: Tensor,
    total: Tensor | None = None,
) -> None:
    source = _stored_rows(source, source_index)
    _, order, starts = sort_rows(keys, out.shape[0])
    row = order // _entries_per_source(keys, source, source_index)
    if source_index is not None:
        row = source_index[row].long().clamp(0, source.shape[0] - 1)
    terms = coefficient[order, None] * source[row].to(coefficient.dtype)
    out.copy_(torch.segment_reduce(terms, "sum", lengths=starts.diff(), unsafe=True))
    if total is not None:
        total.copy_(torch.segment_reduce(coefficient[order], "sum", lengths=starts.diff(), unsafe=True))


def native(
    keys: Tensor,
    coefficient: Tensor,
    source: Tensor,
    source_index: Tensor | None,
    out: Tensor,
    total: Tensor | None = None,
) -> None:
    source = _stored_rows(source, source_index)
    if keys.is_cuda:
        _, order, starts = sort_rows(keys, out.shape[0])
    else:
        order, starts = (keys.new_empty(n, dtype=torch.int64) for n in (keys.numel(), out.shape[0] + 1))
        torch.ops.sslkernels_native.sort_rows(keys, order, starts)
    per_source = _entries_per_source(keys, source, source_index)
    torch.ops.sslkernels_native.weighted_row_sums(starts, order, coefficient, source, source_index, out, per_source)
    if total is not None:
        one, per_source = one_row(coefficient), max(keys.shape[0], 1)
        torch.ops.sslkernels_native.weighted_row_sums(
            starts, order, coefficient, one, None, total.unsqueeze(1), per_source
        )


def triton(
    keys: Tensor,
    coefficient: Tensor,
    source: Tensor,
    source_index: Tensor | None,
    out: Tensor,
    total: Tensor | None = None,
) -> None:
    from sslkernels.core.triton.segment_sum import weighted_row_sums

    source = _stored_rows(source, source_index)
    keys, order, starts = sort_rows(keys, out.shape[0])
    per_source = _entries_per_source(keys, source, source_index)
    weighted_row_sums(keys, order, starts, coefficient, source, source_index, out.zero_(), per_source)
    if total is not None:
        one, per_source = one_row(coefficient), max(keys.shape[0], 1)
        weighted_row_sums(keys, order, starts, coefficient, one, None, total.zero_().unsqueeze(1), per_source)


def one_row(coefficient: Tensor) -> Tensor:
    """The source of ones, one row for all entries, that makes a sum of rows a sum of coefficients."""
    return coefficient.new_ones((min(coefficient.shape[0], 1), 1))


SUMS = {"reference": reference, "cpu": native, "triton": triton, "cuda": native}
SPARSE_SUMS = {
    "reference": partial(sparse, reference),
    "cpu": native_sparse,
    "triton": partial(sparse, triton),
    "cuda": native_sparse,
}


def _stored_rows(source: Tensor, source_index: Tensor | None) -> Tensor:
    """The source, contiguous; of an expanded one a single row, to which all entries then belong."""
    if source_index is None and source.shape[0] > 1 and source.stride(0) == 0:
        source = source[:1]
    return source.contiguous()


def _entries_per_source(keys: Tensor, source: Tensor, source_index: Tensor | None) -> int:
    rows = source.shape[0] if source_index is None else source_index.shape[0]
    return max(keys.shape[0] // max(rows, 1), 1)
