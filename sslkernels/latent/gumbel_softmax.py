"""Samples of a categorical variable with gradients, a drop-in for `torch.nn.functional.gumbel_softmax`."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import full, operator, plain
from sslkernels.latent.gumbel_rows import (
    HARD,
    NATIVE_OPS,
    SOFT,
    GumbelRows,
    NoisyLogits,
    RowGrads,
    RowOutputs,
    State,
    as_matrix,
    implementations,
)
from sslkernels.random.seeds import seed_tensor

NAME = "gumbel_softmax"
SMALLEST_TAU, LARGEST_TAU = 1e-30, 1e30  # 1 / tau is a normal float32


class Outputs(NamedTuple):
    """y in the shape of the logits, and the state of each row."""

    y: Tensor
    max: Tensor
    sum: Tensor

    @property
    def state(self) -> State:
        return State(self.max, self.sum)


def _empty_outputs(logits: Tensor) -> Outputs:
    acc = accumulation_dtype(logits.dtype)
    rows = logits.shape[0]
    return Outputs(logits.new_empty(logits.shape), logits.new_empty(rows, dtype=acc), logits.new_empty(rows, dtype=acc))


def _fwd(kernels: GumbelRows, source: NoisyLogits, hard: bool) -> Outputs:
    outputs = _empty_outputs(source.logits)
    kernels.forward(source, HARD if hard else SOFT, RowOutputs(outputs.y, None, outputs.state))
    return outputs


def _bwd(kernels: GumbelRows, grad: Tensor, source: NoisyLogits, state: State) -> Tensor:
    grad_logits = source.logits.new_empty(source.logits.shape)
    kernels.backward(RowGrads(grad, None, None), source, state, None, grad_logits)
    return grad_logits


@operator(NAME, implementations(_fwd), native_ops=NATIVE_OPS)
def gumbel_softmax_fwd(source: NoisyLogits, hard: bool) -> Outputs:
    return _empty_outputs(source.logits)


@operator(NAME, implementations(_bwd), native_ops=NATIVE_OPS)
def gumbel_softmax_bwd(grad: Tensor, source: NoisyLogits, state: State) -> Tensor:
    return source.logits.new_empty(source.logits.shape)


class _GumbelSoftmax(Function):
    """Samples along dimension `dim`. Saves the logits as they are, and two numbers a row."""

    differentiable = 1

    @staticmethod
    def forward(source: NoisyLogits, hard: bool, dim: int) -> Outputs:
        moved = source.logits.movedim(dim, -1)
        outputs = gumbel_softmax_fwd(source._replace(logits=as_matrix(moved)), hard)
        return outputs._replace(y=outputs.y.reshape(moved.shape).movedim(-1, dim))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        source, _, ctx.dim = inputs
        (found,) = outputs
        save(ctx, source, found.state)

    @staticmethod
    def backward(ctx, grads):
        if grads.y is None:
            return None
        source, state = saved(ctx)
        return (NoisyLogits(_gradient(grads.y, source, state, ctx.dim), None, None, None),)


@once_differentiable(NAME)
def _gradient(grad: Tensor, source: NoisyLogits, state: State, dim: int) -> Tensor:
    moved = source.logits.movedim(dim, -1)
    rows = gumbel_softmax_bwd(as_matrix(grad.movedim(dim, -1)), source._replace(logits=as_matrix(moved)), state)
    return rows.reshape(moved.shape).movedim(-1, dim)


@checks.with_python_numbers
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
    """Samples `y = softmax((logits + g) / tau)` with Gumbel noise g: its argmax is a draw from softmax(logits).

    The noise is `random_gumbel`, in float32 for any dtype: rows are all dimensions but `dim`, flattened in order, and
    the column is the index along `dim`. Noise and probabilities are computed where they are used, in forward and again
    in backward, which needs the logits, the seed and two numbers a row. With `hard` the result is the one-hot of the
    largest `logits + g` (the lowest index among ties), exactly 0 and 1, and the gradient that of the soft sample
    (straight-through).

    Args:
        logits: unnormalised log-probabilities, of any shape; float32, bfloat16, float16 or float64. -inf is
            probability 0: it is never drawn and has gradient 0.
        tau: temperature, a number in [1e-30, 1e30], or a 0-d floating tensor on the device, which the host does
            not read on a GPU: out of this range it makes y NaN. Small temperatures make y one-hot, and its gradient
            large.
        hard: one-hot samples.
        dim: the dimension of the categories. Unless it is the last one, forward and backward copy the logits with it
            last, and `dim` is last in the memory of y too.
        row_ids: int64 in the shape of logits without `dim`, the number of each row for the noise in place of its
            flattened index: a batch that is split over calls or ranks then gets the noise of the whole batch.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device.
        generator: draws the seed if `seed` is None; default torch's generator of the device.
        eps: without effect, as in torch.

    Returns:
        Tensor in the shape and dtype of logits. A row that holds NaN or +inf, or nothing but -inf, is NaN.

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
        warnings.warn(f"{NAME}: eps is deprecated and has no effect", stacklevel=3)
    if logits.dim() == 0:
        logits = logits.reshape(1)
        return gumbel_softmax(logits, tau, hard, row_ids=row_ids, seed=seed, generator=generator).reshape(())
    inverse_tau = inverse_tau_tensor(NAME, tau, logits.device)
    seed = seed_tensor(NAME, seed, generator, logits.device)
    shape = logits.movedim(dim, -1).shape[:-1]
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, shape, "logits.shape without dim")
    checks.same_device(NAME, "row_ids", row_ids, "logits", logits.device)
    if logits.numel() == 0:
        return logits.clone()
    row_ids = None if row_ids is None else row_ids.reshape(-1).contiguous()
    return _GumbelSoftmax.run(NoisyLogits(logits, seed, row_ids, inverse_tau), hard, dim % dims).y


def inverse_tau_tensor(name: str, tau: float | Tensor, device: torch.device) -> Tensor:
    """1 / tau, 0-d float64 on `device`: a tensor, like the seed, so that a CUDA graph can be replayed with another."""
    if isinstance(tau, Tensor):
        checks.tensor(name, "tau", tau, checks.FLOAT_DTYPES)
        checks.shape(name, "tau", tau, (), "()")
        checks.same_device(name, "tau", tau, "logits", device)
        if tau.requires_grad:
            checks.fail(ValueError, name, "tau", "not require grad", "a tensor that does")
        readable = tau.device.type == "cpu" and not torch.compiler.is_compiling() and plain((tau,))
        if readable and tau.item() < 0:
            checks.fail(ValueError, name, "tau", "not be negative", tau.item())
        tau = tau.double()  # on a GPU the host reads nothing, and a tau out of range becomes NaN
        return torch.where((tau >= SMALLEST_TAU) & (tau <= LARGEST_TAU), tau.reciprocal(), torch.nan)
    checks.number(name, "tau", tau, low=SMALLEST_TAU, high=LARGEST_TAU)
    return full((), tau, torch.float64, device, reciprocal=True)
