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
from sslkernels.core.overloads import returns_stats
from sslkernels.latent.free_energy import BETA, Options, reduce_energies

NAME = "prediction_energy"
NATIVE_OPS = ("prediction_energy_fwd", "prediction_energy_bwd")
MODES = ("soft", "min", "mean")
SOFT, MIN, MEAN = range(3)
# Elements of predictions that the diversity converts at a time: in the L2 cache of a CPU, enough for a GPU.
DIVERSITY_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


class PredictionStats(NamedTuple):
    """Which of K hypotheses live, and whether the latent changes the prediction. Detached.

    energies: `(B, K)`, the squared error of each; infinite for those outside the mask.
    winner: `(B,)`, int64, the index of the lowest energy, the first among ties; -1 for a row without hypotheses.
    usage: `(K,)`, int64, the number of rows that each wins. A row with a NaN energy counts for none.
    perplexity: exp of the entropy of `usage`, 0-d: how many hypotheses win, from 1 (collapse) to K.
    diversity: 0-d, the squared distance between two predictions of a row, its mean over pairs and then over the rows
        with at least two hypotheses: 0 if the prediction ignores the latent. NaN if there is no such row.
    """

    energies: Tensor
    winner: Tensor
    usage: Tensor
    perplexity: Tensor
    diversity: Tensor


class Reduction(NamedTuple):
    """How the energies of a row are reduced: the index of the mode in `MODES`."""

    beta: float
    mode: int


class Kept(NamedTuple):
    """What forward gives beside the value: the weights, for backward; energies and diversity, for the statistics."""

    weights: bool
    stats: bool


class Inputs(NamedTuple):
    """prediction (B, K, D), target (B, D); only the features need be contiguous."""

    prediction: Tensor
    target: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    prediction: bool
    target: bool


class Outputs(NamedTuple):
    """In the accumulation dtype: the reduced energy (B,), and if wanted (else without elements) its derivatives with
    respect to the energies, weights (B, K), the energies (B, K), and the diversity of each row (B,)."""

    value: Tensor
    weights: Tensor
    energies: Tensor
    diversity: Tensor


class Filled(NamedTuple):
    """The outputs that a kernel fills; None: not wanted."""

    value: Tensor
    weights: Tensor | None
    energies: Tensor | None


class Gradients(NamedTuple):
    """In the dtype of its input; the prediction's also with its strides. Without elements if not wanted."""

    prediction: Tensor
    target: Tensor


def empty_outputs(inputs: Inputs, kept: Kept) -> Outputs:
    prediction = inputs.prediction
    batch, count, _ = prediction.shape
    shapes = (
        batch,
        (batch, count) if kept.weights else 0,
        (batch, count) if kept.stats else 0,
        batch if kept.stats else 0,
    )
    return Outputs(*(prediction.new_empty(shape, dtype=accumulation_dtype(prediction.dtype)) for shape in shapes))


def _empty_gradients(inputs: Inputs, wanted: Wanted) -> Gradients:
    prediction, target = inputs
    return Gradients(
        torch.empty_like(prediction) if wanted.prediction else prediction.new_empty(0),
        target.new_empty(target.shape if wanted.target else 0),
    )


def _fwd(fill: Callable[..., None], inputs: Inputs, mask: Tensor | None, reduction: Reduction, kept: Kept) -> Outputs:
    """The kernels reduce the energies in the pass that computes them, unless a mask or the mean needs them first."""
    outputs = empty_outputs(inputs, kept)
    value, weights, energies, diversity = outputs
    weights = weights if kept.weights else None
    if mask is None and reduction.mode != MEAN:
        options = Options(reduction.beta, reduction.mode == MIN)
        fill(inputs, Filled(value, weights, energies if kept.stats else None), options)
    else:
        energies = energies if kept.stats else value.new_empty(inputs.prediction.shape[:2])
        fill(inputs, Filled(value, None, energies), Options(1.0, True))
        _reduce(energies, mask, reduction, value, weights)
    if kept.stats:
        _fill_diversity(inputs.prediction, mask, diversity)
    return outputs


def _reduce(energies: Tensor, mask: Tensor | None, reduction: Reduction, value: Tensor, weights: Tensor | None) -> None:
    """Fills value and weights from the energies (B, K), of which those outside the mask become infinite."""
    mask = torch.ones_like(energies, dtype=torch.bool) if mask is None else mask
    energies.masked_fill_(~mask, math.inf)
    has_hypothesis = mask.any(1)
    if reduction.mode == MEAN:
        count = mask.sum(1)
        found = torch.where(mask, energies, 0).sum(1) / count
        weight = (1 / count.to(value.dtype)).unsqueeze(1)
    elif reduction.mode == MIN:
        found, winner = lowest_energies(energies, mask)
        weight = torch.zeros_like(energies).scatter_(1, winner.clamp(min=0).unsqueeze(1), 1)
    else:
        reduced = reduce_energies(energies.unsqueeze(2), Options(reduction.beta, False), mask.unsqueeze(2))
        found = reduced.value.squeeze(1)
        weight = torch.exp(-reduction.beta * (energies - reduced.lowest)) / reduced.total
    value.copy_(torch.where(has_hypothesis, found, math.nan))
    if weights is not None:
        weights.copy_(torch.where(mask, weight, 0))


def lowest_energies(energies: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lowest energy of each row and its index: the first among ties, NaN below all numbers, never one outside the
    mask; -1 for a row without hypotheses."""
    lowest, winner = energies.min(1)
    if mask is None:
        return lowest, winner
    # If all energies are infinite, the first candidate may be one that the mask leaves out.
    winner = torch.where(lowest == math.inf, mask.int().argmax(1), winner)
    return lowest, torch.where(mask.any(1), winner, -1)


def _fill_diversity(prediction: Tensor, mask: Tensor | None, diversity: Tensor) -> None:
    """The mean squared distance of two predictions of a row, from sums over its n predictions p of their differences d
    to the first: 2 (n sum |d|^2 - |sum d|^2) / (n (n - 1)). Differences, not p: they vanish where the predictions
    collapse."""
    batch, count, dim = prediction.shape
    rows = max(DIVERSITY_ELEMENTS[prediction.device.type] // max(count * dim, 1), 1)
    for first in range(0, batch, rows):
        part = slice(first, first + rows)
        d = prediction[part].to(diversity.dtype)
        if mask is None:
            d = d - d[:, :1]
            n = torch.full_like(diversity[part], count)
        else:
            valid = mask[part].unsqueeze(2)
            origin = d.gather(1, valid.int().argmax(1, keepdim=True).expand(-1, 1, dim))
            d = torch.where(valid, d - origin, 0)
            n = mask[part].sum(1).to(diversity.dtype)
        squares, total = d.square().sum((1, 2)), d.sum(1).square().sum(1)
        found = 2 * (n * squares - total).clamp(min=0) / (n * (n - 1))
        diversity[part] = torch.where(n < 2, math.nan, found)


def _bwd(fill: Callable[..., None], grad_value: Tensor, inputs: Inputs, weights: Tensor, wanted: Wanted) -> Gradients:
    gradients = _empty_gradients(inputs, wanted)
    fill(grad_value, inputs, weights, wanted_only(gradients, wanted))
    return gradients


def _fill_reference(inputs: Inputs, filled: Filled, options: Options) -> None:
    value, weights, kept = filled
    energies = (inputs.prediction.to(value.dtype) - inputs.target.to(value.dtype).unsqueeze(1)).square().sum(2)
    if kept is not None:
        kept.copy_(energies)
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


def _fill_native(inputs: Inputs, filled: Filled, options: Options) -> None:
    torch.ops.sslkernels_native.prediction_energy_fwd(*inputs, *filled, *options)


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
def prediction_energy_fwd(inputs: Inputs, mask: Tensor | None, reduction: Reduction, kept: Kept) -> Outputs:
    return empty_outputs(inputs, kept)


@operator(NAME, {name: partial(_bwd, fill) for name, fill in BACKWARD.items()}, native_ops=NATIVE_OPS)
def prediction_energy_bwd(grad_value: Tensor, inputs: Inputs, weights: Tensor, wanted: Wanted) -> Gradients:
    return _empty_gradients(inputs, wanted)


class _PredictionEnergy(Function):
    """The reduced energy of each row of the batch. Saves the inputs and the weights (B, K)."""

    differentiable = 1

    @staticmethod
    def forward(inputs: Inputs, mask: Tensor | None, reduction: Reduction, kept: Kept) -> Outputs:
        return prediction_energy_fwd(inputs, mask, reduction, kept)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        tensors, _, _, kept = inputs
        (found,) = outputs
        ctx.has_weights = kept.weights
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


@checks.with_python_numbers
@returns_stats(Tensor, PredictionStats)
def prediction_energy(
    prediction: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    mode: str = "min",
    reduction: str = "mean",
    mask: Tensor | None = None,
    on_empty: str = "nan",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PredictionStats]:
    """The energy of K predictions of one target, one per latent, reduced over the latents: the error of the best, a
    soft minimum, or the mean.

    `E[b, k]` is the sum of `(prediction[b, k] - target[b])**2` over all further dimensions, and row b gives
    `free_energy(E[b])`, or the mean. Neither the differences `(B, K, ...)` nor K copies of the target are ever
    materialised: forward reads the predictions once and saves K numbers a row, backward reads them once more and writes
    both gradients in the same pass. With `mode="min"` backward reads the winners alone. Sums are in float32 (float64),
    in a fixed order.

    Args:
        prediction: `(B, K, ...)`; float32, bfloat16, float16 or float64. B and K may be in either order in memory.
        target: `(B, ...)`, of the dtype of `prediction` outside autocast. Either may be frozen.
        beta: inverse temperature of "soft", a number in [1e-37, 1e37].
        mode: "min", whose gradient goes to the prediction with the lowest energy alone (the lowest index among ties),
            the others have exact zeros; "soft", `-1/beta log mean exp(-beta E)`; or "mean".
        reduction: "mean" over the batch, "sum", or "none", of shape `(B,)`.
        mask: `(B, K)` bool, True for the hypotheses of a row. The others may hold anything: they change nothing and
            have the gradient 0. A row without hypotheses is NaN, and has no gradient. None: all.
        on_empty: loss of a mean over an empty batch: "nan", as in torch, or "zero", with gradients of zero.
        return_stats: also return `PredictionStats`. It reads the predictions once more, a block of rows at a time.

    Returns:
        The loss, float32 (float64 for float64 predictions), or `(loss, PredictionStats)`. A prediction of infinite
        error has probability 0 and the gradient 0, unless all K have; NaN makes its own row NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype or shape, and for K = 0.

    Source: LeCun, "A path towards autonomous machine intelligence", 2022, section 4.3; with "min" it is the winner-
    takes-all loss of Guzman-Rivera, Batra and Kohli, "Multiple choice learning", NeurIPS 2012.

    >>> import sslkernels as sk
    >>> prediction = torch.randn(16, 8, 3, 32, 32, requires_grad=True)  # 8 latents each
    >>> loss, stats = sk.prediction_energy(prediction, torch.randn(16, 3, 32, 32), return_stats=True)
    >>> loss.backward()
    >>> hypotheses_in_use = stats.perplexity
    """
    _check(prediction, target, mask)
    checks.number(NAME, "beta", beta, low=BETA[0], high=BETA[1])
    checks.choice(NAME, "mode", mode, MODES)
    checks.choice(NAME, "reduction", reduction, ("none", "mean", "sum"))
    checks.choice(NAME, "on_empty", on_empty, ("nan", "zero"))
    checks.boolean(NAME, "return_stats", return_stats)
    if prediction.dtype != target.dtype:  # under autocast
        dtype = torch.promote_types(prediction.dtype, target.dtype)
        prediction, target = prediction.to(dtype), target.to(dtype)
    batch, count, *features = prediction.shape
    dim = math.prod(features)
    inputs = Inputs(
        _contiguous_features(prediction.reshape(batch, count, dim)), _contiguous_features(target.reshape(batch, dim))
    )
    kept = Kept(may_want_gradient(prediction, target), return_stats)
    outputs = _PredictionEnergy.run(inputs, mask, Reduction(float(beta), MODES.index(mode)), kept)
    value = outputs.value
    if reduction != "none":
        add = reduction == "sum" or (on_empty == "zero" and batch == 0)
        value = value.sum() if add else value.mean()
    return (value, _statistics(outputs, mask)) if return_stats else value


def _statistics(outputs: Outputs, mask: Tensor | None) -> PredictionStats:
    energies = outputs.energies
    count = energies.shape[1]
    lowest, winner = lowest_energies(energies, mask)
    counted = ~lowest.isnan() & (winner >= 0)
    zeros = torch.zeros(count, dtype=torch.int64, device=energies.device)
    usage = zeros.scatter_add(0, winner.clamp(min=0), counted.long())
    frequency = usage.float() / usage.sum()
    perplexity = torch.special.entr(frequency).sum().exp()
    pairs = torch.full_like(winner, count) if mask is None else mask.sum(1)
    diversity = torch.where(pairs < 2, 0, outputs.diversity).sum() / (pairs >= 2).sum()
    return PredictionStats(energies, winner, usage, perplexity, diversity)


def _contiguous_features(rows: Tensor) -> Tensor:
    """Makes the features contiguous; the rows keep their strides if they were."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _check(prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
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
    checks.tensor(NAME, "mask", mask, (torch.bool,), optional=True)
    checks.shape(NAME, "mask", mask, (batch, count), "(B, K)")
    checks.same_device(NAME, "mask", mask, "prediction", prediction.device)
