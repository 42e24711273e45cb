"""Modules of the contrastive losses, with and without a learned temperature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.contrastive.energy import ContrastiveStats, contrastive_energy
from sslkernels.contrastive.losses import clip_loss, info_nce, nt_xent, siglip_loss
from sslkernels.core import checks
from sslkernels.core.modules import Options, options_of


class ContrastiveLoss(Options):
    """Module of `contrastive_energy`; the tensors of a batch are arguments of forward.

    >>> import sslkernels as sk
    >>> loss = sk.nn.ContrastiveLoss(direction="symmetric", logit_scale=20.0, normalize=True)
    >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
    """

    def __init__(
        self,
        *,
        energy: str = "softmax",
        direction: str = "row",
        logit_scale: float | Tensor = 1.0,
        logit_bias: float | Tensor | None = None,
        normalize: bool = False,
        same_id: str = "ignore",
        exclude_self: bool = False,
        label_smoothing: float = 0.0,
        margin: float | None = None,
        reduction: str = "mean",
        process_group: Any = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        positive: Tensor | None = None,
        negatives: Tensor | None = None,
        negatives_mask: Tensor | None = None,
        bank: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        return contrastive_energy(
            query,
            key,
            positive=positive,
            negatives=negatives,
            negatives_mask=negatives_mask,
            bank=bank,
            query_ids=query_ids,
            key_ids=key_ids,
            row_weight=row_weight,
            **self.options(),
        )


class InfoNCELoss(Options):
    """Module of `info_nce`; the arguments of `InfoNCE` of info-nce-pytorch.

    >>> import sslkernels as sk
    >>> loss = sk.nn.InfoNCELoss(temperature=0.05)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce(query, positive_key, negative_keys, **self.options())


class NTXentLoss(Options):
    """Module of `nt_xent`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.NTXentLoss(temperature=0.1)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(self, temperature: float | Tensor = 0.5, *, process_group: Any = None) -> None:
        super().__init__(**options_of(locals()))

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return nt_xent(z0, z1, **self.options())


class _ScaledLoss(nn.Module):
    """Has the logarithm of the scale, and a bias, as parameters. In training log_scale is clamped in place before use,
    as CLIP does after each step, so that its gradient does not vanish at the limit."""

    def __init__(
        self,
        init_logit_scale: float,
        init_logit_bias: float | None,
        max_logit_scale: float | None,
        learnable: bool,
        normalize: bool,
        process_group: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.number(name, "init_logit_scale", init_logit_scale, low=0.0, low_open=True)
        if max_logit_scale is not None:
            checks.number(name, "max_logit_scale", max_logit_scale, low=0.0, low_open=True)
        self.max_logit_scale = max_logit_scale
        self.normalize = normalize
        self.process_group = process_group
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)), requires_grad=learnable)
        self.logit_bias = None
        if init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(init_logit_bias)), requires_grad=learnable)

    def logit_scale(self) -> Tensor:
        """The scale, at most `max_logit_scale`."""
        if self.max_logit_scale is None:
            return self.log_scale.exp()
        limit = math.log(self.max_logit_scale)
        if not self.training:
            return self.log_scale.clamp(max=limit).exp()
        with torch.no_grad():
            self.log_scale.clamp_(max=limit)
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"max_logit_scale={self.max_logit_scale}, normalize={self.normalize}"


class ClipLoss(_ScaledLoss):
    """Module of `clip_loss` with a temperature: scale = exp(log_scale), at most `max_logit_scale`.

    normalize: divide the features by their norms; False for features that are normalised already.

    >>> import sslkernels as sk
    >>> loss = sk.nn.ClipLoss(normalize=True)
    >>> loss(torch.randn(8, 16), torch.randn(8, 16)).backward()
    """

    def __init__(
        self,
        init_logit_scale: float = 1 / 0.07,
        *,
        max_logit_scale: float | None = 100.0,
        learnable: bool = True,
        normalize: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(init_logit_scale, None, max_logit_scale, learnable, normalize, process_group)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor | None = None
    ) -> Tensor:
        """logit_scale: replaces the module's."""
        scale = self.logit_scale() if logit_scale is None else logit_scale
        if self.normalize:
            return contrastive_energy(
                image_features,
                text_features,
                direction="symmetric",
                logit_scale=scale,
                normalize=True,
                process_group=self.process_group,
            )
        return clip_loss(image_features, text_features, scale, process_group=self.process_group)


class SigLipLoss(_ScaledLoss):
    """Module of `siglip_loss` with temperature and bias: scale = exp(log_scale), at most `max_logit_scale`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.SigLipLoss(normalize=True)
    >>> loss(torch.randn(8, 16), torch.randn(8, 16)).backward()
    """

    def __init__(
        self,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        *,
        max_logit_scale: float | None = None,
        learnable: bool = True,
        normalize: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(init_logit_scale, init_logit_bias, max_logit_scale, learnable, normalize, process_group)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """logit_scale, logit_bias: replace the module's."""
        scale = self.logit_scale() if logit_scale is None else logit_scale
        bias = self.logit_bias if logit_bias is None else logit_bias
        if self.normalize:
            return contrastive_energy(
                image_features,
                text_features,
                energy="sigmoid",
                logit_scale=scale,
                logit_bias=bias,
                normalize=True,
                process_group=self.process_group,
            )
        return siglip_loss(image_features, text_features, scale, bias, process_group=self.process_group)
