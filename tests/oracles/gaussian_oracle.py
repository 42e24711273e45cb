"""gaussian_rsample in plain torch, in any dtype, with the noise of `random_normal`; and cases for its tests."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import sslkernels as sk

LEAVES = ("mean", "logvar", "prior_mean", "prior_logvar")


def kl_terms(mean: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None) -> Tensor:
    if prior is None:
        return -0.5 * (1 + logvar - mean.square() - logvar.exp())
    d = logvar - prior[1]
    return 0.5 * ((mean - prior[0]).square() * (-prior[1]).exp() + d.exp() - 1 - d)


def noise(shape: torch.Size, samples: int | None, seed: int | Tensor, row_ids: Tensor | None) -> Tensor:
    """float64, (..., D) or (..., K, D)."""
    with sk.use_backend("reference"):
        drawn = [
            sk.random_normal(shape, seed, row_ids=row_ids, sample=k, dtype=torch.float64) for k in range(samples or 1)
        ]
    return drawn[0] if samples is None else torch.stack(drawn, -2)


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
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor | None]:
    eps = noise(mean.shape, num_samples, seed, row_ids).to(mean)
    v = logvar if logvar_bounds is None else logvar.clamp(*logvar_bounds)
    location, scale = mean, (v / 2).exp()
    if num_samples is not None:
        location, scale = location.unsqueeze(-2), scale.unsqueeze(-2)
    terms = kl_terms(mean, v, prior).clamp_min(free_bits)
    value = {
        None: None,
        "none": terms,
        "row": terms.sum(-1),
        "sum": terms.sum(),
        "mean": terms.sum(-1).mean(),
    }[kl]
    return location + scale * eps, value


@dataclass(frozen=True)
class Case:
    """prior: which shapes mean and logvar of the prior have, see `arguments`."""

    name: str
    batch: tuple[int, ...] = (7,)
    columns: int = 12
    samples: int | None = None
    prior: str = ""
    row_ids: bool = False
    chunk: bool = False
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict]:
        """(leaves by name, options); draws are rounded to `dtype`."""
        g = torch.Generator().manual_seed(len(self.name) + 10 * self.columns)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)

        if self.chunk:
            mean, logvar = draw(*self.batch, 2 * self.columns).chunk(2, -1)
        else:
            mean, logvar = draw(*self.batch, self.columns), draw(*self.batch, self.columns)
        leaves = {"mean": mean, "logvar": logvar}
        shapes = {
            "full": [(*self.batch, self.columns)] * 2,
            "shared": [(self.columns,), (1,) * len(self.batch) + (self.columns,)],
            "mixed": [(*self.batch, self.columns), (self.columns,)],
            "column": [(*self.batch, 1), ()],
        }
        if self.prior:
            leaves |= {name: draw(*shape) for name, shape in zip(LEAVES[2:], shapes[self.prior], strict=True)}
        options = {"num_samples": self.samples, "seed": -(2**40), **self.options}
        if self.row_ids:
            options["row_ids"] = torch.randint(-(2**62), 2**62, self.batch, generator=g).to(device)
        return leaves, options


def call(function, leaves: dict[str, Tensor], options: dict):
    """z and kl."""
    prior = {"prior": (leaves["prior_mean"], leaves["prior_logvar"])} if "prior_mean" in leaves else {}
    return function(leaves["mean"], leaves["logvar"], **prior, **options)


CASES = [
    Case("plain"),
    Case("one_column", columns=1, samples=2, options={"kl": "none"}),
    Case("odd", columns=7, samples=3, row_ids=True),
    Case("batch", batch=(2, 1, 3), columns=5, row_ids=True, options={"kl": "mean"}),
    Case("one_row", batch=(), columns=9, options={"kl": "sum"}),
    Case("long_rows", batch=(2,), columns=1301, samples=2),
    Case("halves", columns=8, chunk=True, options={"kl": "none"}),
    Case("no_kl", samples=1, options={"kl": None}),
    Case("bounds", samples=2, options={"logvar_bounds": (-0.5, 0.6)}),
    Case("free_bits", columns=6, options={"free_bits": 0.4, "kl": "sum"}),
    Case("prior", prior="full", options={"kl": "none"}),
    Case("shared_prior", batch=(3, 50), columns=5, prior="shared", options={"free_bits": 0.2}),
    Case("mixed_prior", prior="mixed", samples=2, options={"kl": "mean", "logvar_bounds": (-1.0, 2.0)}),
    Case("column_prior", prior="column", columns=4),
]
