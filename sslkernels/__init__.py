"""Fused kernels for self-supervised learning in PyTorch."""

from sslkernels import nn
from sslkernels.dispatch import available_backends, use_backend
from sslkernels.ops.contrastive import ContrastiveStats, contrastive_energy
from sslkernels.ops.cross_entropy import CrossEntropyStats, cross_entropy
from sslkernels.ops.linear_cross_entropy import linear_cross_entropy
from sslkernels.ops.mask_tokens import MaskedTokens, mask_tokens
from sslkernels.ops.random_bits import random_bits
from sslkernels.version import __version__

__all__ = [
    "ContrastiveStats",
    "CrossEntropyStats",
    "MaskedTokens",
    "__version__",
    "available_backends",
    "contrastive_energy",
    "cross_entropy",
    "linear_cross_entropy",
    "mask_tokens",
    "nn",
    "random_bits",
    "use_backend",
]
