"""Contrastive losses of stable-pretraining, without their matrices of scores and masks.

>>> import torch
>>> import sslkernels as sk
>>> loss = sk.integrations.stable_pretraining.NTXEntLoss(temperature=0.5)
>>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
"""

from __future__ import annotations

import torch
from stable_pretraining.losses import joint_embedding as library
from stable_pretraining.losses import multimodal
from torch import Tensor

from sslkernels.contrastive.energy import contrastive_energy
from sslkernels.contrastive.losses import nt_xent
from sslkernels.integrations import warn_once

__all__ = ["CLIPLoss", "InfoNCELoss", "NTXEntLoss"]


class InfoNCELoss(library.InfoNCELoss):
    """The class of stable-pretraining, fused; `logit_scale` is a temperature there, too. Targets that are
    probabilities are left to its code. A pair of an anchor and its target counts even where the mask is True."""

    def _compute(
        self,
        anchors: Tensor,
        candidates: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        if targets.is_floating_point():
            warn_once(self, "a target of probabilities")
            return super()._compute(anchors, candidates, targets, mask, logit_scale)
        return contrastive_energy(
            anchors,
            candidates,
            positive=targets.masked_fill(targets == -100, -1),  # what cross_entropy ignores
            candidate_mask=None if mask is None else ~mask,
            logit_scale=1.0 / (self.temperature if logit_scale is None else logit_scale),
            normalize=True,
        )


class CLIPLoss(InfoNCELoss, multimodal.CLIPLoss):
    """The class of stable-pretraining, fused, over the features of all ranks."""


class NTXEntLoss(InfoNCELoss, library.NTXEntLoss):
    """The class of stable-pretraining, fused, over the views of all ranks, which the library gathers from 0.1.8 on."""

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        return nt_xent(z_i, z_j, temperature=self.temperature, process_group=group)
