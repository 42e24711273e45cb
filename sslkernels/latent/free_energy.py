"""The free energy of candidates: a soft or a hard minimum of their energies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op

NAME = "free_energy"
MODES = ("soft", "min")
BETA = (1e-37, 1e37)  # it and its inverse are normal numbers of float32


class Outputs(NamedTuple):
    """Of energies (outer, K, inner), each (outer, inner): the free energy; and what backward wants of it (else without
    elements): of "soft" the lowest energy and the sum of exp(-beta (E - lowest)), of "min" the index of the lowest."""

    value: Tensor
    lowest: Tensor
    total: Tensor
    winner: Tensor


def _empty_outputs(energy: Tensor, beta: float, minimum: bool, state: bool) -> Outputs:
    acc = accumulation_dtype(energy.dtype)
    wanted = ((True, acc), (state and not minimum, acc), (state and not minimum, acc), (state and minimum, torch.int64))
    shape = (energy.shape[0], energy.shape[2])
    return Outputs(*(energy.new_empty(shape if want else (0, 0), dtype=dtype) for want, dtype in wanted))


def _empty_gradient(
    grad_value: Tensor,
    energy: Tensor | None,
    lowest: Tensor,
    total: Tensor,
    winner: Tensor,
    count: int,
    dtype: torch.dtype,
    beta: float,
) -> Tensor:
    if energy is not None:
        return torch.empty_like(energy)  # in the order in which the energies lie
    outer, inner = grad_value.shape
    return grad_value.new_empty((outer, count, inner), dtype=dtype)


def _fwd(fill: Callable[..., None], energy: Tensor, beta: float, minimum: bool, state: bool) -> Outputs:
    outputs = _empty_outputs(energy, beta, minimum, state)
    fill(energy, *(part if part.shape == outputs.value.shape else None for part in outputs), beta, minimum)
    return outputs


def _bwd(fill: Callable[..., None], grad_value: Tensor, energy: Tensor | None, *rest: Any) -> Tensor:
    grad = _empty_gradient(grad_value, energy, *rest)
    lowest, total, winner, _, _, beta = rest
    if energy is None:
        fill(grad_value, None, None, None, winner, grad, beta)
    else:
        fill(grad_value, energy, lowest, total, None, grad, beta)
    return grad


def reduced(energy: Tensor, beta: float, minimum: bool) -> Outputs:
    """The reference, over dimension 1 of energies in the dtype of accumulation.

    With d = E - lowest, the sum of exp(-beta d) loses where all beta d are small, and that of 1 - exp(-beta d) where
    many are large: each takes one side, where the mean of the latter is below or above 1/2.
    """
    none = energy.new_empty(0)
    lowest, winner = energy.min(1)
    if minimum:
        return Outputs(lowest, none, none, winner)
    lowest = torch.where(energy.isnan(), math.inf, energy).amin(1)
    anchor = lowest.unsqueeze(1)
    excess = torch.where(energy == anchor, 0, energy - anchor)
    x = beta * excess
    near = torch.where(x * x < torch.finfo(x.dtype).eps, excess * (1 - x / 2), -torch.expm1(-x) / beta)
    deficit = torch.where(x < 0.5, near, -torch.expm1(-x) / beta).mean(1)
    total = torch.exp(-x).sum(1)
    u = beta * deficit
    tiny = u * u < torch.finfo(u.dtype).eps
    small = deficit * torch.where(tiny, 1 + u / 2, -torch.log1p(-u) / u)
    large = -torch.log(total / energy.shape[1]) / beta
    return Outputs(lowest + torch.where(u < 0.5, small, large), lowest, total, none)


def _fill_reference(
    energy: Tensor,
    value: Tensor,
    lowest: Tensor | None,
    total: Tensor | None,
    winner: Tensor | None,
    beta: float,
    minimum: bool,
) -> None:
    found = reduced(energy.to(value.dtype), beta, minimum)
    for out, result in zip((value, lowest, total, winner), found, strict=True):
        if out is not None:
            out.copy_(result)


def _fill_gradient_reference(
    grad_value: Tensor,
    energy: Tensor | None,
    lowest: Tensor | None,
    total: Tensor | None,
    winner: Tensor | None,
    grad: Tensor,
    beta: float,
) -> None:
    if energy is None:
        grad.zero_().scatter_(1, winner.unsqueeze(1), grad_value.to(grad.dtype).unsqueeze(1))
    else:
        weight = torch.exp(-beta * (energy.to(lowest.dtype) - lowest.unsqueeze(1)))
        grad.copy_(weight * (grad_value / total).unsqueeze(1))


def _fill_native(*arguments: Any) -> None:
    torch.ops.sslkernels_native.free_energy_fwd(*arguments)


def _fill_gradient_native(*arguments: Any) -> None:
    torch.ops.sslkernels_native.free_energy_bwd(*arguments)


def _fill_triton(*arguments: Any) -> None:
    from sslkernels.latent.triton.free_energy import free_energy_fwd

    free_energy_fwd(*arguments)


def _fill_gradient_triton(*arguments: Any) -> None:
    from sslkernels.latent.triton.free_energy import free_energy_bwd

    free_energy_bwd(*arguments)


NATIVE_OPS = ("free_energy_fwd", "free_energy_bwd")

free_energy_fwd = Op(
    NAME,
    "free_energy_fwd(Tensor energy, float beta, bool minimum, bool state) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_outputs,
    implementations={
        "reference": partial(_fwd, _fill_reference),
        "cpu": partial(_fwd, _fill_native),
        "triton": partial(_fwd, _fill_triton),
        "cuda": partial(_fwd, _fill_native),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)
free_energy_bwd = Op(
    NAME,
    "free_energy_bwd(Tensor grad_value, Tensor? energy, Tensor lowest, Tensor total, Tensor winner, SymInt count, "
    "ScalarType dtype, float beta) -> Tensor",
    fake=_empty_gradient,
    implementations={
        "reference": partial(_bwd, _fill_gradient_reference),
        "cpu": partial(_bwd, _fill_gradient_native),
        "triton": partial(_bwd, _fill_gradient_triton),
        "cuda": partial(_bwd, _fill_gradient_native),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)


class _FreeEnergy(Function):
    """Of energies (outer, K, inner) with any strides. The hard minimum keeps no energies, only who won."""

    generate_vmap_rule = True

    @staticmethod
    def forward(energy, beta, minimum, wanted):
        return free_energy_fwd(energy, beta, minimum, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        energy, ctx.beta, minimum, ctx.computed = inputs
        _, lowest, total, winner = output
        ctx.mark_non_differentiable(lowest, total, winner)
        ctx.count, ctx.dtype = energy.shape[1], energy.dtype
        ctx.save_for_backward(None if minimum else energy, lowest, total, winner)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_value, *_):
        grad = None
        if grad_value is not None and ctx.needs_input_grad[0]:
            if not ctx.computed:
                raise RuntimeError(f"{NAME}: forward saw no gradient wanted for energy")
            grad = _FreeEnergyBackward.apply(
                grad_value.contiguous(), *ctx.saved_tensors, ctx.count, ctx.dtype, ctx.beta
            )
        return grad, None, None, None


class _FreeEnergyBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad_value, energy, lowest, total, winner, count, dtype, beta):
        return free_energy_bwd(grad_value, energy, lowest, total, winner, count, dtype, beta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


def free_energy(energy: Tensor, *, beta: float = 1.0, dim: int = -1, mode: str = "soft") -> Tensor:
    """The free energy of K candidates: `-1/beta log mean exp(-beta E)`, or with `mode="min"` the lowest energy.

    `mean` is over `dim`: one candidate has its own energy for free energy, and more equal ones change nothing. A small
    beta tends to the mean of the energies, a large one to their minimum; both limits keep their digits, and so do
    energies with a large common offset. The energies are read where they lie, whatever their strides, unless the
    dimensions other than `dim` cannot be merged into two. Nothing of their size is kept for backward but they
    themselves, and with `mode="min"` not even they.

    Args:
        energy: `(..., K, ...)` with K at `dim`; float32, bfloat16, float16 or float64. +inf is a candidate of
            probability 0; NaN makes its own free energy NaN.
        beta: inverse temperature, a number in [1e-37, 1e37].
        dim: the dimension that is reduced. K = 0 raises `ValueError`.
        mode: "soft", whose gradient is the softmax of `-beta E`; or "min", whose gradient goes to the winner alone, the
            one with the lowest index among equals (the first NaN, where there is one).

    Returns:
        The shape of `energy` without `dim`; float32 (float64 for float64 energies). Where all energies are +inf it is
        +inf, and the gradient of "soft" is NaN there, as of `torch.logsumexp`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range.

    Source: LeCun, "A path towards autonomous machine intelligence", 2022, section 4.3; with `energy = -log_weight` and
    beta 1 it is the negative bound of Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.

    >>> import sslkernels as sk
    >>> energy = torch.rand(32, 8, requires_grad=True)  # of 8 latents each
    >>> sk.free_energy(energy, beta=5.0).mean().backward()
    """
    checks.tensor(NAME, "energy", energy, checks.FLOAT_DTYPES)
    checks.dims(NAME, "energy", energy, 1, "(..., K, ...)")
    check_options(NAME, beta, mode)
    checks.integer(NAME, "dim", dim)
    if not -energy.dim() <= dim < energy.dim():
        checks.fail(ValueError, NAME, "dim", f"be in [{-energy.dim()}, {energy.dim() - 1}]", dim)
    dim %= energy.dim()
    if energy.shape[dim] == 0:
        checks.fail(ValueError, NAME, "energy", f"have at least one element along dim {dim}", tuple(energy.shape))
    columns, shape, order = _three_dimensional(energy, dim)
    wanted = torch.is_grad_enabled() and energy.requires_grad
    value, *_ = _FreeEnergy.apply(columns, float(beta), mode == "min", wanted)
    return value.reshape(shape).permute(order)


def check_options(function: str, beta: float, mode: str) -> None:
    checks.number(function, "beta", beta, low=BETA[0], high=BETA[1])
    checks.choice(function, "mode", mode, MODES)


def _three_dimensional(energy: Tensor, dim: int) -> tuple[Tensor, list[int], list[int]]:
    """The energies as (outer, K, inner), a view where one exists; and how to bring (outer, inner) back: to this shape,
    permuted by this order."""
    rest = [d for d in range(energy.dim()) if d != dim]
    sizes, strides = energy.shape, energy.stride()
    if energy.is_contiguous():
        groups = [[d for d in rest if d < dim], [d for d in rest if d > dim]]
    else:
        rest = _by_falling_stride(rest, strides)
        groups = _merged([d for d in rest if sizes[d] != 1], sizes, strides)
        if len(groups) == 1:
            groups.insert(1 if strides[groups[0][-1]] > strides[dim] else 0, [])
        if len(groups) != 2:  # none, or a copy
            groups = [[d for d in rest if strides[d] > strides[dim]], [d for d in rest if strides[d] <= strides[dim]]]
        else:
            groups[0] = [d for d in rest if sizes[d] == 1] + groups[0]
    outer, inner = groups
    columns = energy.permute(*outer, dim, *inner)
    columns = columns.reshape(math.prod([sizes[d] for d in outer]), sizes[dim], math.prod([sizes[d] for d in inner]))
    order = outer + inner
    back = [order.index(d) for d in range(energy.dim()) if d != dim]
    return columns, [sizes[d] for d in order], back


def _by_falling_stride(dims: list[int], strides: tuple[int, ...]) -> list[int]:
    """By comparisons alone: torch.compile sorts no symbolic sizes."""
    ordered: list[int] = []
    for d in dims:
        ordered.insert(len([other for other in ordered if strides[other] >= strides[d]]), d)
    return ordered


def _merged(dims: list[int], sizes: torch.Size, strides: tuple[int, ...]) -> list[list[int]]:
    """Neighbours that lie as one dimension would, together."""
    groups: list[list[int]] = []
    for d in dims:
        if groups and strides[groups[-1][-1]] == sizes[d] * strides[d]:
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups
