"""Modules: they hold options and call the function of the same name."""

from sslkernels.contrastive.modules import ClipLoss, ContrastiveLoss, InfoNCELoss, NTXentLoss, SigLipLoss
from sslkernels.latent.modules import FreeEnergy, GaussianLatent
from sslkernels.latent.quantizers import GumbelQuantizer, VectorQuantizer
from sslkernels.vocabulary.modules import CrossEntropyLoss, LinearCrossEntropyLoss, TokenMasker

__all__ = [
    "ClipLoss",
    "ContrastiveLoss",
    "CrossEntropyLoss",
    "FreeEnergy",
    "GaussianLatent",
    "GumbelQuantizer",
    "InfoNCELoss",
    "LinearCrossEntropyLoss",
    "NTXentLoss",
    "SigLipLoss",
    "TokenMasker",
    "VectorQuantizer",
]
