"""Queries against their per-query negatives: scores, their part of a row's energy, and gradients in the same pass.

For row i of the query x (N, D) and its negative k of (N, K, D), in the accumulation dtype:

    s_ik = logit_scale * u_ik + logit_bias
    u_ik = <x_i, n_ik>, times query_inverse_norm_i / max(|n_ik|, 1e-12) where query_inverse_norm (N,) is given

A negative whose mask (N, K) is False is ignored: its score is -inf, its gradient 0, its memory may hold anything.
With an index (N, K), the negatives are rows of a table (M, D) followed by a bank (B, D), -1 for none, and are gathered
as they are read. An index out of range makes its row NaN.

reference (N,), float64 like value (N,), is what a row is merged with, and G_ik, the derivative of value_i times
coefficient_i, is the weight:

    energy   reference                       value                             G
    SOFTMAX  log-sum-exp of the others       logaddexp(reference, lse_k s_k)   coefficient * exp(s - value) - smoothing
    SIGMOID  not used                        sum_k softplus(s_k)               coefficient * sigmoid(s)
    HINGE    threshold                       sum_k max(0, s_k - reference)     coefficient where s > reference

Without a reference there are no others (-inf), and the threshold is 0. With `final`, the reference of the softmax
already includes these negatives, and is the value. The gradients are the sums of G_ik times the derivatives of s_ik
with respect to query, negatives, logit_scale and logit_bias. The gradient of the query treats query_inverse_norm as a
constant: the caller adds what the normalisation of the query contributes. With an index the gradient of the negatives
is only its multiple (N, K) of the query: the caller sums the multiples of each row of the table, and adds what the
normalisation of that row contributes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.contrastive.pair_rows import HINGE, SIGMOID, SOFTMAX
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import Mutated, operator

NORM_FLOOR = 1e-12  # smallest norm of a negative, as in torch.nn.functional.normalize


class NegativeInputs(NamedTuple):
    query: Tensor
    negatives: Tensor
    index: Tensor | None
    bank: Tensor | None
    mask: Tensor | None
    query_inverse_norm: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None


class RowMerge(NamedTuple):
    """How the negatives of a row enter its energy; coefficient None: no gradients."""

    energy: int
    reference: Tensor | None
    coefficient: Tensor | None
    smoothing: Tensor | None
    final: bool


class NegativeOutputs(NamedTuple):
    """scores (N, K), value (N,), and the gradients (of logit_scale and logit_bias: one per row). Outputs that are not
    wanted have no elements; value is always wanted."""

    scores: Mutated
    value: Mutated
    grad_query: Mutated
    grad_negatives: Mutated
    grad_scale: Mutated
    grad_bias: Mutated


def empty_outputs(
    inputs: NegativeInputs, gradients: bool, want_query: bool, want_negatives: bool, want_scores: bool
) -> NegativeOutputs:
    query, negatives, index, *_ = inputs
    (rows, dim), count = query.shape, (negatives if index is None else index).shape[1]
    acc = accumulation_dtype(query.dtype)
    of_negatives = (rows, count, dim) if index is None else (rows, count)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = acc) -> Tensor:
        return query.new_empty(shape if wanted else (0,), dtype=dtype)

    return NegativeOutputs(
        empty(want_scores, rows, count),
        empty(True, rows, dtype=torch.float64),
        empty(gradients and want_query, rows, dim),
        empty(gradients and want_negatives, *of_negatives, dtype=negatives.dtype if index is None else acc),
        empty(gradients, rows),
        empty(gradients, rows),
    )


def _reference(inputs: NegativeInputs, merge: RowMerge, outputs: NegativeOutputs) -> None:
    query, negatives, index, bank, mask, query_inverse_norm, logit_scale, logit_bias = inputs
    energy, reference, coefficient, smoothing, final = merge
    acc = accumulation_dtype(query.dtype)
    if index is not None:
        negatives, mask = _gathered(negatives, bank, index, mask)
    x, n = query.to(acc), negatives.to(acc)
    if mask is not None:
        n = n.masked_fill(~mask.unsqueeze(2), 0)
    if query_inverse_norm is not None:
        x = x * query_inverse_norm.unsqueeze(1)
        norm = n.square().sum(2).sqrt()
        inverse_norm = 1 / norm.clamp_min(NORM_FLOOR)
        n = n * inverse_norm.unsqueeze(2)
    similarity = (n * x.unsqueeze(1)).sum(2)
    scores = logit_scale * similarity
    if logit_bias is not None:
        scores = scores + logit_bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))

    value = _value(scores, energy, reference, final)
    outputs.value.copy_(value)
    if outputs.scores.numel():
        outputs.scores.copy_(scores)
    if coefficient is None:
        return

    weight = _slope(scores, value, energy, reference) * coefficient.unsqueeze(1)
    if smoothing is not None and energy == SOFTMAX:
        weight = torch.where(value.isneginf().unsqueeze(1), weight, weight - smoothing.unsqueeze(1))
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
        similarity = similarity.masked_fill(~mask, 0)
    if outputs.grad_query.numel():
        grad_query = logit_scale * (weight.unsqueeze(2) * n).sum(1)
        if query_inverse_norm is not None:
            grad_query = grad_query * query_inverse_norm.unsqueeze(1)
        outputs.grad_query.copy_(grad_query)
    if outputs.grad_negatives.numel() and index is not None:
        of_query = logit_scale * weight
        if query_inverse_norm is not None:
            of_query = of_query * query_inverse_norm.unsqueeze(1) * inverse_norm
        outputs.grad_negatives.copy_(of_query)
    elif outputs.grad_negatives.numel():
        direction = x.unsqueeze(1).expand_as(n)
        if query_inverse_norm is not None:
            along = torch.where(norm < NORM_FLOOR, 0, similarity)
            direction = (direction - along.unsqueeze(2) * n) * inverse_norm.unsqueeze(2)
        grad_negatives = (logit_scale * weight).unsqueeze(2) * direction
        if mask is not None:
            grad_negatives = grad_negatives.masked_fill(~mask.unsqueeze(2), 0)
        outputs.grad_negatives.copy_(grad_negatives)
    outputs.grad_scale.copy_((weight * similarity).sum(1))
    outputs.grad_bias.copy_(weight.sum(1))


def _gathered(table: Tensor, bank: Tensor | None, index: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, K, D) rows by index, NaN for one out of range, and which of them there are."""
    table = table if bank is None else torch.cat([table, bank])
    there = index != -1
    wrong = (index < -1) | (index >= table.shape[0])
    table = torch.cat([table, table.new_full((1, table.shape[1]), float("nan"))])
    rows = table[torch.where(wrong, table.shape[0] - 1, index.clamp(min=0)).long()]
    return rows, there if mask is None else there & mask


def _value(scores: Tensor, energy: int, reference: Tensor | None, final: bool) -> Tensor:
    if energy == SIGMOID:
        return -torch.nn.functional.logsigmoid(-scores).sum(1)
    if energy == HINGE:
        return _over(scores, reference).clamp_min(0).sum(1)
    if reference is None:
        return scores.double().logsumexp(1)
    return reference.clone() if final else torch.logaddexp(reference, scores.double().logsumexp(1))


def _over(scores: Tensor, reference: Tensor | None) -> Tensor:
    return scores if reference is None else scores - reference.to(scores.dtype).unsqueeze(1)


def _slope(scores: Tensor, value: Tensor, energy: int, reference: Tensor | None) -> Tensor:
    """dvalue/ds."""
    if energy == SIGMOID:
        return scores.sigmoid()
    if energy == HINGE:
        over = _over(scores, reference)
        return torch.where(over.isnan(), over, (over > 0).to(over.dtype))
    probability = (scores - value.unsqueeze(1)).exp().to(scores.dtype)
    return torch.where(value.isneginf().unsqueeze(1), 0, probability)


def _native(inputs: NegativeInputs, merge: RowMerge, outputs: NegativeOutputs) -> None:
    torch.ops.sslkernels_native.query_negatives(*inputs, *merge, *outputs)


def _triton(inputs: NegativeInputs, merge: RowMerge, outputs: NegativeOutputs) -> None:
    from sslkernels.contrastive.triton.query_negatives import query_negatives

    query_negatives(inputs, merge, outputs)


@operator(
    "info_nce",
    {"reference": _reference, "cpu": _native, "triton": _triton, "cuda": _native},
    native_ops=("query_negatives",),
)
def query_negatives_(inputs: NegativeInputs, merge: RowMerge, outputs: NegativeOutputs) -> None:
    """Fills the outputs that have elements."""
