"""Gaussian latent variables: reparameterised samples and the KL divergence to a prior, in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function, contiguous_rows, once_differentiable, save, saved, wanted_only
from sslkernels.core.overloads import returns_stats
from sslkernels.latent.gaussian_operators import (
    ELEMENTS,
    NO_KL,
    ROWS,
    Gradients,
    Inputs,
    Options,
    OutputGrads,
    Outputs,
    Wanted,
    gaussian_bwd,
    gaussian_fwd,
)
from sslkernels.random.seeds import seed_tensor

REDUCTIONS = ("none", "row", "sum", "mean")
ACTIVE_VARIANCE = 0.01  # Burda, Grosse and Salakhutdinov 2016, section 5.2


class GaussianSample(NamedTuple):
    """z and its KL divergence to the prior, or None for `kl=None`."""

    z: Tensor
    kl: Tensor | None


class LatentStats(NamedTuple):
    """How much z tells of the input: what the encoder writes, not what the decoder reads. Detached.

    A latent that says nothing of the input, drawn from the prior, may still choose among predictions: with the best of
    K samples at a high KL weight no unit is active, and z matters. The statistics of the energy over z measure that, by
    the diversity of the predictions and the hypotheses that win.

    kl_per_dim: `(D,)`, the mean over all rows of each column's KL divergence, before free_bits, in nats.
    active_units: 0-d int64, the number of columns whose `mean_variance` exceeds 0.01 (Burda et al. 2016).
    mean_variance: `(D,)`, the variance of `mean` over all rows, unbiased as in `torch.var`.
    """

    kl_per_dim: Tensor
    active_units: Tensor
    mean_variance: Tensor


class _Gaussian(Function):
    """z, kl and statistics of mean and logvar (..., D). Saves the inputs alone: backward regenerates the noise from the
    seed.

    z is (..., K, D), or (..., D) if not keep_samples, or (K, ..., D) if options.samples_first; kl is (..., D) or (...).
    """

    differentiable = 2

    @staticmethod
    def forward(inputs: Inputs, options: Options, statistics: bool, keep_samples: bool) -> Outputs:
        outputs = gaussian_fwd(_by_row(inputs), options, statistics)
        shape = inputs.mean.shape
        if len(shape) == 2 and keep_samples:
            return outputs
        z, kl, *stats = outputs
        if options.samples >= 0:
            sample_shape = (*shape[:-1], options.samples, shape[-1]) if keep_samples else shape
            z = z.reshape((options.samples, *shape) if options.samples_first else sample_shape)
        if options.kl != NO_KL:
            kl = kl.reshape(shape if options.kl == ELEMENTS else shape[:-1])
        return Outputs(z, kl, *stats)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        tensors, ctx.options, *_ = inputs
        save(ctx, tensors)

    @staticmethod
    def backward(ctx, grads):
        options = ctx.options
        grad_z = grads.z if options.samples >= 0 else None
        grad_kl = grads.kl if options.kl != NO_KL else None
        if grad_z is None and grad_kl is None:
            return None
        needs, *_ = _Gaussian.wanted(ctx)
        has_kl = grad_kl is not None
        wanted = Wanted(needs.mean, needs.logvar, needs.prior_mean and has_kl, needs.prior_logvar and has_kl)
        (inputs,) = saved(ctx)
        # Without the divergence and with one sample, the gradient of z is the gradient of mean.
        same = wanted.mean and not has_kl and options.samples == 1
        wanted = wanted._replace(mean=wanted.mean and not same)
        found = Gradients(None, None, None, None)
        if any(wanted):
            function = "gaussian_kl" if options.samples < 0 else "gaussian_rsample"
            found = wanted_only(_gradients(function, OutputGrads(grad_z, grad_kl), inputs, options, wanted), wanted)
        mean = grad_z.reshape(inputs.mean.shape) if same else found.mean
        return (Inputs(mean, found.logvar, found.prior_mean, found.prior_logvar, None, None),)


@once_differentiable("")
def _gradients(function: str, grads: OutputGrads, inputs: Inputs, options: Options, wanted: Wanted) -> Gradients:
    shape = inputs.mean.shape
    rows, columns = shape[:-1].numel(), shape[-1]
    grad_z, grad_kl = grads
    if grad_z is not None:
        z_shape = (options.samples, rows, columns) if options.samples_first else (rows, options.samples, columns)
        grad_z = contiguous_rows(grad_z.reshape(z_shape))
    if grad_kl is not None:
        grad_kl = contiguous_rows(grad_kl.reshape(rows, columns)) if options.kl == ELEMENTS else grad_kl.reshape(rows)
    found = gaussian_bwd(OutputGrads(grad_z, grad_kl), _by_row(inputs), options, wanted)
    if len(shape) == 2:
        return found
    mean, logvar, prior_mean, prior_logvar = found
    return Gradients(
        mean.reshape(shape) if wanted.mean else mean,
        logvar.reshape(shape) if wanted.logvar else logvar,
        prior_mean,
        prior_logvar,
    )


def _by_row(inputs: Inputs) -> Inputs:
    """The inputs with mean and logvar as (rows, D), as the others are already."""
    mean, logvar, *others = inputs
    if mean.dim() == 2:
        return inputs
    rows = (mean.shape[:-1].numel(), mean.shape[-1])
    return Inputs(mean.reshape(rows), logvar.reshape(rows), *others)


@checks.with_python_numbers
@returns_stats(GaussianSample, LatentStats)
def gaussian_rsample(
    mean: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    prior: tuple[Tensor, Tensor] | None = None,
    kl: str | None = "row",
    free_bits: float = 0.0,
    logvar_bounds: tuple[float, float] | None = None,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    on_empty: str = "nan",
    return_stats: bool = False,
) -> GaussianSample | tuple[GaussianSample, LatentStats]:
    """Reparameterised samples `z = mean + exp(logvar / 2) * eps` and their KL divergence to the prior, in one pass.

    eps is `random_normal` in the shape of `mean`, with `sample=k` for the k-th of K samples. It is never stored:
    backward regenerates it from the seed, and saves no tensor of this size but `mean`, `logvar` and the prior. Rows may
    have any stride, as the halves of `h.chunk(2, -1)` do. Everything is computed in float32 (float64 for float64) and
    rounded once.

    Args:
        mean: `(..., D)`; float32, bfloat16, float16 or float64.
        logvar: the logarithm of the variance, of the shape of `mean`, and of its dtype outside autocast. -inf is a
            standard deviation of 0; one above float32 is inf.
        num_samples: K; None is one sample without a dimension of its own.
        prior: (mean, logvar) of the prior, each of a shape that broadcasts to that of `mean`; None: standard normal.
            Both may require grad. A prior that all rows share, as `(D,)`, is read in place; any other shape than that
            of `mean` is expanded first.
        kl: the reduction of the divergence, in nats: "none" (the shape of `mean`), "row" (sum over the last dimension),
            "sum" (over all), "mean" (of "row" over the rows), or None for no divergence.
        free_bits: the least that each element adds, in nats: `max(kl, free_bits)` of every column in every row, with
            gradient 0 below it. (Kingma et al. 2016 take the maximum of averages over a minibatch; for that, apply
            it to the mean over rows of `kl="none"`.)
        logvar_bounds: (low, high): clamps `logvar`; its gradient is 0 outside of them, as in `torch.clamp`.
        row_ids: int64 `mean.shape[:-1]`, the number of each row for the noise in place of its flattened index: a row
            then has the same noise in any batch and on any rank.
        seed: seed of the noise, an int in [-2**63, 2**64) or a 0-d int64 tensor on the device, which the host never
            reads.
        generator: draws the seed if `seed` is None; default torch's generator of the device.
        on_empty: divergence of a mean over no rows: "nan", as in torch, or "zero", with gradients of zero.
        return_stats: also return `LatentStats`, from the same pass.

    Returns:
        `GaussianSample(z, kl)`: z in the dtype and shape of `mean`, or `(..., K, D)`; kl float32 (float64 for
        float64), or None. With `return_stats` the pair (sample, statistics).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014; free bits: Kingma et al., "Improving
    variational inference with inverse autoregressive flow", NeurIPS 2016, appendix C.8.

    >>> import sslkernels as sk
    >>> mean, logvar = torch.randn(4, 32, requires_grad=True).chunk(2, -1)
    >>> z, kl = sk.gaussian_rsample(mean, logvar, seed=0)
    >>> (z.square().sum() + kl.mean()).backward()
    """
    name = "gaussian_rsample"
    checks.integer(name, "num_samples", num_samples, low=0, optional=True)
    checks.choice(name, "kl", kl, (*REDUCTIONS, None))
    draws = _Draws(num_samples, False, row_ids, seed, generator)
    divergence = _Divergence(kl, free_bits, logvar_bounds, on_empty)
    z, value, stats = _compute(name, _Latent(mean, logvar, prior), divergence, draws, return_stats)
    sample = GaussianSample(z, value)
    return sample if stats is None else (sample, stats)


@checks.with_python_numbers
@returns_stats(Tensor, LatentStats)
def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior: tuple[Tensor, Tensor] | None = None,
    reduction: str = "row",
    free_bits: float = 0.0,
    logvar_bounds: tuple[float, float] | None = None,
    on_empty: str = "nan",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LatentStats]:
    """KL divergence of `N(mean, exp(logvar))` to the prior, exact near 0 and never negative.

    `(t**2 + expm1(d) - d) / 2` with `d = logvar - prior_logvar` and `t = (mean - prior_mean) exp(-prior_logvar / 2)`,
    in one pass, materialising neither: the divergence of `gaussian_rsample` without the samples.

    Args:
        mean: `(..., D)`, as for `gaussian_rsample`.
        logvar: as for `gaussian_rsample`.
        prior: as for `gaussian_rsample`.
        reduction: "none", "row", "sum" or "mean", as `kl` of `gaussian_rsample`.
        free_bits: as for `gaussian_rsample`.
        logvar_bounds: as for `gaussian_rsample`.
        on_empty: as for `gaussian_rsample`.
        return_stats: as for `gaussian_rsample`.

    Returns:
        In nats, float32 (float64 for float64). With `return_stats` the pair (divergence, `LatentStats`).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> sk.gaussian_kl(torch.full((1, 1), 1e-6), torch.zeros(1, 1)).item()
    5e-13
    """
    name = "gaussian_kl"
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    divergence = _Divergence(reduction, free_bits, logvar_bounds, on_empty)
    _, value, stats = _compute(name, _Latent(mean, logvar, prior), divergence, None, return_stats)
    return value if stats is None else (value, stats)


def samples_first(
    function: str,
    mean: Tensor,
    logvar: Tensor,
    samples: int,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """z of `gaussian_rsample`, as `(samples, *mean.shape)`."""
    draws = _Draws(samples, True, None, seed, generator)
    z, _, _ = _compute(function, _Latent(mean, logvar, None), _Divergence(None, 0.0, None), draws, False)
    return z


class _Latent(NamedTuple):
    """The arguments of these names: the Gaussian and its prior."""

    mean: Tensor
    logvar: Tensor
    prior: tuple[Tensor, Tensor] | None


class _Divergence(NamedTuple):
    """How the divergence is computed and reduced; reduction None: not at all."""

    reduction: str | None
    free_bits: float
    logvar_bounds: tuple[float, float] | None
    on_empty: str = "nan"


class _Draws(NamedTuple):
    """What is drawn; num_samples None: one sample without a dimension of its own."""

    num_samples: int | None
    samples_first: bool
    row_ids: Tensor | None
    seed: int | Tensor | None
    generator: torch.Generator | None


def _compute(
    name: str, latent: _Latent, divergence: _Divergence, draws: _Draws | None, return_stats: bool
) -> tuple[Tensor, Tensor | None, LatentStats | None]:
    """z (draws None: without elements), the reduced divergence and the statistics."""
    _check(name, latent, divergence, draws, return_stats)
    mean, logvar, prior = latent
    kl, free_bits, bounds, on_empty = divergence
    if kl == "mean" and on_empty == "zero" and mean.shape[:-1].numel() == 0:
        kl = "sum"
    shape, dtype = mean.shape, mean.dtype
    row_ids = seed = None
    samples, keep_samples, first = -1, True, False
    if draws is not None:
        samples, keep_samples, first = draws.num_samples, draws.num_samples is not None, draws.samples_first
        samples = 1 if samples is None else samples
        seed = seed_tensor(name, draws.seed, draws.generator, mean.device)
        if draws.row_ids is not None:
            row_ids = draws.row_ids.reshape(-1).contiguous()
    if any(t.dtype != dtype for t in (logvar, *(prior or ()))):  # under autocast
        for t in (logvar, *(prior or ())):
            dtype = torch.promote_types(dtype, t.dtype)
        mean, logvar = mean.to(dtype), logvar.to(dtype)
    prior_mean, prior_logvar = (None, None) if prior is None else (_prior_rows(t.to(dtype), shape) for t in prior)
    mode = NO_KL if kl is None else ELEMENTS if kl == "none" else ROWS
    low, high = (-math.inf, math.inf) if bounds is None else map(float, bounds)
    outputs = _Gaussian.run(
        Inputs(mean, logvar, prior_mean, prior_logvar, row_ids, seed),
        Options(samples, first, mode, float(free_bits), low, high),
        return_stats,
        keep_samples,
    )
    stats = None
    if return_stats:
        active = (outputs.mean_variance > ACTIVE_VARIANCE).sum()
        stats = LatentStats(outputs.kl_per_dim, active, outputs.mean_variance)
    return outputs.z.to(latent.mean.dtype), _reduce(outputs.kl, kl), stats


def _reduce(value: Tensor, kl: str | None) -> Tensor | None:
    if kl is None:
        return None
    if kl == "sum":
        return value.sum()
    return value.mean() if kl == "mean" else value


def _prior_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(1, D) if all rows share it, else (rows, D)."""
    if all(size == 1 for size in tensor.shape[:-1]):
        return tensor.reshape(tensor.shape[-1:]).expand(1, shape[-1])
    return tensor.expand(shape).reshape(shape[:-1].numel(), shape[-1])


def _check(name: str, latent: _Latent, divergence: _Divergence, draws: _Draws | None, return_stats: bool) -> None:
    mean, logvar, prior = latent
    checks.tensor(name, "mean", mean, checks.FLOAT_DTYPES)
    checks.dims(name, "mean", mean, 1, "(..., D)")
    checks.tensor(name, "logvar", logvar, checks.FLOAT_DTYPES)
    checks.shape(name, "logvar", logvar, mean.shape, "mean.shape")
    tensors = {"logvar": logvar}
    if prior is not None:
        tensors |= _checked_prior(name, mean, prior)
    for part, tensor in tensors.items():
        checks.same_device(name, part, tensor, "mean", mean.device)
        if tensor.dtype != mean.dtype and not checks.autocast(mean.device):
            must = f"have the dtype of mean, {mean.dtype}, outside autocast"
            checks.fail(TypeError, name, part, must, tensor.dtype)
    if draws is not None and draws.row_ids is not None:
        checks.tensor(name, "row_ids", draws.row_ids, (torch.int64,), optional=True)
        checks.shape(name, "row_ids", draws.row_ids, mean.shape[:-1], "mean.shape[:-1]")
        checks.same_device(name, "row_ids", draws.row_ids, "mean", mean.device)
    checks.number(name, "free_bits", divergence.free_bits, low=0.0)
    checks.choice(name, "on_empty", divergence.on_empty, ("nan", "zero"))
    checks.boolean(name, "return_stats", return_stats)
    bounds = divergence.logvar_bounds
    if bounds is not None:
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            checks.fail(TypeError, name, "logvar_bounds", "be two numbers, (low, high), or None", bounds)
        for bound in bounds:
            checks.number(name, "logvar_bounds", bound)
        low, high = bounds
        if low > high:
            checks.fail(ValueError, name, "logvar_bounds", "have low <= high", tuple(bounds))


def _checked_prior(name: str, mean: Tensor, prior: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The tensors of the prior by the names of their arguments."""
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        got = f"{len(prior)} values" if isinstance(prior, (tuple, list)) else type(prior).__name__
        checks.fail(TypeError, name, "prior", "be a pair of tensors, (mean, logvar), or None", got)
    tensors = dict(zip(("prior[0]", "prior[1]"), prior, strict=True))
    for part, tensor in tensors.items():
        checks.tensor(name, part, tensor, checks.FLOAT_DTYPES)
        aligned = zip(reversed(tensor.shape), reversed(mean.shape), strict=False)
        if tensor.dim() > mean.dim() or any(size not in (1, wide) for size, wide in aligned):
            must = f"have a shape that broadcasts to that of mean, {tuple(mean.shape)}"
            checks.fail(ValueError, name, part, must, tuple(tensor.shape))
    return tensors
