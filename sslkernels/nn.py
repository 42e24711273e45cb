"""Modules: they hold options and call the function of the same name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels.ops.cross_entropy import CrossEntropyStats, cross_entropy
from sslkernels.ops.linear_cross_entropy import linear_cross_entropy


class _Options(nn.Module):
    """Keeps keyword options; those that are tensors become buffers, so that they move with the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor):
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
