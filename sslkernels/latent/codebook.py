"""What moves a codebook without gradients: rows drawn from the data, and exponential averages of the rows of a code.

All of it stays on the device: nothing here waits for a number. Over a process group the batch is the rows of all ranks,
in their order, and each rank gets the same bits: it computes from sums that an all_reduce has made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.latent.vector_quantize import KERNELS, NAME, NATIVE_OPS, code_sums
from sslkernels.random.streams import random_bits

_LARGEST = 2**63 - 1
INITIAL, REVIVAL = 0, 1  # what rows are drawn for: streams that are independent

# The codebook before it moves. An operator of its own: of a graph that also moves the codebook, torch.compile would
# compute a plain copy again in backward, from what the codebook has become.
snapshot = Op(
    NAME,
    "codebook_snapshot(Tensor codebook) -> Tensor",
    fake=torch.empty_like,
    implementations=dict.fromkeys(KERNELS, torch.clone),
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)


class DrawnRows(NamedTuple):
    """rows (count, D): distinct rows of the batch in random order, of which this rank fills in its own, 0 elsewhere;
    known: how many there are, 0-d."""

    rows: Tensor
    known: Tensor


def _seed_of(seed: Tensor, step: Tensor, purpose: int) -> Tensor:
    """The seed of one draw: words of the stream of `seed`, so that no two steps share a counter."""
    low, high = random_bits((1, 2), seed, row_ids=step.reshape(1), sample=purpose)[0].long()
    return (high << 32) | (low & 0xFFFFFFFF)


def draw_rows(input: Tensor, count: int, seed: Tensor, step: Tensor, purpose: int, group: Any) -> DrawnRows:
    """The `count` rows of input (N, D) that have the smallest random keys. A key depends on seed, step, purpose and the
    number of the row in the batch of all ranks, so that it does not matter how that is split. Rows that are not finite
    are not drawn."""
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
    key, place = key.masked_fill(~finite, _LARGEST).sort(stable=True)
    taken = min(rows, count)
    known = finite.sum()
    if group is None:
        drawn = input.new_zeros(count, input.shape[1])
        drawn[:taken] = input[place[:taken]]
        return DrawnRows(drawn, known.clamp(max=count))

    padded = key.new_full((2, count), _LARGEST)
    padded[0, :taken], padded[1, :taken] = key[:taken], number[place[:taken]]
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
    """The values of all ranks, one after the other."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)


def batch_sums(input: Tensor, indices: Tensor, codes: int, drawn: Tensor | None, group: Any) -> tuple[Tensor, ...]:
    """(rows of each code (K,), their sums (K, D), the drawn rows) of all ranks, in the dtype of input. A row that is
    not finite has no code."""
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
    counts, sums, *drawn_of_all = parts
    return counts.squeeze(1), sums, *(drawn_of_all or [None])


def move_averages(
    codebook: Tensor, size: Tensor, sums: Tensor, batch: tuple[Tensor, Tensor], decay: float, eps: float
) -> None:
    """size and sums: decaying averages of rows and their sums by code, moved by those of the batch; codebook: their
    quotient, with Laplace smoothing of the sizes."""
    for average, new in zip((size, sums), batch, strict=True):
        average.mul_(decay).add_(new, alpha=1 - decay)
    total = size.sum()
    smoothed = (size + eps) / (total + eps * size.shape[0]) * total
    codebook.copy_(torch.where(smoothed[:, None] > 0, sums / smoothed[:, None], codebook))


def revive(codebook: Tensor, size: Tensor, sums: Tensor, drawn: DrawnRows, below: float) -> None:
    """A code whose size is less than `below` times the mean becomes a drawn row of the mean size: its averages are
    those of that row, so that the next move keeps it there."""
    mean = size.mean()
    dead = size < below * mean
    place = (dead.cumsum(0) - 1).clamp(min=0)
    used = dead & (place < drawn.known)
    row = drawn.rows[place]
    size.copy_(torch.where(used, mean, size))
    sums.copy_(torch.where(used[:, None], row * mean, sums))
    codebook.copy_(torch.where(used[:, None], row, codebook))


def start_from(codebook: Tensor, drawn: DrawnRows) -> Tensor:
    """The drawn rows as codes, again from the first where they are fewer; the codebook itself where there are none."""
    place = torch.arange(codebook.shape[0], device=codebook.device) % drawn.known.clamp(min=1)
    return torch.where(drawn.known > 0, drawn.rows[place], codebook)
