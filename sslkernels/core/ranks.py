"""Gathers rows from all ranks of a process group, with gradients for the local ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def over_ranks(group: Any, *tensors: Tensor) -> tuple[Ranks, ...]:
    """The `Ranks` of each of `tensors` (rows, ...), which may differ between ranks only in their number of rows: one
    exchange, read on the host.

    Raises `ValueError` on every rank if the ranks disagree about which tensors require grad: some would wait in
    backward for the others.
    """
    rows = [[t.shape[0], int(torch.is_grad_enabled() and t.requires_grad)] for t in tensors]
    local = torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)
    every = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, local, group=group)
    numbers = torch.stack(every).tolist()
    if any(rank[i][1] != numbers[0][i][1] for rank in numbers for i in range(len(tensors))):
        wants = [[bool(flag) for _, flag in rank] for rank in numbers]
        raise ValueError(f"process_group: the ranks must agree on which features require grad; got {wants}")
    rank = dist.get_rank(group)
    return tuple(Ranks(group, rank, [row[i][0] for row in numbers]) for i in range(len(tensors)))


class Ranks:
    """How many rows each rank has; this rank has the rows [start, stop) of all."""

    def __init__(self, group: Any, rank: int, counts: list[int]) -> None:
        self.group = group
        self.counts = counts
        self.start = sum(counts[:rank])
        self.stop = self.start + counts[rank]

    def gather(self, values: Tensor) -> Tensor:
        """(rows, ...) of this rank -> (all rows, ...), in the order of the ranks. The gradient of `values` is the sum
        of the gradients on all ranks."""
        return _Gather.apply(values, self)


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
        # At least float32, because the ranks' gradients are summed.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.ranks.group)
        return total[ctx.ranks.start : ctx.ranks.stop].to(ctx.dtype), None
