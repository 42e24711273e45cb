"""Gumbel-softmax in float64, from logits plus the noise of `random_gumbel`, added in the accumulation dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import sslkernels as sk


class RowTruth(NamedTuple):
    """max and index are exact; sum and y are float64."""

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
    """The truth of s (rows, V). A row with NaN or +inf, or nothing but -inf, has the sum NaN."""
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
    grad_usage: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The gradient of <grad, y> plus the sum of <grad_usage[i % G], softmax(logits[i])> over the rows i in the mask, in
    float64."""
    total = torch.zeros(logits.shape, dtype=torch.float64)
    if grad is not None:
        y = reduced(s, tau).y
        total += y * (grad.double() - (grad.double() * y).sum(1, keepdim=True)) / tau
    if grad_usage is not None:
        p = reduced(logits.to(s.dtype), 1.0).y
        u = grad_usage.double().repeat(len(p) // len(grad_usage), 1)
        part = p * (u - (u * p).sum(1, keepdim=True))
        total += part if mask is None else part.masked_fill(~mask[:, None], 0)
    return total


class Quantized(NamedTuple):
    values: Tensor
    indices: Tensor
    code_perplexity: Tensor
    prob_perplexity: Tensor


def perplexity(probability: Tensor) -> Tensor:
    return torch.exp(-torch.sum(probability * torch.log(probability + 1e-7), dim=-1)).sum()


def quantize(
    logits: Tensor,
    codebook: Tensor,
    tau: float,
    hard: bool,
    seed: int | None,
    mask: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Quantized:
    """The quantizer as fairseq and Hugging Face write it, with the one-hot and its product with the codebook, in
    float64: logits (..., G, V), codebook (G, V, D); differentiable. seed None: without noise, as in evaluation."""
    groups, count = logits.shape[-2:]
    numbers = None
    if row_ids is not None:
        numbers = row_ids[..., None] * groups + torch.arange(groups, device=logits.device)
    s = perturbed(logits.detach(), seed, numbers)
    index = s.argmax(-1)
    one_hot = torch.nn.functional.one_hot(index, count).double()
    wide = logits.double()
    y = one_hot
    if seed is not None:
        noise = s.double() - logits.detach().double()  # includes the rounding of the sum
        y = ((wide + noise) / tau).softmax(-1)
        if hard:
            y = one_hot - y.detach() + y
    values = torch.einsum("...gv,gvd->...gd", y, codebook.double()).flatten(-2)
    p = wide.softmax(-1).reshape(-1, groups, count)
    best = torch.nn.functional.one_hot(logits.detach().argmax(-1), count).double().reshape(p.shape)
    if mask is not None:
        p, best = p[mask.flatten()], best[mask.flatten()]
    return Quantized(values, index, perplexity(best.mean(0)), perplexity(p.mean(0)))
