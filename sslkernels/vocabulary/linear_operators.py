"""The raw operators of `linear_cross_entropy`, and the plan that each backend runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from sslkernels.core.operator import operator
from sslkernels.vocabulary import chunked_linear, linear_reference
from sslkernels.vocabulary.linear_records import NAME, Gradients, Operands, PlanOptions, Wanted, empty_gradients
from sslkernels.vocabulary.selection import check_capacity, void_overflow
from sslkernels.vocabulary.sliced_rows import slices_in
from sslkernels.vocabulary.softmax_rows import (
    NativeRows,
    RowOptions,
    RowOutputs,
    RowState,
    TritonRows,
    check_target_range,
    empty_outputs,
)


def _fwd(
    forward: Callable[..., tuple[RowOutputs, Gradients]],
    operands: Operands,
    coefficient: Tensor | None,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
    stats: bool,
) -> tuple[RowOutputs, Gradients]:
    check_capacity(NAME, operands.target, options.ignore_index, plan.capacity)
    outputs, gradients = forward(operands, coefficient, options, plan, wanted, stats)
    if not operands.target.is_floating_point():
        slices = slices_in(plan, operands)
        vocab = operands.linear_weight.shape[0] if slices is None else slices.total
        check_target_range(NAME, outputs.loss, operands.target, vocab, options.ignore_index)
    void_overflow(operands.target, options.ignore_index, plan.capacity, gradients.scale, outputs)
    return outputs, gradients


def _bwd(
    backward: Callable[..., Gradients],
    grad_loss: Tensor,
    operands: Operands,
    state: RowState,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
) -> Gradients:
    gradients = backward(grad_loss, operands, state, options, plan, wanted)
    void_overflow(operands.target, options.ignore_index, plan.capacity, gradients.scale)
    return gradients


def _implementations(adapt: Callable[..., Any], name: str) -> dict[str, Callable[..., Any]]:
    native = partial(adapt, partial(getattr(chunked_linear, name), NativeRows()))
    return {
        "reference": partial(adapt, getattr(linear_reference, name)),
        "cpu": native,
        "cuda": native,
        "triton": partial(adapt, partial(getattr(chunked_linear, name), TritonRows())),
    }


def _flops(operands: Operands, wanted: Wanted) -> int:
    """Logits, and the wanted gradients of input and weight, as if no row were ignored: only the data say which are."""
    (rows, dim), vocab = operands.input.shape, operands.linear_weight.shape[0]
    return 2 * rows * dim * vocab * (1 + wanted.input + wanted.linear_weight)


@operator(
    NAME,
    _implementations(_fwd, "forward"),
    native_ops=NativeRows.OPS,
    flops=lambda operands, coefficient, options, plan, wanted, stats: _flops(operands, wanted),
)
def linear_cross_entropy_fwd(
    operands: Operands,
    coefficient: Tensor | None,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
    stats: bool,
) -> tuple[RowOutputs, Gradients]:
    """Loss and state of each row, and the wanted gradients of sum(coefficient * loss)."""
    return empty_outputs(operands.input, operands.input.shape[0], stats), empty_gradients(operands, wanted)


@operator(
    NAME,
    _implementations(_bwd, "backward"),
    native_ops=NativeRows.OPS,
    flops=lambda grad_loss, operands, state, options, plan, wanted: _flops(operands, wanted),
)
def linear_cross_entropy_bwd(
    grad_loss: Tensor, operands: Operands, state: RowState, options: RowOptions, plan: PlanOptions, wanted: Wanted
) -> Gradients:
    """The gradients of sum(grad_loss * loss), from recomputed logits."""
    return empty_gradients(operands, wanted)
