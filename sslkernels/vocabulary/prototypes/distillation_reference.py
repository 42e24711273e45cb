"""Distillation over a projection in plain torch: it defines the op. All logits are materialised, in the accumulation
dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.vocabulary.linear_records import empty_gradients, normalise
from sslkernels.vocabulary.prototypes.distillation_records import (
    Gradients,
    Operands,
    Options,
    RowOutputs,
    Wanted,
    centered,
    empty_outputs,
    inverse_of,
    shares,
)


def forward(
    operands: Operands, coefficient: Tensor | None, options: Options, wanted: Wanted
) -> tuple[RowOutputs, Gradients]:
    acc = accumulation_dtype(operands.input.dtype)
    student_inverse, teacher_inverse = inverse_of(operands.temperature).unbind()
    weight = operands.linear_weight.to(options.student_dtype).to(acc)
    target = _target(operands, options, teacher_inverse)
    q, left_out = target.q, target.left_out
    # A row that is left out may hold anything.
    x = operands.input.masked_fill(left_out.unsqueeze(1), 0).to(options.student_dtype).to(acc)
    z = _scaled(x @ weight.t(), centered(operands.linear_bias), student_inverse)
    row_max, best = z.max(1, keepdim=True)
    gaps = row_max - z
    others = (-gaps).exp().scatter(1, best, 0).sum(1, keepdim=True)
    log_sum = torch.log1p(others)
    log_p = -gaps - log_sum
    p = (-gaps).exp() / (1 + others)

    target_gap = torch.where(q == 0, 0, q * gaps).sum(1)
    student_gap = torch.where(p == 0, 0, p * gaps).sum(1)
    # Where both are near 1, 1 - q and 1 - p are known without cancellation.
    p_best, q_best = p.gather(1, best), q.gather(1, best)
    at_best = torch.where(
        (p_best > 0.5) & (q_best > 0.5), target.rest.gather(1, best) - others / (1 + others), p_best - q_best
    )
    difference = (p - q).scatter(1, best, at_best)
    log_q = torch.where(q > 0.5, torch.log1p(-target.rest), q.log())
    poison = 0 * (target_gap + p.sum(1))  # NaN where the row has one
    loss = target_gap + log_sum.squeeze(1)
    if options.divergence:
        loss = torch.where(q == 0, p, q * (log_q - log_p) + difference).sum(1) + poison
    outputs = empty_outputs(operands, 0, False)._replace(
        loss=loss.masked_fill(left_out, 0), gap=(student_gap - target_gap).masked_fill(left_out, 0)
    )
    if options.stats:
        outputs = outputs._replace(
            teacher_entropy=-torch.where(q == 0, 0, q * log_q).sum(1).masked_fill(left_out, 0),
            student_entropy=(student_gap + log_sum.squeeze(1)).masked_fill(left_out, 0),
            agreement=(q.argmax(1) == best.squeeze(1)) & ~left_out,
            usage=q.sum(0) / (~left_out).sum(),
        )
    gradients = empty_gradients(operands, wanted)
    if not any(wanted):
        return outputs, gradients
    coefficient = (coefficient * student_inverse).masked_fill(left_out, 0)
    coefficient = normalise(coefficient, gradients.scale, operands.input.dtype)
    grad = (coefficient.unsqueeze(1) * difference).masked_fill(left_out.unsqueeze(1), 0)
    if wanted.input:
        gradients.input.copy_(grad @ weight)
    if wanted.linear_weight:
        gradients.linear_weight.copy_(grad.t() @ x)
    if wanted.linear_bias:
        gradients.linear_bias.copy_(grad.sum(0))
    return outputs, gradients


def _scaled(logits: Tensor, offset: Tensor | None, inverse: Tensor) -> Tensor:
    """(logits + offset) * inverse."""
    logits = logits * inverse
    return logits if offset is None else logits + (offset * inverse).to(logits.dtype)


class _Target(NamedTuple):
    """q (N, V), 1 - q, and the rows that have none."""

    q: Tensor
    rest: Tensor
    left_out: Tensor


def _target(operands: Operands, options: Options, inverse: Tensor) -> _Target:
    count, index = operands.input.shape[0], operands.teacher_index
    acc = accumulation_dtype(operands.input.dtype)
    teacher, weight = (t.to(options.teacher_dtype).to(acc) for t in (operands.teacher, operands.teacher_weight))
    z = _scaled(teacher @ weight.t(), centered(operands.teacher_offset), inverse)
    row_max, best = z.max(1, keepdim=True)
    exp = (z - row_max).exp()
    others = exp.scatter(1, best, 0).sum(1, keepdim=True)
    softmax = exp / (1 + others)
    rest = (1 - softmax).scatter(1, best, others / (1 + others))
    if index is None:
        return _Target(softmax, rest, torch.zeros(count, dtype=torch.bool, device=z.device))
    index, share = shares(index, operands.teacher.shape[0], acc)
    q, rest_of_q = (softmax.new_zeros(count, weight.shape[0]) for _ in range(2))
    for row, part in zip(index.unbind(1), share.unsqueeze(2).unbind(1), strict=True):
        if softmax.shape[0] > 0:
            q += torch.where(part == 0, 0, part * softmax[row])
            rest_of_q += torch.where(part == 0, 0, part * rest[row])
    return _Target(q, rest_of_q, (share == 0).all(1))
