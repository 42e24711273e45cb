"""Linear cross-entropy in plain torch: it defines the op. All logits are materialised, in the accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.vocabulary.linear_records import Gradients, Operands, PlanOptions, Wanted, empty_gradients, normalise
from sslkernels.vocabulary.sliced_rows import rows_for, slices_in
from sslkernels.vocabulary.softmax_rows import ReferenceRows, RowOptions, RowOutputs, RowState


def forward(
    operands: Operands,
    coefficient: Tensor | None,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
    stats: bool,
) -> tuple[RowOutputs, Gradients]:
    x, w = _rounded(operands, options, plan)
    rows = (operands.target, operands.linear_bias, operands.weight, options)
    logits = x @ w.t()
    kernels = rows_for(operands.target, ReferenceRows(), slices_in(plan, operands))
    gradients = empty_gradients(operands, wanted)
    if not any(wanted):
        return kernels.forward(logits, *rows, stats=stats), gradients
    # The coefficient of an ignored row may be anything, 1 / 0 where no row is valid.
    coefficient = coefficient.masked_fill(_ignored(operands, options), 0)
    coefficient = normalise(coefficient, gradients.scale, operands.input.dtype)
    outputs = kernels.forward(logits, *rows, stats=stats, coefficient=coefficient, grad=logits)
    _fill_gradients(logits, operands, options, plan, wanted, gradients)
    return outputs, gradients


def backward(
    grad_loss: Tensor, operands: Operands, state: RowState, options: RowOptions, plan: PlanOptions, wanted: Wanted
) -> Gradients:
    x, w = _rounded(operands, options, plan)
    logits = x @ w.t()
    kernels = rows_for(operands.target, ReferenceRows(), slices_in(plan, operands))
    kernels.backward(logits, operands.target, operands.linear_bias, operands.weight, options, state, grad_loss, logits)
    gradients = empty_gradients(operands, wanted)
    _fill_gradients(logits, operands, options, plan, wanted, gradients)
    return gradients


def _ignored(operands: Operands, options: RowOptions) -> Tensor:
    target = operands.target
    if target.is_floating_point():  # class probabilities
        return torch.zeros(target.shape[0], dtype=torch.bool, device=target.device)
    return target == options.ignore_index


def _rounded(operands: Operands, options: RowOptions, plan: PlanOptions) -> tuple[Tensor, Tensor]:
    """Input and weight rounded to the dtype of the matmuls, then converted to the accumulation dtype. Ignored rows of
    the input, which may hold anything, become 0."""
    acc = accumulation_dtype(operands.input.dtype)
    input = operands.input.masked_fill(_ignored(operands, options).unsqueeze(1), 0)
    return input.to(plan.compute_dtype).to(acc), operands.linear_weight.to(plan.compute_dtype).to(acc)


def _fill_gradients(
    grad_logits: Tensor,
    operands: Operands,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
    gradients: Gradients,
) -> None:
    x, w = _rounded(operands, options, plan)
    if wanted.input:
        gradients.input.copy_(options.logit_scale * grad_logits @ w)
    if wanted.linear_weight:
        gradients.linear_weight.copy_(options.logit_scale * grad_logits.t() @ x)
    if wanted.linear_bias:
        gradients.linear_bias.copy_(grad_logits.sum(0))
