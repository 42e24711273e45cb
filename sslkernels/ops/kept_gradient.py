"""Gradients that a forward computes with its loss and keeps for backward, which multiplies them by grad_output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.dispatch import PREFERENCE, Op
from sslkernels.ops.rows import NativeRows, ReferenceRows, TritonRows

_ROWS = {"reference": ReferenceRows(), "cpu": NativeRows(), "cuda": NativeRows(), "triton": TritonRows()}

scale_gradient = Op(
    "cross_entropy",
    "scale_gradient(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor",
    fake=lambda gradient, scale, dtype: torch.empty_like(gradient, dtype=dtype),
    implementations={name: rows.scaled for name, rows in _ROWS.items()},
    native_ops=("scale_add",),
    prefer=PREFERENCE,
)
scale_gradient_ = Op(
    "cross_entropy",
    "scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()",
    fake=lambda gradient, scale: None,
    implementations={name: rows.scale_ for name, rows in _ROWS.items()},
    native_ops=("scale_add",),
    prefer=PREFERENCE,
)


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, saved: bool = False) -> Tensor:
    """gradient * scale (0-d) in `dtype`, in place where nobody needs the gradient as it is.

    A scale of 1, which is what a loss mostly gets, then costs nothing, and on a GPU the host need not know it.
    saved: the gradient is kept by the graph, which may be retained for another backward.
    """
    if (
        torch.compiler.is_compiling()
        or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (gradient, scale)))
        or torch._C._functorch.is_legacy_batchedtensor(gradient)  # of autograd.grad(is_grads_batched=True)
        or gradient.dtype != dtype
        or (saved and torch._C._autograd._get_current_graph_task_keep_graph())
    ):
        return scale_gradient(gradient, scale, dtype)
    scale_gradient_(gradient, scale)
    return gradient


LEAVES = 7


def kept(function: str, gradient: Tensor, scale: Tensor, dtype: torch.dtype, *leaves: Tensor | None) -> Tensor:
    """`scaled` of a gradient that the graph keeps. leaves: of the loss, so that differentiating it again raises, and is
    not zero."""
    return _KeptGradient.apply(function, gradient, scale, dtype, *leaves, *[None] * (LEAVES - len(leaves)))


class _KeptGradient(Function):
    """Every argument is given: torch.compile takes the place of one that is left out for another's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function, gradient, scale, dtype, leaf0, leaf1, leaf2, leaf3, leaf4, leaf5, leaf6):
        return scaled(gradient, scale, dtype, saved=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.function}: double backward is not supported")
