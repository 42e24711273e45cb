"""Gradients that a forward computed with its loss, multiplied by grad_output in place where nobody else needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.core.operator import Mutated, operator, plain


def _reference_scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # With one dimension the scale sets the dtype of the product, which on CUDA is only held in registers.
    return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def _native_scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.dtype != dtype and torch.float64 in (gradient.dtype, dtype):
        return _reference_scaled(gradient, scale, dtype)
    result = torch.empty_like(gradient, dtype=dtype)
    torch.ops.sslkernels_native.scale_add(gradient, scale.reshape(1), result, False)
    return result


def _reference_scale_(gradient: Tensor, scale: Tensor) -> None:
    torch.mul(gradient, scale.reshape(1), out=gradient)


def _native_scale_(gradient: Tensor, scale: Tensor) -> None:
    torch.ops.sslkernels_native.scale_add(gradient, scale.reshape(1), gradient, False)


def _triton_scale_(gradient: Tensor, scale: Tensor) -> None:
    from sslkernels.core.triton.scale import scale_

    scale_(gradient, scale)


@operator(
    "cross_entropy",
    {"reference": _reference_scaled, "cpu": _native_scaled, "cuda": _native_scaled, "triton": _reference_scaled},
    native_ops=("scale_add",),
)
def scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale (0-d) in `dtype`, rounded once."""
    return torch.empty_like(gradient, dtype=dtype)


@operator(
    "cross_entropy",
    {"reference": _reference_scale_, "cpu": _native_scale_, "cuda": _native_scale_, "triton": _triton_scale_},
    native_ops=("scale_add",),
)
def scale_gradient_(gradient: Mutated, scale: Tensor) -> None:
    """gradient *= scale (0-d), rounded once."""


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, saved: bool = False) -> Tensor:
    """gradient * scale (0-d) in `dtype`, in place where nobody needs the gradient as it is.

    A scale of 1, which most losses get, then costs nothing; on a GPU the kernel reads it, not the host.
    saved: the graph keeps the gradient, and may be retained for another backward.
    """
    in_place = (
        not torch.compiler.is_compiling()
        and gradient.dtype == dtype
        and plain((gradient, scale))
        and not (saved and torch._C._autograd._get_current_graph_task_keep_graph())
    )
    if not in_place:
        return scale_gradient(gradient, scale, dtype)
    if scale.device.type != "cpu" or scale.item() != 1:
        scale_gradient_(gradient, scale)
    return gradient
