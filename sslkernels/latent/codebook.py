"""Updates of a codebook without gradients: rows drawn from the data, and exponential averages of the rows of a code.

Nothing synchronises with the host. Over a process group the batch is the rows of all ranks, in rank order, and every
rank gets the same bits, because it computes from the results of an all_reduce.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core.operator import operator
from sslkernels.latent.vector_quantize import KERNELS, NAME, NATIVE_OPS, code_sums
from sslkernels.random.streams import random_bits

_LARGEST = 2**63 - 1
INITIAL, REVIVAL = 0, 1  # the purposes of a draw, each an independent stream


@operator(NAME, dict.fromkeys(KERNELS, torch.clone), native_ops=NATIVE_OPS)
def codebook_snapshot(codebook: Tensor) -> Tensor:
    """The codebook before it moves. An operator, because torch.compile would recompute a plain copy in backward, from
    the codebook that has moved."""
    return torch.empty_like(codebook)


class DrawnRows(NamedTuple):
    """rows (count, D): distinct rows of the batch in random order, 0 if they are another rank's; known: how many there
    are, 0-d."""

    rows: Tensor
    known: Tensor


class Averages(NamedTuple):
    """The codes (K, D), and decaying averages of the number of rows (K,) and the sum of rows (K, D) of each code."""

    codebook: Tensor
    sizes: Tensor
    sums: Tensor


class BatchSums(NamedTuple):
    """Over all ranks, in the dtype of the rows: the number of rows of each code (K,), their sums (K, D), and the drawn
    rows."""

    sizes: Tensor
    sums: Tensor
    drawn: Tensor | None


def _seed_of(seed: Tensor, step: Tensor, purpose: int) -> Tensor:
    """The seed of one draw: two words of the stream of `seed`, so that no two steps share a counter."""
    low, high = random_bits((1, 2), seed, row_ids=step.reshape(1), sample=purpose)[0].long()
    return (high << 32) | (low & 0xFFFFFFFF)


def draw_rows(input: Tensor, count: int, seed: Tensor, step: Tensor, purpose: int, group: Any) -> DrawnRows:
    """The `count` rows of input (N, D) with the smallest random keys. A key depends on seed, step, purpose and the
    number of the row in the batch of all ranks, but not on the split over ranks. Only finite rows are drawn."""
    rows = input.shape[0]
    number = torch.arange(rows, device=input.device)
    if group is not None:
        mine = torch.full((1,), rows, dtype=torch.int64, device=input.device)
        counts = _gathered(mine, group)
        start = counts[: dist.get_rank(group)].sum()
        number = number + start
    low, high = random_bits((rows, 2), _seed_of(seed, step, purpose), row_ids=number).long().unbind(1)
    key = ((high << 32) ^ low) & _LARGEST
    finite = input.isfinite().all(1)
    key, order = key.masked_fill(~finite, _LARGEST).sort(stable=True)
    size = min(rows, count)
    known = finite.sum()
    if group is None:
        drawn = input.new_zeros(count, input.shape[1])
        drawn[:size] = input[order[:size]]
        return DrawnRows(drawn, known.clamp(max=count))

    padded = key.new_full((2, count), _LARGEST)
    padded[0, :size], padded[1, :size] = key[:size], number[order[:size]]
    keys, numbers = _gathered(padded, group).reshape(-1, 2, count).transpose(0, 1).flatten(1)
    numbers = numbers[keys.sort(stable=True).indices[:count]]
    dist.all_reduce(known, group=group)
    known = known.clamp(max=count)
    mine = (numbers >= start) & (numbers < start + rows) & (torch.arange(count, device=input.device) < known)
    if rows == 0:
        return DrawnRows(input.new_zeros(count, input.shape[1]), known)
    drawn = input[torch.where(mine, numbers - start, 0)]
    return DrawnRows(drawn.masked_fill(~mine[:, None], 0), known)


def _gathered(values: Tensor, group: Any) -> Tensor:
    """The values of all ranks, concatenated."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)


def batch_sums(input: Tensor, indices: Tensor, codes: int, drawn: Tensor | None, group: Any) -> BatchSums:
    """A row that is not finite counts for no code."""
    finite = input.isfinite().all(1)
    keys = torch.where(finite, indices, codes)
    counts = torch.zeros(codes + 1, dtype=torch.int64, device=input.device)
    counts = counts.scatter_add_(0, keys, torch.ones_like(keys))[:codes].to(input.dtype)
    parts = [counts[:, None], code_sums(input, keys, codes, input.dtype)]
    parts += [] if drawn is None else [drawn]
    if group is not None:
        packed = torch.cat(parts, 1)
        dist.all_reduce(packed, group=group)
        parts = list(packed.split([part.shape[1] for part in parts], 1))
    counts, sums, *drawn_rows = parts
    return BatchSums(counts.squeeze(1), sums, *(drawn_rows or [None]))


def move_averages(averages: Averages, batch: BatchSums, decay: float, eps: float) -> None:
    """Moves the averages by the batch. A code is the average sum over the average size with Laplace smoothing."""
    codebook, sizes, sums = averages
    sizes.mul_(decay).add_(batch.sizes, alpha=1 - decay)
    sums.mul_(decay).add_(batch.sums, alpha=1 - decay)
    total = sizes.sum()
    smoothed = (sizes + eps) / (total + eps * sizes.shape[0]) * total
    codebook.copy_(torch.where(smoothed[:, None] > 0, sums / smoothed[:, None], codebook))


def revive(averages: Averages, drawn: DrawnRows, below: float) -> None:
    """Replaces each code whose size is less than `below` times the mean by a drawn row. Its averages become the mean
    size and that many times the row, so that the next move keeps the code there."""
    codebook, sizes, sums = averages
    mean = sizes.mean()
    dead = sizes < below * mean
    rank = (dead.cumsum(0) - 1).clamp(min=0)
    revived = dead & (rank < drawn.known)
    row = drawn.rows[rank]
    sizes.copy_(torch.where(revived, mean, sizes))
    sums.copy_(torch.where(revived[:, None], row * mean, sums))
    codebook.copy_(torch.where(revived[:, None], row, codebook))


def start_from(codebook: Tensor, drawn: DrawnRows) -> Tensor:
    """The drawn rows as codes, repeated if they are fewer than the codes; the codebook itself if there are none."""
    index = torch.arange(codebook.shape[0], device=codebook.device) % drawn.known.clamp(min=1)
    return torch.where(drawn.known > 0, drawn.rows[index], codebook)
