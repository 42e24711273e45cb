"""Which rows of a batch are computed: those that are not ignored, moved into consecutive slots.

The number of slots is either that of the valid rows, which must be counted first, or a capacity that the caller gives:
an upper bound, with which no shape depends on the data and nothing synchronises. More valid rows than the capacity are
an error on a CPU; elsewhere every result is NaN.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.vocabulary.softmax_rows import RowOutputs

# What a row kernel gives for an ignored row.
IGNORED_ROW = RowOutputs(0, 0, 1, 0, -1, 0)


class Selection:
    """The valid rows of `target` (N,), in order, in `slots` slots; with a capacity, slots that are left over are empty.

    Without a capacity the valid rows are counted, which on CUDA is a synchronisation. While a CUDA graph is captured
    that is impossible, and the capacity is N.
    """

    def __init__(self, target: Tensor, ignore_index: int, capacity: int | None) -> None:
        self.rows = target.shape[0]
        if capacity is None and target.is_cuda and torch.cuda.is_current_stream_capturing():
            capacity = self.rows
        self.valid = target != ignore_index
        if capacity is None:
            self.index = self.valid.nonzero().squeeze(1)
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

    def take(self, values: Tensor, empty: float) -> Tensor:
        """values (N, ...) in the slots; the empty ones hold `empty`. `values` itself where all rows are valid."""
        if self.all_rows:
            return values
        taken = values.index_select(0, self.index)
        return taken if self.empty is None else taken.masked_fill_(_beside(self.empty, values), empty)

    def spread(self, values: Tensor, ignored: float, out: Tensor) -> None:
        """Writes values (slots, ...) to the rows of out (N, ...) that they belong to, and `ignored` to the others."""
        if self.all_rows:
            out.copy_(values)
        elif self.slots == 0:
            out.fill_(ignored)
        else:
            torch.index_select(values.to(out.dtype), 0, self.slot, out=out)
            out.masked_fill_(_beside(~self.valid, out), ignored)


def check_capacity(function: str, target: Tensor, ignore_index: int, capacity: int | None) -> None:
    """Raises `ValueError` where a CPU target has more valid rows than `capacity`.

    On a GPU this would be a synchronisation: there `void_overflow` makes the results NaN.
    """
    if capacity is None or target.device.type != "cpu":
        return
    valid = int((target != ignore_index).sum())
    if valid > capacity:
        checks.fail(ValueError, function, "capacity", f"be at least the number of valid rows, {valid}", capacity)


def void_overflow(
    target: Tensor, ignore_index: int, capacity: int | None, scale: Tensor, outputs: RowOutputs | None = None
) -> None:
    """Makes the scale of the gradients and every output NaN (a prediction -1) where more rows than `capacity` are
    valid."""
    if capacity is None:
        return
    overflows = (target != ignore_index).sum() > capacity
    for values in (scale, *(outputs or ())):
        values.masked_fill_(overflows, float("nan") if values.is_floating_point() else IGNORED_ROW.prediction)


def _beside(mask: Tensor, values: Tensor) -> Tensor:
    """A mask of rows, of as many dimensions as `values`."""
    return mask.view(-1, *(1,) * (values.dim() - 1))
