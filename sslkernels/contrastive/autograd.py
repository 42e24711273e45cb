"""Autograd of the contrastive energies, over the raw operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.contrastive.operators import (
    contrastive_bwd,
    contrastive_fwd,
    contrastive_ranks_bwd,
    contrastive_ranks_fwd,
    per_query_contrastive_bwd,
    per_query_contrastive_fwd,
)
from sslkernels.contrastive.pair_rows import NO_POSITIVE, SIGMOID
from sslkernels.contrastive.records import (
    PairGradients,
    PairInputs,
    PairOptions,
    PairState,
    PairStatistics,
    PairWanted,
    RankOptions,
    RankState,
)
from sslkernels.core.autograd import Function, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype, contiguous
from sslkernels.core.operator import full
from sslkernels.core.scale import scaled


class CallConfig(NamedTuple):
    """The other arguments of a call, besides tensors and options. function: the name of the public function."""

    function: str
    reduction: str = "mean"
    num_items: int | Tensor | None = None
    on_empty: str = "nan"
    process_group: Any = None
    ring: bool = False
    return_stats: bool = False


def pair_loss(
    inputs: PairInputs,
    options: PairOptions,
    row_weight: Tensor | None,
    call: CallConfig,
    over: RankOptions | None = None,
) -> tuple[Tensor, PairStatistics]:
    """The loss of the pairs, reduced, and its statistics: `_ReducedLoss` for a mean or a sum that wants gradients,
    `_RowLosses` for others. over: the blocks of scores are divided among ranks (`_RankLosses`); inputs as in
    `contrastive_ranks_fwd`."""
    acc = accumulation_dtype(inputs.query.dtype)
    mask = inputs.candidate_mask  # never copied: kernels take any strides
    inputs = PairInputs(*[None if v is None else v if v is mask else v.contiguous() for v in inputs])
    divisor = _divisor(inputs, options, call) if call.reduction == "mean" else None
    wanted = PairWanted(*(_requires_grad(getattr(inputs, name)) for name in PairWanted._fields))
    kept = call.reduction != "none" and torch.is_grad_enabled() and any(wanted)
    if kept and over is None:
        loss, _, statistics, _ = _ReducedLoss.run(
            inputs, contiguous(row_weight), divisor, options, wanted, call.function, call.return_stats
        )
        return loss, statistics
    if over is None:
        loss, _, statistics = _RowLosses.run(inputs, options, call.function, call.return_stats)
    else:
        if kept and inputs.bank is not None and not wanted.bank:  # a queue may be overwritten before backward
            inputs = inputs._replace(bank=inputs.bank.clone())
        loss, _, statistics = _RankLosses.run(inputs, options, over, call.function, call.return_stats)
    if row_weight is not None:
        loss = loss * row_weight.to(acc)
    if call.reduction != "none":
        loss = loss.sum()
    return loss if divisor is None else loss / divisor, statistics


def _divisor(inputs: PairInputs, options: PairOptions, call: CallConfig) -> Tensor:
    """The divisor of "mean": num_items, or the number of rows that count."""
    query, num_items = inputs.query, call.num_items
    acc = accumulation_dtype(query.dtype)
    if isinstance(num_items, Tensor):
        divisor = num_items.detach().reshape(()).to(acc)
    elif num_items is not None or inputs.positive is None or options.energy == SIGMOID:
        count = query.shape[0] if num_items is None else num_items
        divisor = full((), count, acc, query.device)
    else:
        divisor = (inputs.positive != NO_POSITIVE).sum().to(acc)
    return divisor if call.on_empty == "nan" else torch.where(divisor == 0, 1, divisor)


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _forward(
    inputs: PairInputs, coefficient: Tensor | None, options: PairOptions, wanted: PairWanted, stats: bool
) -> tuple[Tensor, PairState, PairStatistics, PairGradients]:
    """Runs the operator `contrastive_fwd`, or its twin for per-query negatives alone, which has no tiles."""
    tiles = stats or _has_shared_candidates(inputs, options)  # statistics are over all keys
    fwd = contrastive_fwd if tiles else per_query_contrastive_fwd
    return fwd(_raw_inputs(inputs), coefficient, options, wanted, stats)


def _has_shared_candidates(inputs: PairInputs, options: PairOptions) -> bool:
    """Whether queries are compared with keys or a bank; otherwise they have per-query negatives alone."""
    return options.in_batch or inputs.bank is not None


def _raw_inputs(inputs: PairInputs) -> PairInputs:
    acc = accumulation_dtype(inputs.query.dtype)

    def one_element(number: Tensor) -> Tensor:
        number = number if number.dim() == 1 else number.reshape(1)
        return number if number.dtype == acc else number.to(acc)

    scale, bias = inputs.logit_scale, inputs.logit_bias
    return inputs._replace(logit_scale=one_element(scale), logit_bias=None if bias is None else one_element(bias))


class _RowLosses(Function):
    """Per-row losses and statistics; backward computes the scores again, for whatever gradient each row gets."""

    differentiable = 1

    @staticmethod
    def forward(
        inputs: PairInputs, options: PairOptions, function: str, stats: bool
    ) -> tuple[Tensor, PairState, PairStatistics]:
        losses, state, statistics, _ = _forward(inputs, None, options, PairWanted(), stats)
        return losses, state, statistics

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pairs, ctx.options, ctx.function, _ = inputs
        _, state, _ = outputs
        save(ctx, pairs, state)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None
        needs, *_ = _RowLosses.wanted(ctx)
        wanted = PairWanted(*(getattr(needs, name) for name in PairWanted._fields))
        pairs, state = saved(ctx)
        return (_row_gradients(grad_loss.contiguous(), pairs, state, ctx.options, wanted, ctx.function),)


@once_differentiable("contrastive_energy")
def _row_gradients(
    grad_loss: Tensor, inputs: PairInputs, state: PairState, options: PairOptions, wanted: PairWanted, function: str
) -> PairInputs:
    """The gradients of the inputs, None where not wanted."""
    bwd = contrastive_bwd if _has_shared_candidates(inputs, options) else per_query_contrastive_bwd
    return _scaled_gradients(bwd(grad_loss, _raw_inputs(inputs), state, options, wanted), inputs, wanted)


def _scaled_gradients(gradients: PairGradients, inputs: PairInputs, wanted: PairWanted) -> PairInputs:
    found = {}
    for name in PairWanted._fields:
        if getattr(wanted, name):
            leaf = getattr(inputs, name)
            found[name] = scaled(getattr(gradients, name), gradients.scale, leaf.dtype).reshape(leaf.shape)
    return _input_gradients(found)


class _RankLosses(Function):
    """The losses of this rank's rows against the keys of all ranks, each of which must run its backward, whatever
    gradient its rows get."""

    differentiable = 1

    @staticmethod
    def forward(
        inputs: PairInputs, options: PairOptions, over: RankOptions, function: str, stats: bool
    ) -> tuple[Tensor, RankState, PairStatistics]:
        return contrastive_ranks_fwd(_raw_inputs(inputs), options, over, stats)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pairs, ctx.options, ctx.over, ctx.function, _ = inputs
        _, state, _ = outputs
        save(ctx, pairs, state)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None
        needs, *_ = _RankLosses.wanted(ctx)
        wanted = PairWanted(*(getattr(needs, name) for name in PairWanted._fields))
        pairs, state = saved(ctx)
        gradients = _rank_gradients(grad_loss.contiguous(), pairs, state, ctx.options, ctx.over, wanted, ctx.function)
        return (gradients,)


@once_differentiable("contrastive_energy")
def _rank_gradients(
    grad_loss: Tensor,
    inputs: PairInputs,
    state: RankState,
    options: PairOptions,
    over: RankOptions,
    wanted: PairWanted,
    function: str,
) -> PairInputs:
    gradients = contrastive_ranks_bwd(grad_loss, _raw_inputs(inputs), state, options, over, wanted)
    return _scaled_gradients(gradients, inputs, wanted)


class _Leaves(NamedTuple):
    """The tensors of a reduced loss that want a gradient, and its row weights."""

    query: Tensor | None
    key: Tensor | None
    bank: Tensor | None
    negatives: Tensor | None
    logit_scale: Tensor | None
    logit_bias: Tensor | None
    row_weight: Tensor | None


class _ReducedLoss(Function):
    """sum(row_weight * loss) / divisor, whose gradients are computed with it and kept.

    Backward multiplies them by grad_output. A gradient that backward needs but forward did not compute is an error,
    never a zero.
    """

    differentiable = 1

    @staticmethod
    def forward(
        inputs: PairInputs,
        row_weight: Tensor | None,
        divisor: Tensor | None,
        options: PairOptions,
        wanted: PairWanted,
        function: str,
        stats: bool,
    ) -> tuple[Tensor, Tensor, PairStatistics, PairGradients]:
        query = inputs.query
        acc = accumulation_dtype(query.dtype)
        coefficient = query.new_ones(query.shape[0], dtype=acc) if row_weight is None else row_weight.to(acc)
        if divisor is not None:
            coefficient = coefficient / divisor
        losses, _, statistics, gradients = _forward(inputs, coefficient, options, wanted, stats)
        loss = (losses if row_weight is None else losses * row_weight.to(acc)).sum()
        return loss if divisor is None else loss / divisor, losses, statistics, gradients

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pairs, row_weight, divisor, _, ctx.computed, ctx.function, _ = inputs
        _, losses, _, gradients = outputs
        # A tensor without a gradient, such as a queue, may be overwritten before backward.
        wanted = ((name, getattr(ctx.computed, name)) for name in PairWanted._fields)
        leaves = _Leaves(*(getattr(pairs, name) if want else None for name, want in wanted), row_weight)
        save(ctx, gradients, losses, divisor, leaves)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None
        gradients, losses, divisor, leaves = saved(ctx)
        needs, needs_row_weight, *_ = _ReducedLoss.wanted(ctx)
        wanted = PairWanted(*(getattr(needs, name) for name in PairWanted._fields))
        for name, want, computed in zip(PairWanted._fields, wanted, ctx.computed, strict=True):
            if want and not computed:
                raise RuntimeError(f'{ctx.function}: forward saw no gradient wanted for {name}; use reduction="none"')
        found = _kept_gradients(gradients, grad_loss * gradients.scale, leaves, wanted, ctx.function)
        grad_row_weight = None
        if needs_row_weight:
            by_row = losses if divisor is None else losses / divisor
            grad_row_weight = _kept_row_gradient(by_row, grad_loss, leaves, ctx.function)
        return found, grad_row_weight


@once_differentiable("contrastive_energy")
def _kept_gradients(
    gradients: PairGradients, scale: Tensor, leaves: _Leaves, wanted: PairWanted, function: str
) -> PairInputs:
    found = {}
    for name, want in zip(PairWanted._fields, wanted, strict=True):
        if want:
            leaf = getattr(leaves, name)
            gradient = scaled(getattr(gradients, name), scale, leaf.dtype, saved=True)
            found[name] = gradient if gradient.shape == leaf.shape else gradient.reshape(leaf.shape)
    return _input_gradients(found)


@once_differentiable("contrastive_energy")
def _kept_row_gradient(gradient: Tensor, scale: Tensor, leaves: _Leaves, function: str) -> Tensor:
    return scaled(gradient, scale, leaves.row_weight.dtype, saved=True)


def _input_gradients(found: dict[str, Tensor]) -> PairInputs:
    return PairInputs(*[found.get(name) for name in PairInputs._fields])
