"""Modules of masked prediction: masking of tokens, and cross-entropy of the masked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.core.modules import Options, options_of
from sslkernels.core.slices import is_dtensor
from sslkernels.vocabulary.cross_entropy import CrossEntropyStats, cross_entropy
from sslkernels.vocabulary.linear_cross_entropy import linear_cross_entropy
from sslkernels.vocabulary.mask_tokens import MaskedTokens, mask_tokens


class CrossEntropyLoss(Options):
    """Module of `cross_entropy`; a drop-in for `torch.nn.CrossEntropyLoss`.

    Args:
        weight: weight of each class `(V,)`; becomes a buffer.
        ignore_index: rows with this target do not contribute.
        reduction: "mean", "sum" or "none".
        label_smoothing: fraction of the target probability that is distributed over all classes.
        z_loss: adds `z_loss * logsumexp(logits)**2` to each row.
        softcap: replaces the logits by `softcap * tanh(logits / softcap)`.
        logit_scale: multiplies the logits before the softcap.
        class_dim: dimension of the logits that holds the classes; None: found from the shapes.
        on_empty: loss of a mean over no valid rows, "nan" or "zero".
        return_stats: also return `CrossEntropyStats`.

    >>> import sslkernels as sk
    >>> sk.nn.CrossEntropyLoss(label_smoothing=0.1)(torch.randn(4, 10), torch.tensor([1, 2, 3, 4])).shape
    torch.Size([])
    """

    tensors = ("weight",)

    @checks.with_python_numbers
    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        class_dim: int | None = None,
        on_empty: str = "nan",
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        return cross_entropy(input, target, token_weight=token_weight, num_items=num_items, **self.options())


class LinearCrossEntropyLoss(Options):
    """Module of `linear_cross_entropy`; the projection is an argument of forward, so that it can be tied.

    Args:
        weight: weight of each class `(V,)`; becomes a buffer.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target do not contribute; None: -100.
        label_smoothing: fraction of the target probability that is distributed over all classes.
        z_loss: adds `z_loss * logsumexp(logits)**2` to each row.
        softcap: replaces the logits by `softcap * tanh(logits / softcap)`.
        logit_scale: multiplies the product before the bias is added; a number, a tensor (a buffer) or a parameter.
        shift: the row at position t predicts the target at t + `shift` of its sequence.
        mode: "auto", "fast" or "compact".
        capacity: upper bound of the number of valid rows.
        workspace_bytes: upper bound of the bytes of the logits buffer.
        process_group: ranks that the vocabulary is sliced over.
        vocab_start: number of rows of the ranks before this one; None: from the sizes.
        input_grad: "reduce" or "partial".
        sequence_parallel: each rank has its own rows of the input.
        on_empty: loss of a mean over no valid rows, "nan" or "zero".
        return_stats: also return `CrossEntropyStats`.

    >>> import sslkernels as sk
    >>> embedding = torch.nn.Embedding(1000, 16)
    >>> loss = sk.nn.LinearCrossEntropyLoss()
    >>> loss(torch.randn(4, 16), embedding.weight, torch.tensor([1, 2, -100, 4])).backward()
    """

    tensors = ("weight",)

    @checks.with_python_numbers
    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | Tensor = 1.0,
        shift: int = 0,
        mode: str = "auto",
        capacity: int | None = None,
        workspace_bytes: int | None = None,
        process_group: Any = None,
        vocab_start: int | None = None,
        input_grad: str = "reduce",
        sequence_parallel: bool = False,
        on_empty: str = "nan",
        return_stats: bool = False,
    ) -> None:
        super().__init__(**options_of(locals()))

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


class LinearHead(nn.Linear):
    """A linear layer that gives logits, or with labels the loss of `linear_cross_entropy`, whose logits never exist.

    `head(input)` is what `torch.nn.Linear` gives; `head(input, labels, num_items=..., **options)` the loss, with every
    option of `linear_cross_entropy`. The loss is computed inside the forward of the module that owns the weight and
    leaves through its output, so that DDP, FSDP2 (`fully_shard` of the root alone, of the head, or of
    `[embedding, head]` together where they share a weight) and tensor-parallel plans see a layer like any other. Under
    `ColwiseParallel` each rank keeps its slice of the logits, inside the loss too; options are then as with a
    `process_group`, and `return_stats` must be False.

    With mixed precision FSDP2 casts floating arguments of a forward: pass `num_items` as an int or an int tensor.

    Args:
        in_features: size of the hidden states.
        out_features: number of classes.
        bias: whether the layer has a bias.
        device: of the parameters.
        dtype: of the parameters.

    >>> import sslkernels as sk
    >>> embedding = torch.nn.Embedding(1000, 16)
    >>> head = sk.nn.LinearHead(16, 1000)
    >>> head.weight = embedding.weight
    >>> head(torch.randn(4, 16), torch.tensor([1, 2, -100, 4])).backward()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LinearHead:
        """A head that shares the parameters of `linear`."""
        if not isinstance(linear, nn.Linear):
            checks.fail(TypeError, "LinearHead.from_linear", "linear", "be a torch.nn.Linear", type(linear).__name__)
        head = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def __call__(self, input: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return super().__call__(input, **options)
        # By name, because the input hook of a tensor-parallel plan drops all positional arguments but the first.
        result = super().__call__(input, labels=labels, **options)
        return result if isinstance(result, tuple) else _local_loss(result, labels, options)

    def forward(
        self, input: Tensor, labels: Tensor | None = None, *, num_items: int | Tensor | None = None, **options: Any
    ) -> Any:
        if labels is None:
            for name in ("num_items", *options) if num_items is not None else options:
                checks.fail(ValueError, "LinearHead", name, "not be given without labels", "a value")
            return super().forward(input)
        options |= {"linear_bias": self.bias, "num_items": num_items}
        if not is_dtensor(input):
            return linear_cross_entropy(input, self.weight, labels, **options)
        from torch.distributed.tensor import DTensor, Shard

        if not is_dtensor(self.weight) or not all(placement.is_replicate() for placement in input.placements):
            must = "be a plain tensor, or a DTensor that is replicated over the mesh of the weight"
            checks.fail(TypeError, "LinearHead", "input", must, f"DTensor {input.placements}")
        if options.get("return_stats"):
            checks.fail(ValueError, "LinearHead", "return_stats", "be False under a tensor-parallel plan", True)
        mesh = input.device_mesh
        options["process_group"] = mesh.get_group()
        loss: Tensor = linear_cross_entropy(input.to_local(), self.weight, labels, **options)
        # The output hook of a plan takes a DTensor whose last dimension is sharded.
        return DTensor.from_local(loss.unsqueeze(-1), mesh, [Shard(loss.dim())], run_check=False)


def _local_loss(loss: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """This rank's loss. The output hook of a tensor-parallel plan returns it with one more dimension, over which it may
    have gathered the losses of all ranks; a loss without that dimension is returned unchanged."""
    dims = (labels.dim() - labels.is_floating_point()) if options.get("reduction") == "none" else 0
    if is_dtensor(loss):
        loss = loss.to_local()
    if loss.dim() == dims:
        return loss
    # The gradient of each rank's loss is 1 on that rank.
    total = loss.sum(-1)
    return loss.detach()[..., 0] + (total - total.detach()) if loss.shape[-1] > 1 else loss.squeeze(-1)


class TokenMasker(Options):
    """Module of `mask_tokens`: the masking step of a data collator, on the device of the ids.

    Args:
        mask_id: id of the mask token.
        vocab_size: number of ids.
        probability: probability that an eligible token is chosen.
        replace: fractions of the chosen tokens that become `mask_id` and a random id; the rest stay.
        special_ids: ids that are never chosen and never drawn.
        mean_span: mean length of a span, in units; None: units are chosen independently.
        min_per_row: least number of chosen units of a row that has so many.
        ignore_index: label of the tokens that were not chosen.

    >>> import sslkernels as sk
    >>> masker = sk.nn.TokenMasker(mask_id=103, vocab_size=30522, special_ids=(0, 101, 102))
    >>> masked = masker(torch.randint(1000, 30522, (2, 16)))
    """

    @checks.with_python_numbers
    def __init__(
        self,
        *,
        mask_id: int,
        vocab_size: int,
        probability: float = 0.15,
        replace: tuple[float, float] = (0.8, 0.1),
        special_ids: Sequence[int] | Tensor = (),
        mean_span: float | None = None,
        min_per_row: int = 0,
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
            min_per_row=min_per_row,
            ignore_index=ignore_index,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        special_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | Sequence[Any] | None = None,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskedTokens:
        return mask_tokens(
            input_ids,
            special_mask=special_mask,
            attention_mask=attention_mask,
            word_ids=word_ids,
            row_ids=row_ids,
            seed=seed,
            generator=generator,
            **self.options(),
        )
