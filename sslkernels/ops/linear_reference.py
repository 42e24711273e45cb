"""Linear cross-entropy in plain torch: it defines the op. All logits exist, in the accumulation dtype, whatever the
limits."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.ops.chunked_linear import Gradients, Limits, Wanted, empty_gradients, normalise
from sslkernels.ops.rows import ReferenceRows, RowOptions, RowOutputs, accumulation_dtype

ROWS = ReferenceRows()


def _operands(
    input: Tensor, linear_weight: Tensor, target: Tensor, compute_dtype: torch.dtype, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """Rounded to the dtype of the matmuls, then held in the accumulation dtype; input is 0 in ignored rows, where it
    may be anything."""
    acc = accumulation_dtype(input.dtype)
    input = input.masked_fill((target == options.ignore_index).unsqueeze(1), 0)
    return input.to(compute_dtype).to(acc), linear_weight.to(compute_dtype).to(acc)


def _gradients(
    grad_logits: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    compute_dtype: torch.dtype,
    options: RowOptions,
    wanted: Wanted,
) -> Gradients:
    gradients = empty_gradients(input, linear_weight, wanted)
    gradients.scale.fill_(1)
    x, w = _operands(input, linear_weight, target, compute_dtype, options)
    if wanted.input:
        gradients.input.copy_(options.logit_scale * grad_logits @ w)
    if wanted.weight:
        gradients.weight.copy_(options.logit_scale * grad_logits.t() @ x)
    if wanted.bias:
        gradients.bias.copy_(grad_logits.sum(0))
    return gradients


def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    coefficient: Tensor | None,
    compute_dtype: torch.dtype,
    options: RowOptions,
    limits: Limits,
    wanted: Wanted,
    stats: bool,
) -> tuple[RowOutputs, Gradients]:
    x, w = _operands(input, linear_weight, target, compute_dtype, options)
    logits = x @ w.t()
    if not any(wanted):
        outputs = ROWS.forward(logits, target, bias, weight, options, stats=stats)
        return outputs, _gradients(logits, input, linear_weight, target, compute_dtype, options, wanted)
    coefficient, scale = normalise(coefficient, target, options.ignore_index, input.dtype)
    outputs = ROWS.forward(logits, target, bias, weight, options, stats=stats, coefficient=coefficient, grad=logits)
    gradients = _gradients(logits, input, linear_weight, target, compute_dtype, options, wanted)
    gradients.scale.copy_(scale)
    return outputs, gradients


def backward(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    state: RowOutputs,
    compute_dtype: torch.dtype,
    options: RowOptions,
    limits: Limits,
    wanted: Wanted,
) -> Gradients:
    x, w = _operands(input, linear_weight, target, compute_dtype, options)
    logits = x @ w.t()
    ROWS.backward(logits, target, bias, weight, options, state, grad_loss, logits)
    return _gradients(logits, input, linear_weight, target, compute_dtype, options, wanted)
