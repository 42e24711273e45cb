"""Losses of open_clip, without their matrices of scores.

>>> import torch
>>> import sslkernels as sk
>>> loss = sk.integrations.open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=1)
>>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
>>> losses = loss(image, text, logit_scale=torch.tensor(14.3), output_dict=True)
>>> sorted(losses)
['contrastive_loss']
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from open_clip import loss as library
from torch import Tensor

from sslkernels.contrastive.energy import contrastive_energy
from sslkernels.contrastive.losses import clip_loss, siglip_loss

__all__ = ["ClipLoss", "SigLipLoss"]


class ClipLoss(library.ClipLoss):
    """The class of open_clip, fused, with and without `local_loss` and `gather_with_grad`."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale, logit_bias)
        else:
            images, texts = library.gather_features(image_features, text_features, **self._gathering())
            if self.local_loss:
                loss = self._local(image_features, texts, logit_scale, logit_bias)
                loss = (loss + self._local(text_features, images, logit_scale, logit_bias)) / 2
            else:
                loss = clip_loss(images, texts, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _local(self, rows: Tensor, keys: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
        positive = torch.arange(rows.shape[0], device=rows.device) + rows.shape[0] * self.rank
        return contrastive_energy(rows, keys, positive=positive, logit_scale=scale, logit_bias=bias)

    def _gathering(self) -> dict[str, Any]:
        """The options of `gather_features`, which some versions have more of."""
        names = inspect.signature(library.gather_features).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


class SigLipLoss(library.SigLipLoss):
    """The class of open_clip, fused. Texts are gathered from all ranks, whatever `dist_impl` says: each gives the same
    loss and gradients, and the scores that a chunk size would bound are never materialised."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        group = torch.distributed.group.WORLD if self.world_size > 1 else None
        bias = 0.0 if logit_bias is None else logit_bias
        loss = siglip_loss(image_features, text_features, logit_scale, bias, process_group=group)
        return {"contrastive_loss": loss} if output_dict else loss
