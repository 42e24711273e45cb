"""Autograd of the contrastive energies, over the raw operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.contrastive.operators import contrastive_bwd, contrastive_fwd, own_contrastive_bwd, own_contrastive_fwd
from sslkernels.contrastive.positives import NO_POSITIVE
from sslkernels.contrastive.records import PairInputs, PairOptions, PairState, PairStatistics
from sslkernels.contrastive.score_tiles import SIGMOID
from sslkernels.core.autograd import distinct
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import Op, kept
from sslkernels.core.scale import scaled

_DIFFERENTIABLE = ("query", "key", "bank", "negatives", "logit_scale", "logit_bias")
_STATE = len(PairState._fields)
_STATISTICS = len(PairStatistics._fields)


class Call(NamedTuple):
    """What is no tensor of a call: the public function's name, the dtype of the matmuls, options, statistics."""

    function: str
    compute_dtype: torch.dtype
    options: PairOptions
    stats: bool


def pair_loss(
    inputs: PairInputs, call: Call, row_weight: Tensor | None, reduction: str
) -> tuple[Tensor, PairStatistics]:
    """The loss of the pairs, reduced, and its statistics."""
    acc = accumulation_dtype(inputs.query.dtype)
    inputs = PairInputs(*distinct(None if t is None else t.contiguous() for t in inputs))
    divisor = None
    if reduction == "mean":
        if inputs.positive is None or call.options.energy == SIGMOID:
            divisor = torch.full((), inputs.query.shape[0], dtype=acc, device=inputs.query.device)
        else:
            divisor = (inputs.positive != NO_POSITIVE).sum().to(acc)
    leaves = [getattr(inputs, name) for name in _DIFFERENTIABLE]
    if reduction != "none" and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return reduced_loss(inputs, None if row_weight is None else row_weight.contiguous(), divisor, call)
    loss, statistics = row_losses(inputs, call)
    if row_weight is not None:
        loss = loss * row_weight.to(acc)
    if reduction != "none":
        loss = loss.sum()
    return loss if divisor is None else loss / divisor, statistics


def row_losses(inputs: PairInputs, call: Call) -> tuple[Tensor, PairStatistics]:
    """Losses of rows; backward computes the products again, for any gradient of each row."""
    losses, *rest = _RowLosses.apply(*_differentiable_first(inputs), *call)
    return losses, PairStatistics(*rest[_STATE:])


def reduced_loss(
    inputs: PairInputs, row_weight: Tensor | None, divisor: Tensor | None, call: Call
) -> tuple[Tensor, PairStatistics]:
    """sum(row_weight * loss) / divisor; its gradients are computed with it and kept."""
    tensors = _differentiable_first(inputs)
    wanted = tuple(t is not None and t.requires_grad for t in tensors[: len(_DIFFERENTIABLE)])
    loss, _, *rest = _ReducedLoss.apply(*tensors, row_weight, divisor, *call, wanted)
    return loss, PairStatistics(*rest[:_STATISTICS])


def _differentiable_first(inputs: PairInputs) -> tuple[Tensor | None, ...]:
    rest = [getattr(inputs, name) for name in PairInputs._fields if name not in _DIFFERENTIABLE]
    return *(getattr(inputs, name) for name in _DIFFERENTIABLE), *rest


def _raw_inputs(
    query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index, query_ids, key_ids
) -> PairInputs:
    """In the order of the raw operators, the scalars (1,) in the accumulation dtype."""
    acc = accumulation_dtype(query.dtype)
    scale = logit_scale.reshape(1).to(acc)
    bias = None if logit_bias is None else logit_bias.reshape(1).to(acc)
    return PairInputs(
        query, key, bank, negatives, negatives_mask, positive, self_index, query_ids, key_ids, scale, bias
    )


def _op(inputs: PairInputs, options: PairOptions, shared: Op, own: Op) -> Op:
    return shared if options.in_batch or inputs.bank is not None else own


class _RowLosses(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index, query_ids, key_ids,
        function, compute_dtype, options, stats,
    ):  # fmt: skip
        inputs = _raw_inputs(
            query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index, query_ids,
            key_ids,
        )  # fmt: skip
        fwd = _op(inputs, options, contrastive_fwd, own_contrastive_fwd)
        outputs = fwd(*inputs, None, compute_dtype, *options, *[False] * len(_DIFFERENTIABLE), stats)
        return outputs[: 1 + _STATE + _STATISTICS]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.function, ctx.compute_dtype, ctx.options, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1 : 1 + _STATE])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        wanted = ctx.needs_input_grad[: len(_DIFFERENTIABLE)]
        grads = (None,) * len(wanted)
        if grad_loss is not None:
            grads = _RowLossesBackward.apply(
                grad_loss.contiguous(), *ctx.saved_tensors, ctx.function, ctx.compute_dtype, ctx.options, wanted
            )
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 9


class _RowLossesBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss, query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index,
        query_ids, key_ids, row_others, column_lse, column_others, function, compute_dtype, options, wanted,
    ):  # fmt: skip
        inputs = _raw_inputs(
            query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index, query_ids,
            key_ids,
        )  # fmt: skip
        bwd = _op(inputs, options, contrastive_bwd, own_contrastive_bwd)
        state = (row_others, column_lse, column_others)
        *grads, scale = bwd(grad_loss, *inputs, *state, compute_dtype, *options, *wanted)
        leaves = (query, key, bank, negatives, logit_scale, logit_bias)
        return tuple(
            scaled(grad, scale, leaf.dtype).reshape(leaf.shape) if want else None
            for grad, leaf, want in zip(grads, leaves, wanted, strict=True)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[15]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.function}: double backward is not supported")


class _ReducedLoss(Function):
    """Backward multiplies the kept gradients by grad_output; what it needs and forward was not asked for is an error,
    never a zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index, query_ids, key_ids,
        row_weight, divisor, function, compute_dtype, options, stats, wanted,
    ):  # fmt: skip
        acc = accumulation_dtype(query.dtype)
        coefficient = query.new_ones(query.shape[0], dtype=acc) if row_weight is None else row_weight.to(acc)
        if divisor is not None:
            coefficient = coefficient / divisor
        inputs = _raw_inputs(
            query, key, bank, negatives, logit_scale, logit_bias, negatives_mask, positive, self_index, query_ids,
            key_ids,
        )  # fmt: skip
        fwd = _op(inputs, options, contrastive_fwd, own_contrastive_fwd)
        losses, *rest = fwd(*inputs, coefficient, compute_dtype, *options, *wanted, stats)
        loss = (losses if row_weight is None else losses * row_weight.to(acc)).sum()
        return (loss if divisor is None else loss / divisor, losses, *rest[_STATE:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, divisor, ctx.function, _, _, _, ctx.computed = inputs
        leaves = (*tensors[: len(_DIFFERENTIABLE)], tensors[-1])
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2 + _STATISTICS :], output[1], divisor, *leaves)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        result: list[Any] = [None] * 18
        if grad_loss is None:
            return tuple(result)
        saved = ctx.saved_tensors  # a checkpoint unpacks them once
        gradients, (scale, losses, divisor, *leaves) = saved[: len(_DIFFERENTIABLE)], saved[len(_DIFFERENTIABLE) :]
        for i, name in enumerate(_DIFFERENTIABLE):
            if not ctx.needs_input_grad[i]:
                continue
            if not ctx.computed[i]:
                raise RuntimeError(f'{ctx.function}: forward saw no gradient wanted for {name}; use reduction="none"')
            leaf = leaves[i]
            gradient = kept(ctx.function, gradients[i], grad_loss * scale, leaf.dtype, *leaves)
            result[i] = gradient.reshape(leaf.shape)
        if ctx.needs_input_grad[11]:
            by_row = losses if divisor is None else losses / divisor
            result[11] = kept(ctx.function, by_row, grad_loss, leaves[-1].dtype, *leaves)
        return tuple(result)
