"""The free energy of candidates: a soft or a hard minimum of their energies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function, may_want_gradient, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import operator

NAME = "free_energy"
NATIVE_OPS = ("free_energy_fwd", "free_energy_bwd")
MODES = ("soft", "min")
BETA = (1e-37, 1e37)  # beta and 1 / beta are normal numbers of float32


class Options(NamedTuple):
    """minimum: the hard minimum, mode "min"."""

    beta: float
    minimum: bool


class State(NamedTuple):
    """What backward needs of each result (outer, inner). "soft": the lowest energy and the sum of
    exp(-beta (E - lowest)); "min": the index of the lowest energy. The fields of the other mode have no elements."""

    lowest: Tensor
    total: Tensor
    winner: Tensor


class Outputs(NamedTuple):
    """The free energies (outer, inner) of energies (outer, K, inner), and the fields of `State`."""

    value: Tensor
    lowest: Tensor
    total: Tensor
    winner: Tensor

    @property
    def state(self) -> State:
        return State(self.lowest, self.total, self.winner)


def empty_outputs(energy: Tensor, options: Options, keep_state: bool) -> Outputs:
    acc = accumulation_dtype(energy.dtype)
    shape = (energy.shape[0], energy.shape[2])
    soft = shape if keep_state and not options.minimum else 0
    return Outputs(
        energy.new_empty(shape, dtype=acc),
        energy.new_empty(soft, dtype=acc),
        energy.new_empty(soft, dtype=acc),
        energy.new_empty(shape if keep_state and options.minimum else 0, dtype=torch.int64),
    )


def empty_gradient(grad_value: Tensor, energy: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    if energy is not None:
        return torch.empty_like(energy)  # with the strides of the energies
    outer, inner = grad_value.shape
    return grad_value.new_empty((outer, count, inner), dtype=dtype)


def _fwd(fill: Callable[..., None], energy: Tensor, options: Options, keep_state: bool) -> Outputs:
    outputs = empty_outputs(energy, options, keep_state)
    soft, hard = keep_state and not options.minimum, keep_state and options.minimum
    value, lowest, total, winner = outputs
    wanted = Outputs(value, lowest if soft else None, total if soft else None, winner if hard else None)
    fill(energy, wanted, options)
    return outputs


def _bwd(
    fill: Callable[..., None],
    grad_value: Tensor,
    energy: Tensor | None,
    state: State,
    options: Options,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    grad = empty_gradient(grad_value, energy, count, dtype)
    state = State(None, None, state.winner) if options.minimum else State(state.lowest, state.total, None)
    fill(grad_value, energy, state, grad, options)
    return grad


def reduce_energies(energy: Tensor, options: Options, valid: Tensor | None = None) -> Outputs:
    """The definition in plain torch, over dimension 1 of energies in the accumulation dtype. valid: which candidates
    there are; the energies of the others are infinite.

    With d = E - lowest, the sum of exp(-beta d) loses digits where all beta d are small, and the sum of
    1 - exp(-beta d) where many are large. The mean of the latter decides: below 1/2 it is used, above 1/2 the former.
    """
    none = energy.new_empty(0)
    lowest, winner = energy.min(1)
    if options.minimum:
        return Outputs(lowest, none, none, winner)
    beta = options.beta
    lowest = torch.where(energy.isnan(), math.inf, energy).amin(1)
    anchor = lowest.unsqueeze(1)
    excess = torch.where(energy == anchor, 0, energy - anchor)
    x = beta * excess
    near = torch.where(x * x < torch.finfo(x.dtype).eps, excess * (1 - x / 2), -torch.expm1(-x) / beta)
    deficits, exponentials = torch.where(x < 0.5, near, -torch.expm1(-x) / beta), torch.exp(-x)
    count = energy.shape[1]
    if valid is not None:
        count = valid.sum(1)
        deficits, exponentials = (torch.where(valid, terms, 0) for terms in (deficits, exponentials))
    deficit, total = deficits.sum(1) / count, exponentials.sum(1)
    u = beta * deficit
    tiny = u * u < torch.finfo(u.dtype).eps
    small = deficit * torch.where(tiny, 1 + u / 2, -torch.log1p(-u) / u)
    large = -torch.log(total / count) / beta
    return Outputs(lowest + torch.where(u < 0.5, small, large), lowest, total, none)


def _fill_reference(energy: Tensor, outputs: Outputs, options: Options) -> None:
    found = reduce_energies(energy.to(outputs.value.dtype), options)
    for out, result in zip(outputs, found, strict=True):
        if out is not None:
            out.copy_(result)


def _fill_gradient_reference(
    grad_value: Tensor, energy: Tensor | None, state: State, grad: Tensor, options: Options
) -> None:
    if energy is None:
        grad.zero_().scatter_(1, state.winner.unsqueeze(1), grad_value.to(grad.dtype).unsqueeze(1))
    else:
        weight = torch.exp(-options.beta * (energy.to(state.lowest.dtype) - state.lowest.unsqueeze(1)))
        grad.copy_(weight * (grad_value / state.total).unsqueeze(1))


def _fill_native(energy: Tensor, outputs: Outputs, options: Options) -> None:
    torch.ops.sslkernels_native.free_energy_fwd(energy, *outputs, *options)


def _fill_gradient_native(
    grad_value: Tensor, energy: Tensor | None, state: State, grad: Tensor, options: Options
) -> None:
    torch.ops.sslkernels_native.free_energy_bwd(grad_value, energy, *state, grad, options.beta)


def _fill_triton(*arguments) -> None:
    from sslkernels.latent.triton.free_energy import free_energy_fwd

    free_energy_fwd(*arguments)


def _fill_gradient_triton(*arguments) -> None:
    from sslkernels.latent.triton.free_energy import free_energy_bwd

    free_energy_bwd(*arguments)


FORWARD = {"reference": _fill_reference, "cpu": _fill_native, "triton": _fill_triton, "cuda": _fill_native}
BACKWARD = {
    "reference": _fill_gradient_reference,
    "cpu": _fill_gradient_native,
    "triton": _fill_gradient_triton,
    "cuda": _fill_gradient_native,
}


@operator(NAME, {name: partial(_fwd, fill) for name, fill in FORWARD.items()}, native_ops=NATIVE_OPS)
def free_energy_fwd(energy: Tensor, options: Options, keep_state: bool) -> Outputs:
    return empty_outputs(energy, options, keep_state)


@operator(NAME, {name: partial(_bwd, fill) for name, fill in BACKWARD.items()}, native_ops=NATIVE_OPS)
def free_energy_bwd(
    grad_value: Tensor, energy: Tensor | None, state: State, options: Options, count: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of energies of `count` candidates in `dtype`; "min" takes no energies."""
    return empty_gradient(grad_value, energy, count, dtype)


class _FreeEnergy(Function):
    """The free energy of energies (outer, K, inner) of any strides. "min" saves no energies, only the winners."""

    differentiable = 1

    @staticmethod
    def forward(energy: Tensor, options: Options, keep_state: bool) -> Outputs:
        return free_energy_fwd(energy, options, keep_state)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        energy, ctx.options, ctx.has_state = inputs
        (found,) = outputs
        ctx.count, ctx.dtype = energy.shape[1], energy.dtype
        save(ctx, None if ctx.options.minimum else energy, found.state)

    @staticmethod
    def backward(ctx, grads):
        if grads.value is None:
            return None
        if not ctx.has_state:
            raise RuntimeError(f"{NAME}: forward saw no gradient wanted for energy")
        energy, state = saved(ctx)
        return (_gradient(grads.value.contiguous(), energy, state, ctx.options, ctx.count, ctx.dtype),)


@once_differentiable(NAME)
def _gradient(
    grad_value: Tensor, energy: Tensor | None, state: State, options: Options, count: int, dtype: torch.dtype
) -> Tensor:
    return free_energy_bwd(grad_value, energy, state, options, count, dtype)


@checks.with_python_numbers
def free_energy(energy: Tensor, *, beta: float = 1.0, dim: int = -1, mode: str = "soft") -> Tensor:
    """The free energy of K candidates: `-1/beta log mean exp(-beta E)`, or with `mode="min"` the lowest energy.

    `mean` is over `dim`: one candidate has its own energy for free energy, and duplicating all candidates changes
    nothing. A small beta tends to the mean of the energies, a large one to their minimum; both limits keep their
    digits, and so do energies with a large common offset. Energies of any strides are read in place, unless the
    dimensions other than `dim` cannot be merged into two. Backward needs the energies themselves and two numbers a
    result; with `mode="min"` one index a result and no energies.

    Args:
        energy: `(..., K, ...)` with K at `dim`; float32, bfloat16, float16 or float64. +inf is a candidate of
            probability 0; NaN makes its own free energy NaN.
        beta: inverse temperature, a number in [1e-37, 1e37].
        dim: the dimension that is reduced. K = 0 raises `ValueError`.
        mode: "soft", whose gradient is the softmax of `-beta E`; or "min", whose gradient goes to the winner alone, the
            lowest index among ties (the first NaN, if there is one).

    Returns:
        The shape of `energy` without `dim`; float32 (float64 for float64 energies). Where all energies are +inf it is
        +inf, and the gradient of "soft" is NaN there, as with `torch.logsumexp`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range.

    Source: LeCun, "A path towards autonomous machine intelligence", 2022, section 4.3; with `energy = -log_weight` and
    beta 1 it is the negative bound of Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.

    >>> import sslkernels as sk
    >>> energy = torch.rand(32, 8, requires_grad=True)  # 8 latents each
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
    keep_state = may_want_gradient(energy)
    value = _FreeEnergy.run(columns, Options(float(beta), mode == "min"), keep_state).value.reshape(shape)
    return value if order is None else value.permute(order)


def check_options(function: str, beta: float, mode: str) -> None:
    checks.number(function, "beta", beta, low=BETA[0], high=BETA[1])
    checks.choice(function, "mode", mode, MODES)


def _three_dimensional(energy: Tensor, dim: int) -> tuple[Tensor, list[int], list[int] | None]:
    """The energies as (outer, K, inner), a view if one exists; and the shape and then the permutation (None: identity)
    that turn (outer, inner) into the result."""
    sizes = energy.shape
    if energy.is_contiguous():
        before, after = list(sizes[:dim]), list(sizes[dim + 1 :])
        return energy.view(math.prod(before), sizes[dim], math.prod(after)), before + after, None
    outer, inner = _outer_and_inner(energy, dim)
    columns = energy.permute(*outer, dim, *inner)
    columns = columns.reshape(math.prod([sizes[d] for d in outer]), sizes[dim], math.prod([sizes[d] for d in inner]))
    order = outer + inner
    back = [order.index(d) for d in range(energy.dim()) if d != dim]
    return columns, [sizes[d] for d in order], back


def _outer_and_inner(energy: Tensor, dim: int) -> tuple[list[int], list[int]]:
    """The dimensions other than `dim` in two groups, each of which merges into one dimension where that is possible."""
    sizes, strides = energy.shape, energy.stride()
    rest = _by_falling_stride([d for d in range(energy.dim()) if d != dim], strides)
    groups = _merged([d for d in rest if sizes[d] != 1], sizes, strides)
    if len(groups) == 1:
        groups.insert(1 if strides[groups[0][-1]] > strides[dim] else 0, [])
    if len(groups) != 2:  # every other dimension has size 1, or the energies are copied
        return [d for d in rest if strides[d] > strides[dim]], [d for d in rest if strides[d] <= strides[dim]]
    outer, inner = groups
    return [d for d in rest if sizes[d] == 1] + outer, inner


def _by_falling_stride(dims: list[int], strides: tuple[int, ...]) -> list[int]:
    """The dimensions by falling stride, by comparisons alone: torch.compile cannot sort symbolic sizes."""
    ordered: list[int] = []
    for d in dims:
        ordered.insert(len([other for other in ordered if strides[other] >= strides[d]]), d)
    return ordered


def _merged(dims: list[int], sizes: torch.Size, strides: tuple[int, ...]) -> list[list[int]]:
    """Groups of adjacent dimensions that can be viewed as one."""
    groups: list[list[int]] = []
    for d in dims:
        if groups and strides[groups[-1][-1]] == sizes[d] * strides[d]:
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups
