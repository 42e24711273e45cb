"""The squared error of K predictions and its free energy over K, in one pass over the predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function, may_want_gradient, once_differentiable, save, saved, wanted_only
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import operator
from sslkernels.latent.free_energy import Options, check_options, reduce_energies

NAME = "prediction_energy"
NATIVE_OPS = ("prediction_energy_fwd", "prediction_energy_bwd")


class Inputs(NamedTuple):
    """prediction (B, K, D), target (B, D); only the features need be contiguous."""

    prediction: Tensor
    target: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    prediction: bool
    target: bool


class Outputs(NamedTuple):
    """In the accumulation dtype: the free energy (B,), and if wanted (else without elements) its derivatives with
    respect to the energies, weights (B, K)."""

    value: Tensor
    weights: Tensor


class Gradients(NamedTuple):
    """In the dtype of its input; the prediction's also with its strides. Without elements if not wanted."""

    prediction: Tensor
    target: Tensor


def empty_outputs(inputs: Inputs, keep_weights: bool) -> Outputs:
    prediction = inputs.prediction
    batch, count, _ = prediction.shape
    acc = accumulation_dtype(prediction.dtype)
    return Outputs(
        prediction.new_empty(batch, dtype=acc), prediction.new_empty((batch, count) if keep_weights else 0, dtype=acc)
    )


def _empty_gradients(inputs: Inputs, wanted: Wanted) -> Gradients:
    prediction, target = inputs
    return Gradients(
        torch.empty_like(prediction) if wanted.prediction else prediction.new_empty(0),
        target.new_empty(target.shape if wanted.target else 0),
    )


def _fwd(fill: Callable[..., None], inputs: Inputs, options: Options, keep_weights: bool) -> Outputs:
    outputs = empty_outputs(inputs, keep_weights)
    fill(inputs, wanted_only(outputs, (True, keep_weights)), options)
    return outputs


def _bwd(fill: Callable[..., None], grad_value: Tensor, inputs: Inputs, weights: Tensor, wanted: Wanted) -> Gradients:
    gradients = _empty_gradients(inputs, wanted)
    fill(grad_value, inputs, weights, wanted_only(gradients, wanted))
    return gradients


def _fill_reference(inputs: Inputs, outputs: Outputs, options: Options) -> None:
    value, weights = outputs
    energies = (inputs.prediction.to(value.dtype) - inputs.target.to(value.dtype).unsqueeze(1)).square().sum(2)
    found, lowest, total, winner = reduce_energies(energies.unsqueeze(2), options)
    value.copy_(found.squeeze(1))
    if weights is None:
        return
    if options.minimum:
        weights.zero_().scatter_(1, winner, 1)
    else:
        weights.copy_(torch.exp(-options.beta * (energies - lowest)) / total)


def _fill_gradients_reference(grad_value: Tensor, inputs: Inputs, weights: Tensor, gradients: Gradients) -> None:
    coefficient = (2 * grad_value.unsqueeze(1) * weights).unsqueeze(2)
    grad = coefficient * (inputs.prediction.to(weights.dtype) - inputs.target.to(weights.dtype).unsqueeze(1))
    grad = torch.where(coefficient == 0, 0, grad)
    if gradients.prediction is not None:
        gradients.prediction.copy_(grad)
    if gradients.target is not None:
        gradients.target.copy_(0 - grad.sum(1))


def _fill_native(inputs: Inputs, outputs: Outputs, options: Options) -> None:
    torch.ops.sslkernels_native.prediction_energy_fwd(*inputs, *outputs, *options)


def _fill_gradients_native(grad_value: Tensor, inputs: Inputs, weights: Tensor, gradients: Gradients) -> None:
    torch.ops.sslkernels_native.prediction_energy_bwd(grad_value, *inputs, weights, *gradients)


def _fill_triton(*arguments) -> None:
    from sslkernels.latent.triton.prediction_energy import prediction_energy_fwd

    prediction_energy_fwd(*arguments)


def _fill_gradients_triton(*arguments) -> None:
    from sslkernels.latent.triton.prediction_energy import prediction_energy_bwd

    prediction_energy_bwd(*arguments)


FORWARD = {"reference": _fill_reference, "cpu": _fill_native, "triton": _fill_triton, "cuda": _fill_native}
BACKWARD = {
    "reference": _fill_gradients_reference,
    "cpu": _fill_gradients_native,
    "triton": _fill_gradients_triton,
    "cuda": _fill_gradients_native,
}


@operator(NAME, {name: partial(_fwd, fill) for name, fill in FORWARD.items()}, native_ops=NATIVE_OPS)
def prediction_energy_fwd(inputs: Inputs, options: Options, keep_weights: bool) -> Outputs:
    return empty_outputs(inputs, keep_weights)


@operator(NAME, {name: partial(_bwd, fill) for name, fill in BACKWARD.items()}, native_ops=NATIVE_OPS)
def prediction_energy_bwd(grad_value: Tensor, inputs: Inputs, weights: Tensor, wanted: Wanted) -> Gradients:
    return _empty_gradients(inputs, wanted)


class _PredictionEnergy(Function):
    """The free energy of each row of the batch. Saves the inputs and the weights (B, K)."""

    differentiable = 1

    @staticmethod
    def forward(inputs: Inputs, options: Options, keep_weights: bool) -> Outputs:
        return prediction_energy_fwd(inputs, options, keep_weights)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        tensors, _, ctx.has_weights = inputs
        (found,) = outputs
        save(ctx, tensors, found.weights)

    @staticmethod
    def backward(ctx, grads):
        if grads.value is None:
            return None
        if not ctx.has_weights:
            raise RuntimeError(f"{NAME}: forward saw no gradient wanted")
        needs, *_ = _PredictionEnergy.wanted(ctx)
        wanted = Wanted(*needs)
        return (wanted_only(_gradients(grads.value.contiguous(), *saved(ctx), wanted), wanted),)


@once_differentiable(NAME)
def _gradients(grad_value: Tensor, inputs: Inputs, weights: Tensor, wanted: Wanted) -> Gradients:
    return prediction_energy_bwd(grad_value, inputs, weights, wanted)


def prediction_energy(
    prediction: Tensor, target: Tensor, *, beta: float = 1.0, mode: str = "min", reduction: str = "mean"
) -> Tensor:
    """The energy of K predictions of one target, one per latent, reduced over the latents: the error of the best, or a
    soft minimum.

    `E[b, k]` is the sum of `(prediction[b, k] - target[b])**2` over all further dimensions, and row b gives
    `free_energy(E[b])`. Neither the differences `(B, K, ...)` nor K copies of the target are ever materialised: forward
    reads the predictions once and saves K numbers a row, backward reads them once more and writes both gradients in the
    same pass. With `mode="min"` backward reads the winners alone. Sums are in float32 (float64), in a fixed order.

    Args:
        prediction: `(B, K, ...)`; float32, bfloat16, float16 or float64. B and K may be in either order in memory.
        target: `(B, ...)`, of the dtype of `prediction` outside autocast. Either may be frozen.
        beta: inverse temperature of "soft", a number in [1e-37, 1e37].
        mode: "min", whose gradient goes to the prediction with the lowest energy alone (the lowest index among ties),
            the others have exact zeros; or "soft", `-1/beta log mean exp(-beta E)`.
        reduction: "mean" over the batch (NaN if it is empty), "sum", or "none", of shape `(B,)`.

    Returns:
        The loss, float32 (float64 for float64 predictions). A prediction of infinite error has probability 0 and the
        gradient 0, unless all K have; NaN makes its own row NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype or shape, and for K = 0.

    Source: LeCun, "A path towards autonomous machine intelligence", 2022, section 4.3; with "min" it is the winner-
    takes-all loss of Guzman-Rivera, Batra and Kohli, "Multiple choice learning", NeurIPS 2012.

    >>> import sslkernels as sk
    >>> prediction = torch.randn(16, 8, 3, 32, 32, requires_grad=True)  # 8 latents each
    >>> sk.prediction_energy(prediction, torch.randn(16, 3, 32, 32)).backward()
    """
    _check(prediction, target, beta, mode, reduction)
    if prediction.dtype != target.dtype:  # under autocast
        dtype = torch.promote_types(prediction.dtype, target.dtype)
        prediction, target = prediction.to(dtype), target.to(dtype)
    batch, count, *features = prediction.shape
    dim = math.prod(features)
    inputs = Inputs(_unit_stride(prediction.reshape(batch, count, dim)), _unit_stride(target.reshape(batch, dim)))
    keep_weights = may_want_gradient(prediction, target)
    value = _PredictionEnergy.run(inputs, Options(float(beta), mode == "min"), keep_weights).value
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.mean()


def _unit_stride(rows: Tensor) -> Tensor:
    """Makes the features contiguous; the rows keep their strides if they were."""
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
    if target.dtype != prediction.dtype and not checks.autocast(prediction.device):
        must = f"have the dtype of prediction, {prediction.dtype}, outside autocast"
        checks.fail(TypeError, NAME, "target", must, target.dtype)
    check_options(NAME, beta, mode)
    checks.choice(NAME, "reduction", reduction, ("none", "mean", "sum"))
