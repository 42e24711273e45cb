"""Modules of latent variables: samples, free energies and drawn codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.core.modules import Options, options_of
from sslkernels.latent.free_energy import free_energy
from sslkernels.latent.gaussian import GaussianSample, LatentStats, gaussian_kl, gaussian_rsample
from sslkernels.latent.gumbel_quantize import GumbelQuantized, gumbel_quantize


class FreeEnergy(Options):
    """Module of `free_energy`: reduces the energies of K candidates along `dim`.

    >>> import sslkernels as sk
    >>> sk.nn.FreeEnergy(beta=5.0)(torch.rand(32, 8)).shape
    torch.Size([32])
    """

    @checks.with_python_numbers
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

    @checks.with_python_numbers
    def __init__(
        self,
        num_samples: int | None = None,
        *,
        kl: str | None = "row",
        free_bits: float = 0.0,
        logvar_bounds: tuple[float, float] | None = None,
        on_empty: str = "nan",
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


class GumbelQuantizer(nn.Module):
    """Module of `gumbel_quantize` that holds the codebook: the quantizer of wav2vec 2.0 without its projection.

    In training codes are drawn; in evaluation each row takes the code with its largest logit, without noise, and
    deterministically. `codebook` is a parameter, `(groups, num_codes, dim // groups)`, or `(num_codes, dim)` without
    groups, drawn from [0, 1) as in fairseq.

    Args:
        num_codes: codes per group.
        dim: size of the values, all groups together.
        groups: None takes logits `(..., num_codes)`, a number `(..., groups, num_codes)`.
        tau: temperature, which may be set at any time, or a schedule `(most, least, decay)`, with which
            `set_num_updates` sets `tau` to `max(most * decay**n, least)` after n updates. It is not part of the state.
        hard: as for `gumbel_quantize`.
        return_stats: as for `gumbel_quantize`.
        device: device of the codebook.
        dtype: dtype of the codebook.

    Forward also takes `mask`, `row_ids`, `seed` and `generator`.

    >>> import sslkernels as sk
    >>> project, quantizer = torch.nn.Linear(512, 640), sk.nn.GumbelQuantizer(320, 256, 2, tau=(2.0, 0.5, 0.999995))
    >>> code = quantizer(project(torch.randn(8, 50, 512)).unflatten(-1, (2, 320)))
    >>> quantizer.set_num_updates(1000)
    """

    @checks.with_python_numbers
    def __init__(
        self,
        num_codes: int,
        dim: int,
        groups: int | None = None,
        *,
        tau: float | Tensor | tuple[float, float, float] = 1.0,
        hard: bool = True,
        return_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GumbelQuantizer"
        checks.integer(name, "num_codes", num_codes, low=1)
        checks.integer(name, "dim", dim, low=1)
        checks.integer(name, "groups", groups, low=1, optional=True)
        if groups is not None and dim % groups != 0:
            checks.fail(ValueError, name, "dim", f"be a multiple of groups, {groups}", dim)
        self.schedule = None
        if isinstance(tau, (tuple, list)):
            if len(tau) != 3:
                checks.fail(ValueError, name, "tau", "be a number or (most, least, decay)", tau)
            for value in tau:
                checks.number(name, "tau", value, low=0.0, low_open=True)
            self.schedule, tau = tuple(tau), tau[0]
        if isinstance(tau, Tensor) and tau.requires_grad:
            checks.fail(TypeError, name, "tau", "not require grad", "a tensor that does")
        self.tau, self.hard, self.return_stats = tau, hard, return_stats
        shape = (num_codes, dim) if groups is None else (groups, num_codes, dim // groups)
        self.codebook = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codebook)

    def set_num_updates(self, num_updates: int) -> None:
        """Sets `tau` by the schedule, if there is one."""
        if self.schedule is not None:
            most, least, decay = self.schedule
            self.tau = max(most * decay**num_updates, least)

    def forward(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> GumbelQuantized:
        return gumbel_quantize(
            logits,
            self.codebook,
            tau=self.tau,
            hard=self.hard,
            noise=self.training,
            mask=mask,
            row_ids=row_ids,
            seed=seed,
            generator=generator,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        shape, tau = tuple(self.codebook.shape), self.schedule or self.tau
        return f"codebook={shape}, tau={tau}, hard={self.hard}, return_stats={self.return_stats}"
