"""Records of the raw operators of `linear_cross_entropy`; `softmax_rows` has the records of single rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype

NAME = "linear_cross_entropy"


class Operands(NamedTuple):
    """input (N, D), linear_weight (V, D), linear_bias (V,), target (N,) or class probabilities (N, V), class weights
    `weight` (V,)."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None


class PlanOptions(NamedTuple):
    """How the logits are computed. capacity, workspace_bytes: the caller's bounds of the number of valid rows and of
    the bytes of the logits buffer, None for unbounded. group: name of the process group over which the vocabulary is
    sliced, None: it is not; sizes: the sizes of all slices, empty if they are still to be exchanged; vocab_start: the
    caller's claim where this rank's slice begins. Target indices, class weights and outputs then count the whole
    vocabulary; linear_weight, linear_bias and class probabilities this rank's slice."""

    compute_dtype: torch.dtype
    capacity: int | None
    workspace_bytes: int | None
    group: str | None = None
    sizes: tuple[int, ...] = ()
    vocab_start: int | None = None


class Wanted(NamedTuple):
    """Which gradients to compute."""

    input: bool
    linear_weight: bool
    linear_bias: bool


class Gradients(NamedTuple):
    """Gradients of the input (N, D) and the weight (V, D) in their dtypes (for a float16 weight in float32, because
    without `scale` it may exceed float16), of the bias (V,) in the accumulation dtype; empty if not wanted. The true
    gradients are these times `scale` (0-d)."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor
    scale: Tensor


def empty_gradients(operands: Operands, wanted: Wanted) -> Gradients:
    """Gradients without values, of scale 1."""
    input, linear_weight = operands.input, operands.linear_weight
    acc = accumulation_dtype(input.dtype)
    weight_dtype = acc if linear_weight.dtype == torch.float16 else linear_weight.dtype
    return Gradients(
        input.new_empty(input.shape if wanted.input else (0, 0)),
        linear_weight.new_empty(linear_weight.shape if wanted.linear_weight else (0, 0), dtype=weight_dtype),
        linear_weight.new_empty(linear_weight.shape[0] if wanted.linear_bias else 0, dtype=acc),
        input.new_ones((), dtype=acc),
    )


def normalise(coefficient: Tensor, scale: Tensor, *dtypes: torch.dtype) -> Tensor:
    """coefficient / scale. `scale` (0-d) holds 1, and stays 1 unless one of `dtypes` is float16."""
    if torch.float16 not in dtypes or coefficient.numel() == 0:
        return coefficient
    largest = coefficient.abs().max()
    scale.copy_(torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0))
    return coefficient / scale
