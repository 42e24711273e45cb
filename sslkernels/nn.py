"""Modules: they hold options and call the function of the same name."""

from sslkernels.contrastive.modules import ClipLoss, ContrastiveLoss, InfoNCELoss, NTXentLoss, SigLipLoss
from sslkernels.latent.modules import FreeEnergy, GaussianLatent, GumbelQuantizer
from sslkernels.latent.quantizers import VectorQuantizer
from sslkernels.latent.residual_quantizer import ResidualVectorQuantizer
from sslkernels.vocabulary.modules import CrossEntropyLoss, LinearCrossEntropyLoss, LinearHead, TokenMasker
from sslkernels.vocabulary.prototypes.modules import PrototypeLoss

__all__ = [
    "ClipLoss",
    "ContrastiveLoss",
    "CrossEntropyLoss",
    "FreeEnergy",
    "GaussianLatent",
    "GumbelQuantizer",
    "InfoNCELoss",
    "LinearCrossEntropyLoss",
    "LinearHead",
    "NTXentLoss",
    "PrototypeLoss",
    "ResidualVectorQuantizer",
    "SigLipLoss",
    "TokenMasker",
    "VectorQuantizer",
]
