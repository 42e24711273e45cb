"""Modules of the contrastive losses, with and without a learned temperature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.contrastive.energy import ContrastiveStats, contrastive_energy
from sslkernels.contrastive.losses import clip_loss, info_nce, nt_xent, siglip_loss
from sslkernels.core import checks
from sslkernels.core.autograd import Function, save, saved
from sslkernels.core.modules import Options, options_of

Loss = Tensor | tuple[Tensor, ContrastiveStats]


class ContrastiveLoss(Options):
    """Module of `contrastive_energy`; the tensors of a batch are arguments of forward.

    Args:
        learnable: `logit_scale`, a number, is learned by its logarithm, the parameter `log_scale` of shape `(1,)`. A
            tensor `logit_scale` is learned if it is a parameter.
        max_logit_scale: the largest scale that is used, with `learnable`.

    Other arguments: see `contrastive_energy`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.ContrastiveLoss(direction="symmetric", logit_scale=20.0, normalize=True)
    >>> loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
    """

    @checks.with_python_numbers
    def __init__(
        self,
        *,
        energy: str = "softmax",
        direction: str = "row",
        logit_scale: float | Tensor = 1.0,
        logit_bias: float | Tensor | None = None,
        learnable: bool = False,
        max_logit_scale: float | None = None,
        normalize: bool = False,
        in_batch: bool = True,
        same_id: str = "ignore",
        exclude_self: bool = False,
        label_smoothing: float = 0.0,
        margin: float | None = None,
        reduction: str = "mean",
        on_empty: str = "nan",
        process_group: Any = None,
        ring: bool = False,
        return_stats: bool = False,
    ) -> None:
        options = options_of(locals())
        for name in ("learnable", "max_logit_scale", *(("logit_scale",) if learnable else ())):
            del options[name]
        super().__init__(**options)
        self.max_logit_scale = max_logit_scale
        self.register_parameter("log_scale", None)
        name = type(self).__name__
        if not learnable and max_logit_scale is not None:
            checks.fail(ValueError, name, "max_logit_scale", "be None unless learnable", max_logit_scale)
        if learnable:
            self.log_scale = _log_scale(name, "logit_scale", logit_scale, max_logit_scale, learnable)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logit_scale" and getattr(self, "log_scale", None) is not None:
            checks.fail(AttributeError, type(self).__name__, name, "be set through log_scale, which is learned", value)
        super().__setattr__(name, value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        positive: Tensor | None = None,
        candidate_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        negatives: Tensor | None = None,
        negatives_mask: Tensor | None = None,
        bank: Tensor | None = None,
        bank_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        bank_ids: Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Loss:
        options = self.options()
        if self.log_scale is not None:
            options["logit_scale"] = _scale(self.log_scale, self.max_logit_scale)
        return contrastive_energy(
            query,
            key,
            positive=positive,
            candidate_mask=candidate_mask,
            key_mask=key_mask,
            negatives=negatives,
            negatives_mask=negatives_mask,
            bank=bank,
            bank_mask=bank_mask,
            query_ids=query_ids,
            key_ids=key_ids,
            bank_ids=bank_ids,
            row_weight=row_weight,
            num_items=num_items,
            **options,
        )


class InfoNCELoss(Options):
    """Module of `info_nce`, which begins with the arguments of `InfoNCE` of info-nce-pytorch.

    >>> import sslkernels as sk
    >>> loss = sk.nn.InfoNCELoss(temperature=0.05)(torch.randn(8, 16), torch.randn(8, 16))
    """

    @checks.with_python_numbers
    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        on_empty: str = "nan",
        process_group: Any = None,
        ring: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Loss:
        return info_nce(query, positive_key, negative_keys, ids=ids, num_items=num_items, **self.options())


class NTXentLoss(Options):
    """Module of `nt_xent`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.NTXentLoss(temperature=0.1)(torch.randn(8, 16), torch.randn(8, 16))
    """

    @checks.with_python_numbers
    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        on_empty: str = "nan",
        process_group: Any = None,
        ring: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(
        self, z0: Tensor, z1: Tensor, *, ids: Tensor | None = None, num_items: int | Tensor | None = None
    ) -> Loss:
        return nt_xent(z0, z1, ids=ids, num_items=num_items, **self.options())


class _Tempered(Options):
    """A loss with a temperature: scale = exp(log_scale), at most `max_logit_scale`."""

    def __init__(self, init_logit_scale: float, max_logit_scale: float | None, learnable: bool, **options: Any) -> None:
        super().__init__(**options)
        self.max_logit_scale = max_logit_scale
        name = type(self).__name__
        self.log_scale = _log_scale(name, "init_logit_scale", init_logit_scale, max_logit_scale, learnable)

    def logit_scale(self) -> Tensor:
        """The scale (0-d), at most `max_logit_scale`."""
        return _scale(self.log_scale, self.max_logit_scale)


class ClipLoss(_Tempered):
    """Module of `clip_loss` with a temperature: scale = exp(log_scale), at most `max_logit_scale`.

    Args:
        init_logit_scale: the first scale, in (0, max_logit_scale].
        max_logit_scale: the largest scale that is used; None: any.
        learnable: the parameter `log_scale`, of shape `(1,)`, gets a gradient.
        normalize: divide the features by their norms; False for features that are normalised already.

    Other arguments: see `clip_loss`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.ClipLoss(normalize=True)
    >>> loss(torch.randn(8, 16), torch.randn(8, 16)).backward()
    """

    @checks.with_python_numbers
    def __init__(
        self,
        init_logit_scale: float = 1 / 0.07,
        *,
        max_logit_scale: float | None = 100.0,
        learnable: bool = True,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        on_empty: str = "nan",
        process_group: Any = None,
        ring: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        ids: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Loss:
        """logit_scale: replaces the module's."""
        scale = self.logit_scale() if logit_scale is None else logit_scale
        return clip_loss(image_features, text_features, scale, ids=ids, num_items=num_items, **self.options())


class SigLipLoss(_Tempered):
    """Module of `siglip_loss` with temperature and bias: scale = exp(log_scale), at most `max_logit_scale`.

    Args:
        init_logit_scale: the first scale, in (0, max_logit_scale].
        init_logit_bias: the first bias.
        max_logit_scale: the largest scale that is used; None: any.
        learnable: the parameters `log_scale` and `logit_bias`, of shape `(1,)`, get gradients.
        normalize: divide the features by their norms; False for features that are normalised already.

    Other arguments: see `siglip_loss`.

    >>> import sslkernels as sk
    >>> loss = sk.nn.SigLipLoss(normalize=True)
    >>> loss(torch.randn(8, 16), torch.randn(8, 16)).backward()
    """

    @checks.with_python_numbers
    def __init__(
        self,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        *,
        max_logit_scale: float | None = None,
        learnable: bool = True,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        on_empty: str = "nan",
        process_group: Any = None,
        ring: bool = False,
        return_stats: bool = False,
    ) -> None:
        options = options_of(locals())
        del options["init_logit_bias"]
        super().__init__(**options)
        checks.number(type(self).__name__, "init_logit_bias", init_logit_bias)
        self.logit_bias = nn.Parameter(torch.tensor([float(init_logit_bias)]), requires_grad=learnable)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        *,
        ids: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Loss:
        """logit_scale, logit_bias: replace the module's."""
        scale = self.logit_scale() if logit_scale is None else logit_scale
        bias = self.logit_bias if logit_bias is None else logit_bias
        return siglip_loss(image_features, text_features, scale, bias, ids=ids, num_items=num_items, **self.options())


def _log_scale(function: str, name: str, init: Any, maximum: float | None, learnable: bool) -> nn.Parameter:
    """The logarithm of a scale as a parameter of shape (1,): fully_shard refuses parameters without dimensions."""
    checks.number(function, name, init, low=0.0, low_open=True)
    if maximum is not None:
        checks.number(function, "max_logit_scale", maximum, low=0.0, low_open=True)
        if init > maximum:
            checks.fail(ValueError, function, name, f"be at most max_logit_scale, {maximum}", init)
    return nn.Parameter(torch.tensor([math.log(init)]), requires_grad=learnable)


def _scale(log_scale: Tensor, maximum: float | None) -> Tensor:
    """exp(log_scale), at most `maximum`; 0-d. No parameter is written: a graph may still need it."""
    limited = log_scale if maximum is None else _AtMost.run(log_scale, math.log(maximum))
    return limited.exp().reshape(())


class _AtMost(Function):
    """min(x, limit). From the limit on, a gradient that would raise x in a step of descent is 0, and one that would
    lower x passes, so that x does not drift away without an effect on the loss."""

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clamp(max=limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        x, ctx.limit = inputs
        save(ctx, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None
        (x,) = saved(ctx)
        return (torch.where((x < ctx.limit) | (grad > 0), grad, 0),)
