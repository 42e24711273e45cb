"""The squared error of K predictions and its free energy over K, in one pass over the predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks
from sslkernels.core.autograd import distinct
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.latent.free_energy import check_options, reduced

NAME = "prediction_energy"


class Outputs(NamedTuple):
    """In the accumulation dtype: the free energy (B,), and where asked for (else without elements) its derivatives in
    the energies, weights (B, K)."""

    value: Tensor
    weights: Tensor


def _empty_outputs(prediction: Tensor, target: Tensor, beta: float, minimum: bool, want_weights: bool) -> Outputs:
    batch, count, _ = prediction.shape
    shapes = ((batch,), (batch, count) if want_weights else (0, 0))
    acc = accumulation_dtype(prediction.dtype)
    return Outputs(*(prediction.new_empty(shape, dtype=acc) for shape in shapes))


def _empty_gradients(
    grad_value: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, want_prediction: bool, want_target: bool
) -> tuple[Tensor, Tensor]:
    """That of the predictions lies as they do."""
    return (
        torch.empty_like(prediction) if want_prediction else prediction.new_empty((0, 0, 0)),
        target.new_empty(target.shape if want_target else (0, 0)),
    )


def _fwd(
    fill: Callable[..., None], prediction: Tensor, target: Tensor, beta: float, minimum: bool, want_weights: bool
) -> Outputs:
    outputs = _empty_outputs(prediction, target, beta, minimum, want_weights)
    fill(prediction, target, outputs.value, outputs.weights if want_weights else None, beta, minimum)
    return outputs


def _bwd(
    fill: Callable[..., None],
    grad_value: Tensor,
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    want_prediction: bool,
    want_target: bool,
) -> tuple[Tensor, Tensor]:
    gradients = _empty_gradients(grad_value, prediction, target, weights, want_prediction, want_target)
    wanted = (grad if want else None for grad, want in zip(gradients, (want_prediction, want_target), strict=True))
    fill(grad_value, prediction, target, weights, *wanted)
    return gradients


def _fill_reference(
    prediction: Tensor, target: Tensor, value: Tensor, weights: Tensor | None, beta: float, minimum: bool
) -> None:
    energies = (prediction.to(value.dtype) - target.to(value.dtype).unsqueeze(1)).square().sum(2)
    found, lowest, total, winner = reduced(energies.unsqueeze(2), beta, minimum)
    value.copy_(found.squeeze(1))
    if weights is None:
        return
    if minimum:
        weights.zero_().scatter_(1, winner, 1)
    else:
        weights.copy_(torch.exp(-beta * (energies - lowest)) / total)


def _fill_gradients_reference(
    grad_value: Tensor,
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_prediction: Tensor | None,
    grad_target: Tensor | None,
) -> None:
    coefficient = (2 * grad_value.unsqueeze(1) * weights).unsqueeze(2)
    grad = coefficient * (prediction.to(weights.dtype) - target.to(weights.dtype).unsqueeze(1))
    grad = torch.where(coefficient == 0, 0, grad)
    if grad_prediction is not None:
        grad_prediction.copy_(grad)
    if grad_target is not None:
        grad_target.copy_(0 - grad.sum(1))


def _fill_native(*arguments: Any) -> None:
    torch.ops.sslkernels_native.prediction_energy_fwd(*arguments)


def _fill_gradients_native(*arguments: Any) -> None:
    torch.ops.sslkernels_native.prediction_energy_bwd(*arguments)


def _fill_triton(*arguments: Any) -> None:
    from sslkernels.latent.triton.prediction_energy import prediction_energy_fwd

    prediction_energy_fwd(*arguments)


def _fill_gradients_triton(*arguments: Any) -> None:
    from sslkernels.latent.triton.prediction_energy import prediction_energy_bwd

    prediction_energy_bwd(*arguments)


NATIVE_OPS = ("prediction_energy_fwd", "prediction_energy_bwd")

prediction_energy_fwd = Op(
    NAME,
    "prediction_energy_fwd(Tensor prediction, Tensor target, float beta, bool minimum, bool want_weights) -> "
    "(Tensor, Tensor)",
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
prediction_energy_bwd = Op(
    NAME,
    "prediction_energy_bwd(Tensor grad_value, Tensor prediction, Tensor target, Tensor weights, bool want_prediction, "
    "bool want_target) -> (Tensor, Tensor)",
    fake=_empty_gradients,
    implementations={
        "reference": partial(_bwd, _fill_gradients_reference),
        "cpu": partial(_bwd, _fill_gradients_native),
        "triton": partial(_bwd, _fill_gradients_triton),
        "cuda": partial(_bwd, _fill_gradients_native),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)


class _PredictionEnergy(Function):
    """The free energy of each row of the batch. Kept for backward: the inputs and the weights (B, K)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(prediction, target, beta, minimum, wanted):
        return prediction_energy_fwd(prediction, target, beta, minimum, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        prediction, target, _, _, ctx.computed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(prediction, target, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_value, _):
        wanted = ctx.needs_input_grad[:2]
        grads = (None, None)
        if grad_value is not None and any(wanted):
            if not ctx.computed:
                raise RuntimeError(f"{NAME}: forward saw no gradient wanted")
            grads = _PredictionEnergyBackward.apply(grad_value.contiguous(), *ctx.saved_tensors, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None


class _PredictionEnergyBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad_value, prediction, target, weights, want_prediction, want_target):
        return prediction_energy_bwd(grad_value, prediction, target, weights, want_prediction, want_target)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


def prediction_energy(
    prediction: Tensor, target: Tensor, *, beta: float = 1.0, mode: str = "min", reduction: str = "mean"
) -> Tensor:
    """The energy of K predictions of one target, one a latent, reduced over the latents: the error of the best, or a
    soft minimum.

    `E[b, k]` is the sum of `(prediction[b, k] - target[b])**2` over all further dimensions, and row b gives
    `free_energy(E[b])`. Neither the differences `(B, K, ...)` nor K copies of the target ever exist: forward reads the
    predictions once and keeps K numbers a row, backward reads them once more and writes the gradients of both in the
    same pass. With `mode="min"` backward reads the winners alone. Sums are in float32 (float64), in a fixed order.

    Args:
        prediction: `(B, K, ...)`; float32, bfloat16, float16 or float64. B and K may lie in either order in memory.
        target: `(B, ...)`, of the dtype of `prediction` outside autocast. Either may be frozen.
        beta: inverse temperature of "soft", a number in [1e-37, 1e37].
        mode: "min", whose gradient goes to the prediction with the lowest energy alone (of equals that with the lowest
            index), the others have exact zeros; or "soft", `-1/beta log mean exp(-beta E)`.
        reduction: "mean" over the batch (NaN where it is empty), "sum", or "none", of shape `(B,)`.

    Returns:
        The loss, float32 (float64 for float64 predictions). A prediction of infinite error has probability 0 and the
        gradient 0, unless all K have; NaN makes its own row NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype or shape, and for K = 0.

    Source: LeCun, "A path towards autonomous machine intelligence", 2022, section 4.3; with "min" it is the winner-
    takes-all loss of Guzman-Rivera, Batra and Kohli, "Multiple choice learning", NeurIPS 2012.

    >>> import sslkernels as sk
    >>> prediction = torch.randn(16, 8, 3, 32, 32, requires_grad=True)  # of 8 latents each
    >>> sk.prediction_energy(prediction, torch.randn(16, 3, 32, 32)).backward()
    """
    _check(prediction, target, beta, mode, reduction)
    if prediction.dtype != target.dtype:  # under autocast
        dtype = torch.promote_types(prediction.dtype, target.dtype)
        prediction, target = prediction.to(dtype), target.to(dtype)
    batch, count = prediction.shape[:2]
    dim = math.prod(prediction.shape[2:])
    rows = [_unit_stride(prediction.reshape(batch, count, dim)), _unit_stride(target.reshape(batch, dim))]
    wanted = torch.is_grad_enabled() and (prediction.requires_grad or target.requires_grad)
    value, _ = _PredictionEnergy.apply(*distinct(rows), float(beta), mode == "min", wanted)
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.mean()


def _unit_stride(rows: Tensor) -> Tensor:
    """Features that lie side by side; the rows may lie anywhere."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _check(prediction: Tensor, target: Tensor, beta: float, mode: str, reduction: str) -> None:
    checks.tensor(NAME, "prediction", prediction, checks.FLOAT_DTYPES)
    checks.dims(NAME, "prediction", prediction, 2, "(B, K, ...)")
    checks.tensor(NAME, "target", target, checks.FLOAT_DTYPES)
    batch, count, *features = prediction.shape
    checks.shape(NAME, "target", target, (batch, *features), "(B, ...)")
    checks.same_device(NAME, "target", target, "prediction", prediction.device)
    if count == 0:
        checks.fail(ValueError, NAME, "prediction", "have at least one element along dim 1", tuple(prediction.shape))
    autocast = checks.autocast(prediction.device)
    if target.dtype != prediction.dtype and not autocast:
        must = f"have the dtype of prediction, {prediction.dtype}, outside autocast"
        checks.fail(TypeError, NAME, "target", must, target.dtype)
    check_options(NAME, beta, mode)
    checks.choice(NAME, "reduction", reduction, ("none", "mean", "sum"))
