"""Fused kernels for self-supervised learning in PyTorch."""

from sslkernels import integrations, nn
from sslkernels.contrastive.energy import ContrastiveStats, contrastive_energy
from sslkernels.contrastive.losses import clip_loss, info_nce, nt_xent, siglip_loss
from sslkernels.contrastive.words.glove import glove_loss
from sslkernels.contrastive.words.word2vec import negative_sampling_loss
from sslkernels.core.backends import available_backends, use_backend
from sslkernels.core.ranks import row_ids_of_rank
from sslkernels.latent import distributions
from sslkernels.latent.free_energy import free_energy
from sslkernels.latent.gaussian import GaussianSample, LatentStats, gaussian_kl, gaussian_rsample
from sslkernels.latent.gumbel_quantize import GumbelQuantized, gumbel_quantize
from sslkernels.latent.gumbel_softmax import gumbel_softmax
from sslkernels.latent.prediction_energy import PredictionStats, prediction_energy
from sslkernels.latent.residual_quantizer import ResidualQuantized
from sslkernels.latent.vector_quantize import Quantized, vector_quantize
from sslkernels.random.alias_table import AliasTable
from sslkernels.random.streams import random_bits, random_exponential, random_gumbel, random_normal, random_uniform
from sslkernels.version import __version__
from sslkernels.vocabulary.corrupt_spans import CorruptedSpans, corrupt_spans
from sslkernels.vocabulary.cross_entropy import CrossEntropyStats, cross_entropy
from sslkernels.vocabulary.linear_cross_entropy import linear_cross_entropy
from sslkernels.vocabulary.linear_sample import LinearSample, linear_sample
from sslkernels.vocabulary.mask_tokens import MaskedTokens, mask_tokens
from sslkernels.vocabulary.prototypes.centers import sinkhorn_center, teacher_center
from sslkernels.vocabulary.prototypes.linear_distillation import DistillationStats, linear_distillation

__all__ = [
    "AliasTable",
    "ContrastiveStats",
    "CorruptedSpans",
    "CrossEntropyStats",
    "DistillationStats",
    "GaussianSample",
    "GumbelQuantized",
    "LatentStats",
    "LinearSample",
    "MaskedTokens",
    "PredictionStats",
    "Quantized",
    "ResidualQuantized",
    "__version__",
    "available_backends",
    "clip_loss",
    "contrastive_energy",
    "corrupt_spans",
    "cross_entropy",
    "distributions",
    "free_energy",
    "gaussian_kl",
    "gaussian_rsample",
    "glove_loss",
    "gumbel_quantize",
    "gumbel_softmax",
    "info_nce",
    "integrations",
    "linear_cross_entropy",
    "linear_distillation",
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
    "row_ids_of_rank",
    "siglip_loss",
    "sinkhorn_center",
    "teacher_center",
    "use_backend",
    "vector_quantize",
]
