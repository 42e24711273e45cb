"""Gathers the valid rows of a batch (target not ignored) into consecutive slots, and scatters results back.

The number of slots is either the number of valid rows, which must be counted first, or an upper bound that the caller
gives, the capacity, with which no shape depends on the data and nothing synchronises. More valid rows than the capacity
are an error on a CPU; elsewhere every result is NaN.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.vocabulary.softmax_rows import RowOutputs

# The outputs of a row kernel for an ignored row.
IGNORED_ROW = RowOutputs(0, 0, 1, 0, -1, 0)


class Selection:
    """The valid rows of `target` (N,) or (N, V), in order, in `slots` slots; with a capacity, surplus slots are empty.

    Without a capacity the valid rows are counted, which synchronises on CUDA. That is impossible while a CUDA graph is
    captured: the capacity is then N.
    """

    def __init__(self, target: Tensor, ignore_index: int, capacity: int | None) -> None:
        self.rows = target.shape[0]
        if target.is_floating_point():  # class probabilities, of which no row is ignored
            self.slots, self.all_rows = self.rows, True
            return
        if capacity is None and target.is_cuda and torch.cuda.is_current_stream_capturing():
            capacity = self.rows
        self.valid = target != ignore_index
        if capacity is None:
            self.index = self.valid.nonzero().view(-1)
            self.empty = None
        else:
            nth = torch.arange(1, min(capacity, self.rows) + 1, device=target.device)
            row_of_nth = torch.searchsorted(self.valid.cumsum(0), nth)
            self.empty = row_of_nth == self.rows
            self.index = row_of_nth.clamp_max(self.rows - 1)
        self.slots = self.index.shape[0]
        self.all_rows = capacity is None and self.slots == self.rows

    @functools.cached_property
    def slot(self) -> Tensor:
        """The slot of each valid row (N,). A valid row beyond the capacity aliases another row's slot; `void_overflow`
        later sets the results to NaN."""
        return (self.valid.cumsum(0) - 1).clamp(0, max(self.slots - 1, 0))

    def to_slots(self, values: Tensor, empty: float) -> Tensor:
        """Gathers the valid rows of values (N, ...); empty slots hold `empty`. All rows valid: `values` itself."""
        if self.all_rows:
            return values
        slots = values.index_select(0, self.index)
        return slots if self.empty is None else slots.masked_fill_(_broadcast(self.empty, values), empty)

    def to_rows(self, values: Tensor, ignored: float, out: Tensor) -> None:
        """Scatters values (slots, ...) to the valid rows of out (N, ...), and fills the others with `ignored`."""
        if self.all_rows:
            out.copy_(values)
        elif self.slots == 0:
            out.fill_(ignored)
        else:
            torch.index_select(values.to(out.dtype), 0, self.slot, out=out)
            out.masked_fill_(_broadcast(~self.valid, out), ignored)


def check_capacity(function: str, target: Tensor, ignore_index: int, capacity: int | None) -> None:
    """Raises `ValueError` if a CPU target has more valid rows than `capacity`.

    On a GPU the check would synchronise: there `void_overflow` makes the results NaN.
    """
    if capacity is None or target.device.type != "cpu":
        return
    valid = int((target != ignore_index).sum())
    if valid > capacity:
        checks.fail(ValueError, function, "capacity", f"be at least the number of valid rows, {valid}", capacity)


def void_overflow(
    target: Tensor, ignore_index: int, capacity: int | None, scale: Tensor, outputs: RowOutputs | None = None
) -> None:
    """If more rows than `capacity` are valid, makes the scale of the gradients and every output NaN (predictions
    -1)."""
    if capacity is None:
        return
    overflows = (target != ignore_index).sum() > capacity
    for values in (scale, *(outputs or ())):
        values.masked_fill_(overflows, float("nan") if values.is_floating_point() else IGNORED_ROW.prediction)


def _broadcast(mask: Tensor, values: Tensor) -> Tensor:
    """A mask of rows with trailing dimensions of size 1, to broadcast over `values`."""
    return mask.view(-1, *(1,) * (values.dim() - 1))
