"""The posterior of the autoencoders of diffusers, with a fused divergence.

>>> import torch
>>> import sslkernels as sk
>>> posterior = sk.integrations.diffusers.DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4, requires_grad=True))
>>> z = posterior.sample(torch.Generator().manual_seed(0))
>>> (z.square().mean() + posterior.kl().mean()).backward()
"""

from __future__ import annotations

from functools import cached_property

import torch
from diffusers.models.autoencoders import vae as library
from torch import Tensor

from sslkernels.integrations import warn_once
from sslkernels.latent.gaussian import gaussian_kl, gaussian_rsample

__all__ = ["DiagonalGaussianDistribution"]
BOUNDS = (-30.0, 20.0)


class DiagonalGaussianDistribution(library.DiagonalGaussianDistribution):
    """The class of diffusers, with the same samples. `std` and `var` are computed when they are read.

    Args:
        parameters: `(B, 2 C, H, W)`, mean and logarithm of the variance, which is clamped to [-30, 20].
        deterministic: the variance is 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, self._logvar = torch.chunk(parameters, 2, dim=1)

    @cached_property
    def logvar(self) -> Tensor:
        return torch.clamp(self._logvar, *BOUNDS)

    @cached_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @cached_property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None, *, seed: int | Tensor | None = None) -> Tensor:
        """A sample `(B, C, H, W)`. diffusers draws the noise; with `seed` (an int or a 0-d int64 tensor)
        `gaussian_rsample` draws it, and draws it again in backward instead of keeping it."""
        if seed is None or self.deterministic:
            return super().sample(generator)
        rows = self.mean.flatten(1), self._logvar.flatten(1)
        return gaussian_rsample(*rows, kl=None, logvar_bounds=BOUNDS, seed=seed).z.view(self.mean.shape)

    def kl(self, other: library.DiagonalGaussianDistribution | None = None) -> Tensor:
        """The divergence `(B,)` to `other`, by default the standard normal; float32, or float64 for float64."""
        why = None if self.deterministic else self._uncovered(other)
        if why is not None:
            warn_once(self, why)
        if why is not None or self.deterministic:
            return super().kl(other)
        prior = None if other is None else (other.mean.flatten(1), other.logvar.flatten(1))
        return gaussian_kl(self.mean.flatten(1), self._logvar.flatten(1), prior=prior, logvar_bounds=BOUNDS)

    def _uncovered(self, other: library.DiagonalGaussianDistribution | None) -> str | None:
        if self.parameters.dim() != 4:
            return f"a kl of parameters of {self.parameters.dim()} dimensions"
        if other is not None and other.deterministic:
            return "a kl to a deterministic distribution"
        if other is not None and other.mean.shape != self.mean.shape:
            return "a kl to a distribution of another shape"
        return None
