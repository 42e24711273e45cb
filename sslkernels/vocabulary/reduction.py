"""Reductions of row losses: the divisor of a mean, and the checks of the arguments that decide it."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.operator import full
from sslkernels.vocabulary.softmax_rows import RowOptions

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(
    function: str, reduction: str, num_items: int | Tensor | None, on_empty: str, device: torch.device
) -> None:
    checks.choice(function, "reduction", reduction, REDUCTIONS)
    checks.mean_options(function, reduction, num_items, on_empty, "input", device)


def check_weight(function: str, weight: Tensor | None, vocab: int, device: torch.device) -> None:
    """Checks the class weights."""
    checks.tensor(function, "weight", weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(function, "weight", weight, (vocab,), "(V,)")
    checks.same_device(function, "weight", weight, "input", device)
    if weight is not None and weight.requires_grad:
        must = "not require grad (class weights are constants)"
        checks.fail(ValueError, function, "weight", must, "requires_grad=True")


def check_token_weight(
    function: str, token_weight: Tensor | None, shape: tuple[int, ...], device: torch.device, meaning: str
) -> None:
    checks.tensor(function, "token_weight", token_weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(function, "token_weight", token_weight, shape, meaning)
    checks.same_device(function, "token_weight", token_weight, "input", device)


def mean_divisor(
    target: Tensor,
    weight: Tensor | None,
    vocab: int,
    options: RowOptions,
    num_items: int | Tensor | None,
    on_empty: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The divisor of "mean" (0-d), and the class weights that go with it.

    target: indices (N,), or class probabilities (N, V), all of whose rows are valid and which torch divides by N.
    z_loss is not class-weighted, so its part is divided by the number of valid rows: where the divisor would be a sum
    of class weights, the weights are divided by their mean, and the divisor is that number for both parts.
    """
    indices = not target.is_floating_point()
    valid = target != options.ignore_index if indices else None
    count = None
    if valid is not None and (num_items is None or on_empty == "zero"):
        count = valid.count_nonzero()
    elif valid is None:
        count = torch.full((), target.shape[0], dtype=dtype, device=target.device)
    if isinstance(num_items, Tensor):
        divisor = num_items.detach().reshape(()).to(dtype)
    elif num_items is not None:
        divisor = full((), float(num_items), dtype, target.device)
    elif weight is None or valid is None:
        divisor = count
    else:
        index = torch.where(valid, target, 0).clamp(0, vocab - 1).long()
        divisor = torch.where(valid, weight.to(dtype)[index], 0).sum()
        if options.z_loss > 0:
            weight, divisor = weight.to(dtype) * (count / divisor), count
    if on_empty == "zero":
        divisor = torch.where(count == 0, 1, divisor)
    return divisor, weight


def check_probabilities(function: str, ignore_index: int, return_stats: bool) -> None:
    """Checks the arguments that have no meaning with class probabilities."""
    if ignore_index >= 0:
        checks.fail(ValueError, function, "ignore_index", "be negative with class probabilities", ignore_index)
    if return_stats:
        checks.fail(ValueError, function, "return_stats", "be False with class probabilities", True)


def reduced(
    losses: Tensor, token_weight: Tensor | None, divisor: Tensor | None, reduction: str, shape: tuple[int, ...]
) -> Tensor:
    """Reduces the losses of the rows (N,); `shape` is the shape of the rows, divisor None unless it is a mean."""
    if token_weight is not None:
        losses = losses * token_weight.reshape(-1).to(losses.dtype)
    if reduction == "none":
        return losses.reshape(shape)
    loss = losses.sum()
    return loss if divisor is None else loss / divisor
