"""Distributions of `torch.distributions` whose samples and divergences come from the fused ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints, register_kl
from torch.distributions.utils import broadcast_all

from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.latent.gaussian import gaussian_kl, samples_first

__all__ = ["FusedNormal"]


class FusedNormal(Normal):
    """A normal distribution of mean `loc` and variance `exp(logvar)`, to use where `torch.distributions.Normal` is.

    `rsample` is `gaussian_rsample`: the noise is regenerated in backward and never stored, and all samples come from
    one pass over the parameters. Samples are addressed by seed: the last dimension is the column, all others the row,
    and the k-th of the samples, in the order of `sample_shape`, sample k of `random_normal`. `kl_divergence` to another
    `FusedNormal` or to a `Normal`, in either order, is `gaussian_kl`, in float32 for half precision. Everything else is
    that of `Normal`, in terms of `logvar` where that is more exact; it works within `Independent`.

    Args:
        loc: the mean, a tensor or number that broadcasts with `logvar`; float32, bfloat16, float16 or float64.
        logvar: the logarithm of the variance, of the dtype of `loc`.
        scale: the standard deviation, in place of `logvar`, which becomes `2 * log(scale)`.
        validate_args: check the values of parameters and arguments, which on a GPU synchronises; not by default.

    >>> import sslkernels as sk
    >>> loc, logvar = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8, requires_grad=True)
    >>> q = sk.distributions.FusedNormal(loc, logvar)
    >>> z = q.rsample((16,), seed=0)
    >>> p = torch.distributions.Normal(torch.zeros(8), torch.ones(8))
    >>> (z.square().mean() + torch.distributions.kl_divergence(q, p).sum()).backward()
    """

    arg_constraints = {"loc": constraints.real, "logvar": constraints.real}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor | float,
        logvar: Tensor | float | None = None,
        *,
        scale: Tensor | float | None = None,
        validate_args: bool | None = False,
    ) -> None:
        if (logvar is None) == (scale is None):
            got = "neither" if scale is None else "both"
            checks.fail(ValueError, "FusedNormal", "logvar", "be given, or else scale", got)
        given: Any = scale if logvar is None else logvar
        self.loc, spread = broadcast_all(loc, given)
        self.logvar = 2 * spread.log() if logvar is None else spread
        Distribution.__init__(self, self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FusedNormal:
        new = self._get_checked_instance(FusedNormal, _instance)
        new.loc, new.logvar = self.loc.expand(batch_shape), self.logvar.expand(batch_shape)
        Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return (self.logvar / 2).exp()

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """seed, generator: as for `gaussian_rsample`."""
        count = math.prod(sample_shape)
        loc, logvar = _at_least_1d(self.loc), _at_least_1d(self.logvar)
        z = samples_first("FusedNormal", loc, logvar, count, seed=seed, generator=generator)
        return z.reshape(self._extended_shape(torch.Size(sample_shape)))

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        distance = (value - self.loc) * (-self.logvar / 2).exp()
        return -(distance.square() + self.logvar + math.log(2 * math.pi)) / 2

    def entropy(self) -> Tensor:
        return (self.logvar + (1 + math.log(2 * math.pi))) / 2


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


def _parameters(p: Normal) -> tuple[Tensor, Tensor]:
    return p.loc, p.logvar if isinstance(p, FusedNormal) else p.scale


@register_kl(FusedNormal, FusedNormal)
@register_kl(FusedNormal, Normal)
@register_kl(Normal, FusedNormal)
def _kl(p: Normal, q: Normal) -> Tensor:
    tensors = (*_parameters(p), *_parameters(q))
    shaped = [t for t in tensors if t.dim() > 0] or tensors  # as torch promotes: numbers do not widen tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in shaped))
    if not (isinstance(p, FusedNormal) and isinstance(q, FusedNormal)):
        dtype = accumulation_dtype(dtype)  # also for the logarithm of the scale
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    mean, logvar = (_at_least_1d(t.expand(shape)) for t in _mean_and_logvar(p, dtype))
    prior_mean, prior_logvar = (_at_least_1d(t) for t in _mean_and_logvar(q, dtype))
    return gaussian_kl(mean, logvar, prior=(prior_mean, prior_logvar), reduction="none").reshape(shape)


def _mean_and_logvar(p: Normal, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, spread = (t.to(dtype) for t in _parameters(p))
    return mean, spread if isinstance(p, FusedNormal) else 2 * spread.log()
