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
from sslkernels.core.ranks import over_ranks
from sslkernels.latent.vector_quantize import KERNELS, NAME, NATIVE_OPS, code_sums
from sslkernels.random.streams import random_bits, random_exponential

_LARGEST = 2**63 - 1
INITIAL, REVIVAL = 0, 1  # the purposes of a draw, each an independent stream
SEED_BYTES = 8


@operator(NAME, dict.fromkeys(KERNELS, torch.clone), native_ops=NATIVE_OPS)
def codebook_snapshot(codebook: Tensor) -> Tensor:
    """The codebook before it moves. An operator, because torch.compile would recompute a plain copy in backward, from
    the codebook that has moved."""
    return torch.empty_like(codebook)


def bytes_of_seed(seed: Tensor) -> Tensor:
    """The bytes of a 0-d int64 seed, (8,) float32: a floating buffer, exact in every dtype to which it may be cast, and
    equal to itself when it is averaged."""
    return ((seed >> _byte_shifts(seed.device)) & 255).float()


def seed_of_bytes(seed: Tensor) -> Tensor:
    return (seed.long() << _byte_shifts(seed.device)).sum()


def _byte_shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8 * SEED_BYTES, 8, device=device)


class Rows(NamedTuple):
    """The rows (N, D) of a batch, in the dtype of the codebook, and which of them count (N,): finite ones within the
    mask."""

    values: Tensor
    valid: Tensor


class Draw(NamedTuple):
    """The seed (0-d, int64) and the number of the step (1,), which determine the random numbers of a step."""

    seed: Tensor
    step: Tensor


class Start(NamedTuple):
    """The codes to start from, and `started` (0-d, floating) after it."""

    codebook: Tensor
    started: Tensor


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


def _seed_of(draw: Draw, purpose: int) -> Tensor:
    """The seed of one draw: two words of the stream of `seed`, so that no two steps share a counter."""
    low, high = random_bits((1, 2), draw.seed, row_ids=draw.step.long().reshape(1), sample=purpose)[0].long()
    return (high << 32) | (low & 0xFFFFFFFF)


def draw_rows(rows: Rows, count: int, draw: Draw, purpose: int, group: Any) -> DrawnRows:
    """The `count` valid rows with the smallest random keys. A key depends on seed, step, purpose and the number of the
    row in the batch of all ranks, but not on the split over ranks."""
    input, valid = rows
    rows = input.shape[0]
    number = torch.arange(rows, device=input.device)
    if group is not None:
        mine = torch.full((1,), rows, dtype=torch.int64, device=input.device)
        counts = _gathered(mine, group)
        start = counts[: dist.get_rank(group)].sum()
        number = number + start
    low, high = random_bits((rows, 2), _seed_of(draw, purpose), row_ids=number).long().unbind(1)
    key = ((high << 32) ^ low) & _LARGEST
    key, order = key.masked_fill(~valid, _LARGEST).sort(stable=True)
    size = min(rows, count)
    known = valid.sum()
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


def batch_sums(rows: Rows, indices: Tensor, codes: int, drawn: Tensor | None, group: Any) -> BatchSums:
    input, valid = rows
    keys = torch.where(valid, indices, codes)
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


def move_averages(averages: Averages, batch: BatchSums, decay: float, eps: float, unit: bool) -> None:
    """Moves the averages by the batch. A code is the average sum over the average size with Laplace smoothing; if
    `unit`, it is divided by its norm."""
    codebook, sizes, sums = averages
    sizes.mul_(decay).add_(batch.sizes, alpha=1 - decay)
    sums.mul_(decay).add_(batch.sums, alpha=1 - decay)
    total = sizes.sum()
    smoothed = (sizes + eps) / (total + eps * sizes.shape[0]) * total
    moved, defined = sums / smoothed[:, None], smoothed[:, None] > 0
    if unit:
        moved = unit_rows(moved)
        defined = defined & (moved != 0).any(1, keepdim=True)
    codebook.copy_(torch.where(defined, moved, codebook))


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


def unit_rows(rows: Tensor) -> Tensor:
    """The rows divided by their norms; zeros stay zeros, and no norm overflows."""
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    norm = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1)


def distant_rows(rows: Rows, count: int, seed: Tensor) -> DrawnRows:
    """`count` valid rows by k-means++: each is drawn with a probability proportional to its squared distance to the
    nearest row drawn before. As many are known as there are different rows.

    The least of exponential numbers divided by the weights is such a draw. Nothing is read on the host.
    """
    values, valid = rows
    drawn, known = [], torch.zeros((), dtype=torch.int64, device=values.device)
    weight = valid.to(values.dtype)
    for number in range(count):
        waiting = random_exponential((values.shape[0], 1), seed, sample=number)[:, 0]
        at = torch.where(weight > 0, waiting / weight, float("inf")).argmin()
        known += (weight > 0).any()
        row = values.index_select(0, at.reshape(1))
        drawn.append(row)
        distance = (values - row).square().sum(1).masked_fill(~valid, 0)
        weight = distance if number == 0 else torch.minimum(weight, distance)
    return DrawnRows(torch.cat(drawn), known)


def start(codebook: Tensor, rows: Rows, draw: Draw, kmeans: bool, group: Any) -> Start:
    """The codes of a codebook that starts from the rows of all ranks. It has not started if no row is valid."""
    count = codebook.shape[0]
    if kmeans:
        values = rows.values.masked_fill(~rows.valid[:, None], float("nan"))
        if group is not None:  # k-means++ is serial: every rank draws from all rows
            values = over_ranks(group, values)[0].gather(values)
        if values.shape[0] == 0:
            return Start(codebook.clone(), torch.zeros((), device=codebook.device))
        valid = values.isfinite().all(1)
        drawn = distant_rows(Rows(values.masked_fill(~valid[:, None], 0), valid), count, _seed_of(draw, INITIAL))
        if group is not None and dist.get_rank(group) > 0:
            drawn.rows.zero_()
    else:
        drawn = draw_rows(rows, count, draw, INITIAL, group)
    if group is not None:
        dist.all_reduce(drawn.rows, group=group)
    # Repeated if they are fewer than the codes; the codebook itself if there are none.
    index = torch.arange(count, device=codebook.device) % drawn.known.clamp(min=1)
    any_row = drawn.known > 0
    return Start(torch.where(any_row, drawn.rows[index], codebook), any_row.float())


def _start_once(codebook: Tensor, rows: Rows, started: Tensor, draw: Draw, kmeans: bool) -> Start:
    if (kmeans or started.device.type == "cpu") and started > 0:
        return Start(codebook.clone(), started.to(torch.float32, copy=True))
    before = started > 0
    found = start(codebook, rows, draw, kmeans, None)
    return Start(torch.where(before, codebook, found.codebook), torch.where(before, started.float(), found.started))


@operator(NAME, dict.fromkeys(KERNELS, _start_once), native_ops=NATIVE_OPS)
def start_codebook(codebook: Tensor, rows: Rows, started: Tensor, draw: Draw, kmeans: bool) -> Start:
    """`start` unless the codebook has started; for torch.compile, whose graph cannot branch on that. On a GPU it draws
    the rows in either case, or for k-means++ reads `started` on the host."""
    return Start(torch.empty_like(codebook), torch.empty((), dtype=torch.float32, device=codebook.device))
