"""Modules: they hold options and call the function of the same name."""

from sslkernels.nn.joint_embedding import ClipLoss, ContrastiveLoss, InfoNCELoss, NTXentLoss, SigLipLoss
from sslkernels.nn.latent import FreeEnergy, GaussianLatent
from sslkernels.nn.masked import CrossEntropyLoss, LinearCrossEntropyLoss, TokenMasker
from sslkernels.nn.quantizers import GumbelQuantizer, VectorQuantizer

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
