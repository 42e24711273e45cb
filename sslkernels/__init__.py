"""Fused kernels for self-supervised learning in PyTorch."""

from sslkernels import distributions, nn
from sslkernels.dispatch import available_backends, use_backend
from sslkernels.ops.contrastive import ContrastiveStats, contrastive_energy
from sslkernels.ops.contrastive_losses import clip_loss, info_nce, nt_xent, siglip_loss
from sslkernels.ops.cross_entropy import CrossEntropyStats, cross_entropy
from sslkernels.ops.free_energy import free_energy
from sslkernels.ops.gaussian import GaussianSample, LatentStats, gaussian_kl, gaussian_rsample
from sslkernels.ops.gumbel_quantize import GumbelQuantized, gumbel_quantize
from sslkernels.ops.gumbel_softmax import gumbel_softmax
from sslkernels.ops.linear_cross_entropy import linear_cross_entropy
from sslkernels.ops.linear_sample import LinearSample, linear_sample
from sslkernels.ops.mask_tokens import MaskedTokens, mask_tokens
from sslkernels.ops.negative_sampling import negative_sampling_loss
from sslkernels.ops.prediction_energy import prediction_energy
from sslkernels.ops.random_streams import (
    random_bits,
    random_exponential,
    random_gumbel,
    random_normal,
    random_uniform,
)
from sslkernels.ops.vector_quantize import Quantized, vector_quantize
from sslkernels.version import __version__

__all__ = [
    "ContrastiveStats",
    "CrossEntropyStats",
    "GaussianSample",
    "GumbelQuantized",
    "LatentStats",
    "LinearSample",
    "MaskedTokens",
    "Quantized",
    "__version__",
    "available_backends",
    "clip_loss",
    "contrastive_energy",
    "cross_entropy",
    "distributions",
    "free_energy",
    "gaussian_kl",
    "gaussian_rsample",
    "gumbel_quantize",
    "gumbel_softmax",
    "info_nce",
    "linear_cross_entropy",
    "linear_sample",
    "mask_tokens",
    "negative_sampling_loss",
    "nn",
    "nt_xent",
    "prediction_energy",
    "random_bits",
    "random_exponential",
    "random_gumbel",
    "random_normal",
    "random_uniform",
    "siglip_loss",
    "use_backend",
    "vector_quantize",
]
