"""Modules of latent variables, without a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.modules import Options, options_of
from sslkernels.latent.free_energy import free_energy
from sslkernels.latent.gaussian import GaussianSample, LatentStats, gaussian_kl, gaussian_rsample


class FreeEnergy(Options):
    """Module of `free_energy`: reduces the energies of K candidates along `dim`.

    >>> import sslkernels as sk
    >>> sk.nn.FreeEnergy(beta=5.0)(torch.rand(32, 8)).shape
    torch.Size([32])
    """

    def __init__(self, beta: float = 1.0, dim: int = -1, mode: str = "soft") -> None:
        super().__init__(**options_of(locals()))

    def forward(self, energy: Tensor) -> Tensor:
        return free_energy(energy, **self.options())


class GaussianLatent(Options):
    """Module of `gaussian_rsample`. It samples in training and in evaluation, as bounds over several samples do;
    `sample=False` gives the mean as z (K times, without a copy, where `num_samples` is K) and `gaussian_kl`.

    >>> import sslkernels as sk
    >>> latent = sk.nn.GaussianLatent(kl="mean", free_bits=0.1)
    >>> z, kl = latent(torch.randn(4, 8), torch.randn(4, 8))
    >>> embedding, _ = latent(torch.randn(4, 8), torch.randn(4, 8), sample=False)
    """

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        kl: str | None = "row",
        free_bits: float = 0.0,
        logvar_bounds: tuple[float, float] | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(
        self,
        mean: Tensor,
        logvar: Tensor,
        *,
        prior: tuple[Tensor, Tensor] | None = None,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        sample: bool = True,
    ) -> GaussianSample | tuple[GaussianSample, LatentStats]:
        checks.boolean("GaussianLatent", "sample", sample)
        if sample:
            return gaussian_rsample(
                mean, logvar, prior=prior, row_ids=row_ids, seed=seed, generator=generator, **self.options()
            )
        options = self.options()
        count, reduction = options.pop("num_samples"), options.pop("kl")
        found = gaussian_kl(mean, logvar, prior=prior, reduction=reduction or "row", **options)
        value, *stats = found if self.return_stats else (found,)
        z = mean if count is None else mean.unsqueeze(-2).expand(*mean.shape[:-1], count, mean.shape[-1])
        result = GaussianSample(z, value if reduction is not None else None)
        return (result, *stats) if stats else result
