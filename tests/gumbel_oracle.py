"""Gumbel-softmax in float64, of logits and the noise of `random_gumbel` added in the accumulation dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import sslkernels as sk


class RowTruth(NamedTuple):
    """max and index are exact; y, sum in float64."""

    max: Tensor
    sum: Tensor
    index: Tensor
    y: Tensor


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def perturbed(logits: Tensor, seed: int | Tensor | None, row_ids: Tensor | None = None) -> Tensor:
    """logits (..., V) + noise in the accumulation dtype."""
    wide = logits.to(accumulation(logits.dtype))
    if seed is None:
        return wide
    with sk.use_backend("reference"):
        return wide + sk.random_gumbel(logits.shape, seed, row_ids=row_ids, device=logits.device)


def reduced(s: Tensor, tau: float) -> RowTruth:
    """s (rows, V). Rows that hold NaN or +inf or nothing but -inf have the sum NaN."""
    known = s.masked_fill(s.isnan(), -torch.inf)
    largest, index = known.max(1)
    e = ((s.double() - largest.double()[:, None]) / tau).exp()
    total = e.sum(1)
    return RowTruth(largest, total, index, e / total[:, None])


def hard(truth: RowTruth) -> Tensor:
    y = torch.zeros_like(truth.y).scatter_(1, truth.index[:, None], 1)
    return y.masked_fill(truth.sum.isnan()[:, None], torch.nan)


def gradient(
    logits: Tensor,
    s: Tensor,
    tau: float,
    grad: Tensor | None,
    uses: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Of <grad, y> + sum of <uses[i % G], softmax(logits[i])> over the rows i in the mask, in float64."""
    total = torch.zeros(logits.shape, dtype=torch.float64)
    if grad is not None:
        y = reduced(s, tau).y
        total += y * (grad.double() - (grad.double() * y).sum(1, keepdim=True)) / tau
    if uses is not None:
        p = reduced(logits.to(s.dtype), 1.0).y
        u = uses.double().repeat(len(p) // len(uses), 1)
        of_uses = p * (u - (u * p).sum(1, keepdim=True))
        total += of_uses if mask is None else of_uses.masked_fill(~mask[:, None], 0)
    return total
