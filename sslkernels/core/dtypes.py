"""Dtypes of accumulations and matmuls."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.core import checks


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, losses and statistics: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype_of(
    function: str, input: Tensor, linear_weight: Tensor, names: tuple[str, str] = ("input", "linear_weight")
) -> torch.dtype:
    """The dtype of the matmuls: autocast's where it is enabled, else the dtype that both tensors must have. names: the
    two arguments of the public function."""
    if checks.autocast(input.device) and torch.float64 not in (input.dtype, linear_weight.dtype):
        return torch.get_autocast_dtype(input.device.type)
    if linear_weight.dtype != input.dtype:
        must = f"have the dtype of {names[0]}, {input.dtype}, outside autocast"
        checks.fail(TypeError, function, names[1], must, linear_weight.dtype)
    return input.dtype


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
