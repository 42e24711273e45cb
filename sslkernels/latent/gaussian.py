"""Gaussian latent variables: reparameterised samples and the KL divergence to a prior, in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks
from sslkernels.core.autograd import distinct
from sslkernels.latent.gaussian_operators import ELEMENTS, NO_KL, ROWS, Options, gaussian_bwd, gaussian_fwd
from sslkernels.random.seeds import seed_tensor

REDUCTIONS = ("none", "row", "sum", "mean")
ACTIVE_VARIANCE = 0.01  # Burda, Grosse and Salakhutdinov 2016, section 5.2


class GaussianSample(NamedTuple):
    """z and its KL divergence to the prior (None where it was not asked for)."""

    z: Tensor
    kl: Tensor | None


class LatentStats(NamedTuple):
    """Whether z is used. kl_per_dim (D,): the mean over all rows of each column's KL divergence, before free_bits, in
    nats; active_units (0-d, int64): the columns whose `mean_variance` exceeds 0.01 (Burda et al. 2016); mean_variance
    (D,): the variance of `mean` over all rows, unbiased as `torch.var`. Detached."""

    kl_per_dim: Tensor
    active_units: Tensor
    mean_variance: Tensor


class _Gaussian(Function):
    """z, kl and statistics of rows. Nothing is kept but the inputs and the seed: backward regenerates the noise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mean, logvar, prior_mean, prior_logvar, row_ids, seed, samples, samples_first, kl, free_bits, low, high,
        statistics,
    ):  # fmt: skip
        return gaussian_fwd(
            mean, logvar, prior_mean, prior_logvar, row_ids, seed, samples, samples_first, kl, free_bits, low, high,
            statistics,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, samples, samples_first, kl, free_bits, low, high, _ = inputs
        ctx.options = Options(samples, samples_first, kl, free_bits, low, high)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_z, grad_kl, *_):
        options = ctx.options
        grad_z = grad_z if options.samples >= 0 else None
        grad_kl = grad_kl if options.kl != NO_KL else None
        wanted = list(ctx.needs_input_grad[:4])
        if grad_kl is None:
            wanted[2:] = False, False
        if grad_z is None and grad_kl is None:
            wanted = [False] * 4
        saved = ctx.saved_tensors  # activation checkpointing gives them once
        found = [None] * 4
        if wanted[0] and grad_kl is None and options.samples == 1:  # that of z itself
            found[0], wanted[0] = grad_z.reshape(saved[0].shape), False
        if any(wanted):
            grads = [grad if grad is None else grad.contiguous() for grad in (grad_z, grad_kl)]
            computed = _GaussianBackward.apply(*grads, *saved, *options, *wanted)
            found = [c if want else f for c, f, want in zip(computed, found, wanted, strict=True)]
        return *found, *(None,) * 9


class _GaussianBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_z, grad_kl, mean, logvar, prior_mean, prior_logvar, row_ids, seed, samples, samples_first, kl, free_bits,
        low, high, want_mean, want_logvar, want_prior_mean, want_prior_logvar,
    ):  # fmt: skip
        return gaussian_bwd(
            grad_z, grad_kl, mean, logvar, prior_mean, prior_logvar, row_ids, seed, samples, samples_first, kl,
            free_bits, low, high, want_mean, want_logvar, want_prior_mean, want_prior_logvar,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = "gaussian_kl" if inputs[8] < 0 else "gaussian_rsample"

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.name}: double backward is not supported")


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
    return_stats: bool = False,
) -> GaussianSample | tuple[GaussianSample, LatentStats]:
    """Reparameterised samples `z = mean + exp(logvar / 2) * eps` and their KL divergence to the prior, in one pass.

    eps is `random_normal` of the shape of `mean`, sample k for the k-th of K, and is never stored: backward makes it
    anew from the seed, and nothing of the size of `mean` is kept but `mean` and `logvar` themselves (and the prior).
    Rows may lie anywhere, as the halves of `h.chunk(2, -1)` do. Everything is computed in float32 (float64 for
    float64) and rounded once.

    Args:
        mean: `(..., D)`; float32, bfloat16, float16 or float64.
        logvar: the logarithm of the variance, of the shape of `mean`, and of its dtype outside autocast. -inf is a
            standard deviation of 0; one above float32 is inf.
        num_samples: K; None is one sample without a dimension of its own.
        prior: (mean, logvar) of the prior, each of a shape that broadcasts to that of `mean`; None: standard normal.
            Both may require grad. One that all rows share, as `(D,)`, is read as it is; another shape that is not that
            of `mean` is expanded first.
        kl: what is returned of the divergence, in nats: "none" (of the shape of `mean`), "row" (added up over the last
            dimension), "sum" (of all), "mean" (of "row" over the rows; NaN where there are none), or None.
        free_bits: the least that each element adds, in nats: `max(kl, free_bits)` of every column in every row, whose
            gradient below it is 0. (Kingma et al. 2016 take the maximum of averages over a minibatch; for that, apply
            it to the mean over rows of `kl="none"`.)
        logvar_bounds: (low, high): clamps `logvar`; its gradient is 0 outside of them, as that of `torch.clamp`.
        row_ids: int64 `mean.shape[:-1]`: the number of each row for the noise, in place of its flattened index, so
            that a row has its noise whatever the batch or rank it is in.
        seed: of the noise, an int in [-2**63, 2**64) or a 0-d int64 tensor on the device, which the host never reads.
        generator: draws the seed where `seed` is None; torch's default generator of the device if it is None too.
        return_stats: also return `LatentStats`, from the same pass.

    Returns:
        `GaussianSample(z, kl)`: z of the dtype and shape of `mean`, or `(..., K, D)`; kl float32 (float64 for
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
    z, value, stats = _compute(
        name, mean, logvar, prior, kl, free_bits, logvar_bounds, return_stats,
        samples=1 if num_samples is None else num_samples, row_ids=row_ids, seed=seed, generator=generator,
    )  # fmt: skip
    shape = mean.shape if num_samples is None else (*mean.shape[:-1], num_samples, mean.shape[-1])
    sample = GaussianSample(z.reshape(shape), value)
    return sample if stats is None else (sample, stats)


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior: tuple[Tensor, Tensor] | None = None,
    reduction: str = "row",
    free_bits: float = 0.0,
    logvar_bounds: tuple[float, float] | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LatentStats]:
    """KL divergence of `N(mean, exp(logvar))` to the prior, exact near 0 and never negative.

    `(t**2 + expm1(d) - d) / 2` with `d = logvar - prior_logvar` and `t = (mean - prior_mean) exp(-prior_logvar / 2)`,
    in one pass and without a tensor of that size: the divergence of `gaussian_rsample` where no sample is wanted.

    Args:
        mean, logvar, prior, free_bits, logvar_bounds, return_stats: as for `gaussian_rsample`.
        reduction: "none", "row", "sum" or "mean", as `kl` of `gaussian_rsample`.

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
    _, value, stats = _compute(name, mean, logvar, prior, reduction, free_bits, logvar_bounds, return_stats)
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
    z, _, _ = _compute(
        function, mean, logvar, None, None, 0.0, None, False,
        samples=samples, samples_first=True, seed=seed, generator=generator,
    )  # fmt: skip
    return z.reshape(samples, *mean.shape)


def _compute(
    name: str,
    mean: Tensor,
    logvar: Tensor,
    prior: tuple[Tensor, Tensor] | None,
    kl: str | None,
    free_bits: float,
    logvar_bounds: tuple[float, float] | None,
    return_stats: bool,
    *,
    samples: int = -1,
    samples_first: bool = False,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None, LatentStats | None]:
    """z of the operator, the reduced kl and the statistics; samples -1: no z."""
    _check(name, mean, logvar, prior, free_bits, logvar_bounds, row_ids, return_stats)
    low, high = (-math.inf, math.inf) if logvar_bounds is None else map(float, logvar_bounds)
    if samples >= 0:
        seed = seed_tensor(name, seed, generator, mean.device)
    tensors = [mean, logvar] if prior is None else [mean, logvar, *prior]
    dtype = mean.dtype
    for other in tensors:  # they differ under autocast
        dtype = torch.promote_types(dtype, other.dtype)
    rows, columns = mean.shape[:-1].numel(), mean.shape[-1]
    by_row = [t.to(dtype).reshape(rows, columns) for t in tensors[:2]]
    by_row += [_prior_rows(t.to(dtype), mean.shape) for t in tensors[2:]] or [None, None]
    ids = None if row_ids is None else row_ids.reshape(rows).contiguous()
    mode = NO_KL if kl is None else ELEMENTS if kl == "none" else ROWS
    z, value, kl_per_dim, mean_variance = _Gaussian.apply(
        *distinct((*by_row, ids, seed)), samples, samples_first, mode, float(free_bits), low, high, return_stats
    )
    stats = None
    if return_stats:
        stats = LatentStats(kl_per_dim, (mean_variance > ACTIVE_VARIANCE).sum(), mean_variance)
    return z.to(mean.dtype), _reduce(value, kl, mean.shape), stats


def _reduce(value: Tensor, kl: str | None, shape: torch.Size) -> Tensor | None:
    if kl is None:
        return None
    if kl == "sum":
        return value.sum()
    if kl == "mean":
        return value.mean()
    return value.reshape(shape if kl == "none" else shape[:-1])


def _prior_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(1, D) where all rows share it, else (rows, D)."""
    if all(size == 1 for size in tensor.shape[:-1]):
        return tensor.reshape(tensor.shape[-1:]).expand(1, shape[-1])
    return tensor.expand(shape).reshape(shape[:-1].numel(), shape[-1])


def _check(
    name: str,
    mean: Tensor,
    logvar: Tensor,
    prior: tuple[Tensor, Tensor] | None,
    free_bits: float,
    logvar_bounds: tuple[float, float] | None,
    row_ids: Tensor | None,
    return_stats: bool,
) -> None:
    checks.tensor(name, "mean", mean, checks.FLOAT_DTYPES)
    checks.dims(name, "mean", mean, 1, "(..., D)")
    checks.tensor(name, "logvar", logvar, checks.FLOAT_DTYPES)
    checks.shape(name, "logvar", logvar, mean.shape, "that of mean")
    tensors = {"logvar": logvar}
    if prior is not None:
        if not isinstance(prior, (tuple, list)) or len(prior) != 2:
            got = f"{len(prior)} values" if isinstance(prior, (tuple, list)) else type(prior).__name__
            checks.fail(TypeError, name, "prior", "be a pair of tensors, (mean, logvar), or None", got)
        for part, tensor in zip(("prior[0]", "prior[1]"), prior, strict=True):
            checks.tensor(name, part, tensor, checks.FLOAT_DTYPES)
            aligned = zip(reversed(tensor.shape), reversed(mean.shape), strict=False)
            if tensor.dim() > mean.dim() or any(size not in (1, of_mean) for size, of_mean in aligned):
                must = f"have a shape that broadcasts to that of mean, {tuple(mean.shape)}"
                checks.fail(ValueError, name, part, must, tuple(tensor.shape))
            tensors[part] = tensor
    checks.tensor(name, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(name, "row_ids", row_ids, mean.shape[:-1], "mean.shape[:-1]")
    autocast = checks.autocast(mean.device)
    for part, tensor in tensors.items():
        checks.same_device(name, part, tensor, "mean", mean.device)
        if tensor.dtype != mean.dtype and not autocast:
            must = f"have the dtype of mean, {mean.dtype}, outside autocast"
            checks.fail(TypeError, name, part, must, tensor.dtype)
    checks.same_device(name, "row_ids", row_ids, "mean", mean.device)
    checks.number(name, "free_bits", free_bits, low=0.0)
    checks.boolean(name, "return_stats", return_stats)
    if logvar_bounds is not None:
        if not isinstance(logvar_bounds, (tuple, list)) or len(logvar_bounds) != 2:
            checks.fail(TypeError, name, "logvar_bounds", "be two numbers, (low, high), or None", logvar_bounds)
        for bound in logvar_bounds:
            checks.number(name, "logvar_bounds", bound)
        if logvar_bounds[0] > logvar_bounds[1]:
            checks.fail(ValueError, name, "logvar_bounds", "have low <= high", tuple(logvar_bounds))
