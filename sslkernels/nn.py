"""Modules: they hold options and call the function of the same name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import checks
from sslkernels.ops.contrastive import ContrastiveStats, contrastive_energy
from sslkernels.ops.contrastive_losses import clip_loss, info_nce, nt_xent, siglip_loss
from sslkernels.ops.cross_entropy import CrossEntropyStats, cross_entropy
from sslkernels.ops.free_energy import free_energy
from sslkernels.ops.gaussian import GaussianSample, LatentStats, gaussian_kl, gaussian_rsample
from sslkernels.ops.linear_cross_entropy import linear_cross_entropy
from sslkernels.ops.mask_tokens import MaskedTokens, mask_tokens
from sslkernels.quantizer import GumbelQuantizer as GumbelQuantizer
from sslkernels.quantizer import VectorQuantizer as VectorQuantizer


class _Options(nn.Module):
    """Keeps keyword options; those that are tensors become buffers, or stay parameters, and so move with the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options().items()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class CrossEntropyLoss(_Options):
    """Module of `cross_entropy`; a drop-in for `torch.nn.CrossEntropyLoss`.

    >>> import sslkernels as sk
    >>> sk.nn.CrossEntropyLoss(label_smoothing=0.1)(torch.randn(4, 10), torch.tensor([1, 2, 3, 4])).shape
    torch.Size([])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            return_stats=return_stats,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        return cross_entropy(input, target, **self.options())


class LinearCrossEntropyLoss(_Options):
    """Module of `linear_cross_entropy`; the projection is an argument of forward, so that it can be tied.

    >>> import sslkernels as sk
    >>> embedding = torch.nn.Embedding(1000, 16)
    >>> loss = sk.nn.LinearCrossEntropyLoss()
    >>> loss(torch.randn(4, 16), embedding.weight, torch.tensor([1, 2, -100, 4])).backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        mode: str = "auto",
        process_group: Any = None,
        vocab_start: int = 0,
        capacity: int | None = None,
        workspace_bytes: int | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            mode=mode,
            process_group=process_group,
            vocab_start=vocab_start,
            capacity=capacity,
            workspace_bytes=workspace_bytes,
            return_stats=return_stats,
        )

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            token_weight=token_weight,
            num_items=num_items,
            **self.options(),
        )


class TokenMasker(_Options):
    """Module of `mask_tokens`: the masking of a data collator, on the device where the ids are.

    >>> import sslkernels as sk
    >>> masker = sk.nn.TokenMasker(mask_id=103, vocab_size=30522, special_ids=(0, 101, 102))
    >>> masked = masker(torch.randint(1000, 30522, (2, 16)))
    """

    def __init__(
        self,
        *,
        mask_id: int,
        vocab_size: int,
        probability: float = 0.15,
        replace: tuple[float, float] = (0.8, 0.1),
        special_ids: Sequence[int] | Tensor = (),
        mean_span: float | None = None,
        ignore_index: int = -100,
    ) -> None:
        if isinstance(special_ids, Tensor):
            special_ids = special_ids.tolist()
        super().__init__(
            mask_id=mask_id,
            vocab_size=vocab_size,
            probability=probability,
            replace=tuple(replace),
            special_ids=tuple(special_ids),
            mean_span=mean_span,
            ignore_index=ignore_index,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        special_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskedTokens:
        return mask_tokens(
            input_ids,
            special_mask=special_mask,
            word_ids=word_ids,
            row_ids=row_ids,
            seed=seed,
            generator=generator,
            **self.options(),
        )


class ContrastiveLoss(_Options):
    """Module of `contrastive_energy`; what differs from batch to batch is an argument of forward.

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
        super().__init__(
            energy=energy,
            direction=direction,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            normalize=normalize,
            same_id=same_id,
            exclude_self=exclude_self,
            label_smoothing=label_smoothing,
            margin=margin,
            reduction=reduction,
            process_group=process_group,
            return_stats=return_stats,
        )

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


class InfoNCELoss(_Options):
    """Module of `info_nce`; the arguments of `InfoNCE` of info-nce-pytorch.

    >>> import sslkernels as sk
    >>> loss = sk.nn.InfoNCELoss(temperature=0.05)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, negative_mode=negative_mode)

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce(query, positive_key, negative_keys, **self.options())


class NTXentLoss(_Options):
    """Module of `nt_xent`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.NTXentLoss(temperature=0.1)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(self, temperature: float | Tensor = 0.5, *, process_group: Any = None) -> None:
        super().__init__(temperature=temperature, process_group=process_group)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return nt_xent(z0, z1, **self.options())


class _ScaledLoss(nn.Module):
    """Holds the logarithm of the scale, and a bias. In training the former is clamped in place before it is used, as
    CLIP does after each step: its gradient never vanishes at the limit."""

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
    """Module of `clip_loss` that holds the temperature: scale = exp(log_scale), at most `max_logit_scale`.

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
        """logit_scale: instead of the one that the module holds."""
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
    """Module of `siglip_loss` that holds temperature and bias; scale = exp(log_scale), at most `max_logit_scale`.

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
        """logit_scale, logit_bias: instead of those that the module holds."""
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


class FreeEnergy(_Options):
    """Module of `free_energy`: reduces the energies of K candidates along `dim`.

    >>> import sslkernels as sk
    >>> sk.nn.FreeEnergy(beta=5.0)(torch.rand(32, 8)).shape
    torch.Size([32])
    """

    def __init__(self, beta: float = 1.0, dim: int = -1, mode: str = "soft") -> None:
        super().__init__(beta=beta, dim=dim, mode=mode)

    def forward(self, energy: Tensor) -> Tensor:
        return free_energy(energy, **self.options())


class GaussianLatent(_Options):
    """Module of `gaussian_rsample`. It samples in training and in evaluation, as bounds over several samples do;
    `sample=False` gives the mean as z (K times, without a copy, where `num_samples` is K) and `gaussian_kl`.

    >>> import sslkernels as sk
    >>> latent = sk.nn.GaussianLatent(kl="mean", free_bits=0.1)
    >>> z, kl = latent(torch.randn(4, 8), torch.randn(4, 8))
    >>> embedding, _ = latent(torch.randn(4, 8), torch.randn(4, 8), sample=False)
    """

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        kl: str | None = "row",
        free_bits: float = 0.0,
        logvar_bounds: tuple[float, float] | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            num_samples=num_samples,
            kl=kl,
            free_bits=free_bits,
            logvar_bounds=logvar_bounds,
            return_stats=return_stats,
        )

    def forward(
        self,
        mean: Tensor,
        logvar: Tensor,
        *,
        prior: tuple[Tensor, Tensor] | None = None,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        sample: bool = True,
    ) -> GaussianSample | tuple[GaussianSample, LatentStats]:
        checks.boolean("GaussianLatent", "sample", sample)
        if sample:
            return gaussian_rsample(
                mean, logvar, prior=prior, row_ids=row_ids, seed=seed, generator=generator, **self.options()
            )
        options = self.options()
        count, reduction = options.pop("num_samples"), options.pop("kl")
        found = gaussian_kl(mean, logvar, prior=prior, reduction=reduction or "row", **options)
        value, *stats = found if self.return_stats else (found,)
        z = mean if count is None else mean.unsqueeze(-2).expand(*mean.shape[:-1], count, mean.shape[-1])
        result = GaussianSample(z, value if reduction is not None else None)
        return (result, *stats) if stats else result
