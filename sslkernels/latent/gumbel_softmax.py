"""Samples of a categorical variable with gradients, a drop-in for `torch.nn.functional.gumbel_softmax`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.latent.gumbel_rows import (
    HARD,
    NATIVE_OPS,
    SOFT,
    GumbelRows,
    NativeGumbelRows,
    ReferenceGumbelRows,
    State,
    Stream,
    triton_rows,
)
from sslkernels.random.seeds import seed_tensor

NAME = "gumbel_softmax"
LEAST_TAU, MOST_TAU = 1e-30, 1e30  # 1 / tau is a normal float32


def _empty_outputs(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(logits.dtype)
    return logits.new_empty(logits.shape), *(logits.new_empty(logits.shape[0], dtype=acc) for _ in range(2))


def _fwd(
    kernels: Callable[[], GumbelRows],
    logits: Tensor,
    seed: Tensor,
    row_ids: Tensor | None,
    inverse_tau: Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, largest, total = _empty_outputs(logits)
    state = State(largest, total)
    kernels().forward(logits, Stream(seed, row_ids), inverse_tau, HARD if hard else SOFT, y, None, state)
    return y, largest, total


def _bwd(
    kernels: Callable[[], GumbelRows],
    grad: Tensor,
    logits: Tensor,
    seed: Tensor,
    row_ids: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    inverse_tau: Tensor,
) -> Tensor:
    grad_logits = logits.new_empty(logits.shape)
    stream, state = Stream(seed, row_ids), State(row_max, row_sum)
    kernels().backward(grad, None, None, logits, stream, inverse_tau, state, None, grad_logits)
    return grad_logits


def implementations(function: Callable[..., Any]) -> dict[str, Callable[..., Any] | str]:
    """`function` of the kernels of each backend."""
    native = partial(function, NativeGumbelRows)
    reference, triton = partial(function, ReferenceGumbelRows), partial(function, triton_rows)
    return {"reference": reference, "cpu": native, "triton": triton, "cuda": native}


gumbel_softmax_fwd = Op(
    NAME,
    "gumbel_softmax_fwd(Tensor logits, Tensor seed, Tensor? row_ids, Tensor inverse_tau, bool hard) -> "
    "(Tensor, Tensor, Tensor)",
    fake=_empty_outputs,
    implementations=implementations(_fwd),
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)
gumbel_softmax_bwd = Op(
    NAME,
    "gumbel_softmax_bwd(Tensor grad, Tensor logits, Tensor seed, Tensor? row_ids, Tensor row_max, Tensor row_sum, "
    "Tensor inverse_tau) -> Tensor",
    fake=lambda grad, logits, *rest: logits.new_empty(logits.shape),
    implementations=implementations(_bwd),
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)


def as_matrix(tensor: Tensor) -> Tensor:
    """The rows of the last dimension, with unit stride: a view where there is one."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class GumbelSoftmax(Function):
    """Saves the logits as they are, and two numbers a row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, seed, row_ids, inverse_tau, hard, dim):
        moved = logits.movedim(dim, -1)
        y, row_max, row_sum = gumbel_softmax_fwd(as_matrix(moved), seed, row_ids, inverse_tau, hard)
        return y.reshape(moved.shape).movedim(-1, dim), row_max, row_sum

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, seed, row_ids, inverse_tau, _, ctx.dim = inputs
        _, row_max, row_sum = output
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.save_for_backward(logits, seed, row_ids, row_max, row_sum, inverse_tau)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        return _GumbelSoftmaxBackward.apply(grad, *ctx.saved_tensors, ctx.dim), *(None,) * 5


class _GumbelSoftmaxBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, logits, seed, row_ids, row_max, row_sum, inverse_tau, dim):
        moved, grad = logits.movedim(dim, -1), grad.movedim(dim, -1)
        rows = gumbel_softmax_bwd(as_matrix(grad), as_matrix(moved), seed, row_ids, row_max, row_sum, inverse_tau)
        return rows.reshape(moved.shape).movedim(-1, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: float = 1e-10,
) -> Tensor:
    """Samples `y = softmax((logits + g) / tau)` with Gumbel noise g: its largest is drawn from softmax(logits).

    The noise is that of `random_gumbel`, in float32 whatever the dtype: rows are all dimensions but `dim`, flattened in
    order, and the column is the index along `dim`. It is made where it is used, in forward and again in backward, and
    so are the probabilities: what is kept for backward is the logits, the seed and two numbers a row. With `hard` the
    result is the one-hot of the largest `logits + g` (the lowest index of equal ones), exactly 0 and 1, and the
    gradient is that of the soft sample (straight-through).

    Args:
        logits: unnormalised log-probabilities, of any shape; float32, bfloat16, float16 or float64. -inf is
            probability 0: it is never drawn and gets the gradient 0.
        tau: temperature, a number in [1e-30, 1e30], or a 0-d floating tensor on the device, which is never read by the
            host. Small ones make y one-hot, and its gradient large.
        hard: one-hot samples.
        dim: the dimension of the categories. Where it is not the last one, forward and backward copy the logits with
            it last, and y lies in memory so too.
        row_ids: int64 of the shape of logits without `dim`, the number of each row for the noise in place of its
            flattened index: with it a batch that is split over calls or ranks gets the noise of the whole one.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device.
        generator: draws the seed where `seed` is None; torch's default generator of the device if it is None too.
        eps: without effect, as in torch.

    Returns:
        Tensor of the shape and dtype of logits. A row that holds NaN or +inf, or nothing but -inf, is NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: Jang, Gu and Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017; Maddison, Mnih and Teh,
    "The concrete distribution", ICLR 2017.

    >>> import sslkernels as sk
    >>> logits = torch.randn(4, 320, requires_grad=True)
    >>> code = sk.gumbel_softmax(logits, tau=0.5, hard=True) @ torch.randn(320, 16)
    >>> code.sum().backward()
    """
    checks.tensor(NAME, "logits", logits, checks.FLOAT_DTYPES)
    checks.boolean(NAME, "hard", hard)
    checks.integer(NAME, "dim", dim)
    dims = max(logits.dim(), 1)
    if not -dims <= dim < dims:
        checks.fail(ValueError, NAME, "dim", f"be in [{-dims}, {dims - 1}]", dim)
    if eps != 1e-10:
        warnings.warn(f"{NAME}: eps is deprecated and has no effect", stacklevel=2)
    if logits.dim() == 0:
        logits = logits.reshape(1)
        return gumbel_softmax(logits, tau, hard, row_ids=row_ids, seed=seed, generator=generator).reshape(())
    inverse_tau = inverse_tau_tensor(NAME, tau, logits.device)
    seed = seed_tensor(NAME, seed, generator, logits.device)
    shape = logits.movedim(dim, -1).shape[:-1]
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, shape, "that of logits without dim")
    checks.same_device(NAME, "row_ids", row_ids, "logits", logits.device)
    if logits.numel() == 0:
        return logits.clone()
    row_ids = None if row_ids is None else row_ids.reshape(-1).contiguous()
    return GumbelSoftmax.apply(logits, seed, row_ids, inverse_tau, hard, dim % dims)[0]


def inverse_tau_tensor(name: str, tau: float | Tensor, device: torch.device) -> Tensor:
    """1 / tau, 0-d float64 on `device`: data, as the seed is, so that a graph takes another tau."""
    if isinstance(tau, Tensor):
        checks.tensor(name, "tau", tau, checks.FLOAT_DTYPES)
        checks.shape(name, "tau", tau, (), "()")
        checks.same_device(name, "tau", tau, "logits", device)
        if tau.requires_grad:
            checks.fail(ValueError, name, "tau", "not require grad", "a tensor that does")
        return tau.double().reciprocal()
    checks.number(name, "tau", tau, low=LEAST_TAU, high=MOST_TAU)
    if torch.compiler.is_compiling():  # where `full` would make each tau another graph
        return torch.ones((), dtype=torch.float64, device=device) / tau
    return torch.full((), 1.0 / tau, dtype=torch.float64, device=device)
