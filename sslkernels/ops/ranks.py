"""Rows of all ranks of a process group, with the gradient of each rank's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class Ranks:
    """How many rows each rank has (read on the host) and where this rank's begin among all."""

    def __init__(self, group: Any, rows: int, device: torch.device) -> None:
        self.group = group
        counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device), group=group)
        self.counts = torch.cat(counts).tolist()
        self.rank = dist.get_rank(group)
        self.start = sum(self.counts[: self.rank])

    def gather(self, values: Tensor) -> Tensor:
        """(rows, ...) of this rank -> (all rows, ...), in the order of the ranks. The gradient of `values` is the sum
        of what all ranks want of them."""
        return _Gather.apply(values, self)

    def own(self, values: Tensor) -> Tensor:
        """The part of `values` (all rows, ...) that is this rank's."""
        return values[self.start : self.start + self.counts[self.rank]]


class _Gather(Function):
    @staticmethod
    def forward(values, ranks):
        most = max(ranks.counts)
        padded = values.new_zeros(most, *values.shape[1:])
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in ranks.counts]
        dist.all_gather(parts, padded, group=ranks.group)
        return torch.cat([part[:count] for part, count in zip(parts, ranks.counts, strict=True)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ranks = inputs[1]
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        # In float32: each rank adds its part.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.ranks.group)
        return ctx.ranks.own(total).to(ctx.dtype), None
