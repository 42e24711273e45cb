"""Distributions of `torch.distributions` whose samples and divergences come from the fused ops."""

from sslkernels.latent.distributions import FusedNormal

__all__ = ["FusedNormal"]
