"""Queries against negatives of their own: scores, their part of a row's energy, and gradients in the same pass.

For row i of the query x (N, D) and its negative k of (N, K, D), in the accumulation dtype:

    s_ik = logit_scale * u_ik + logit_bias
    u_ik = <x_i, n_ik>, or query_inverse_norm_i / max(|n_ik|, 1e-12) times it where query_inverse_norm (N,) is given

A negative whose mask (N, K) is False takes no part: its score is -inf, its gradient 0, its memory may hold anything.
reference (N,) is what a row is merged with, and the weight G_ik is the derivative of value_i times coefficient_i:

    energy   reference                       value                             G
    SOFTMAX  log-sum-exp of the others       logaddexp(reference, lse_k s_k)   coefficient * exp(s - value) - smoothing
    SIGMOID  not used                        sum_k softplus(s_k)               coefficient * sigmoid(s)
    HINGE    threshold                       sum_k max(0, s_k - reference)     coefficient where s > reference

Without a reference there are no others (-inf), and the threshold is 0. `final`: the reference of the softmax counts
these negatives already, and is the value. The gradients are the sums of G_ik times the derivatives of s_ik with respect
to query, negatives, logit_scale and logit_bias. query_inverse_norm is a constant to that of the query: what the
normalisation of the query adds is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.dispatch import PREFERENCE, Op
from sslkernels.ops.rows import accumulation_dtype

SOFTMAX, SIGMOID, HINGE = range(3)
NORM_FLOOR = 1e-12  # of a negative's norm, as in torch.nn.functional.normalize

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def empty_outputs(
    query: Tensor, negatives: Tensor, gradients: bool, want_query: bool, want_negatives: bool, want_scores: bool
) -> Outputs:
    """scores, value, grad_query, grad_negatives, grad_scale and grad_bias; of no element where not asked for."""
    rows, count, dim = negatives.shape
    acc = accumulation_dtype(query.dtype)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = acc) -> Tensor:
        return query.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        empty(want_scores, rows, count),
        empty(True, rows),
        empty(gradients and want_query, rows, dim),
        empty(gradients and want_negatives, rows, count, dim, dtype=negatives.dtype),
        empty(gradients, rows),
        empty(gradients, rows),
    )


def _fake(
    query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
    final, want_query, want_negatives, want_scores,
):  # fmt: skip
    return empty_outputs(query, negatives, coefficient is not None, want_query, want_negatives, want_scores)


def _reference(
    query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
    final, want_query, want_negatives, want_scores,
):  # fmt: skip
    acc = accumulation_dtype(query.dtype)
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
    outputs = list(empty_outputs(query, negatives, coefficient is not None, want_query, want_negatives, want_scores))
    outputs[1] = value
    if want_scores:
        outputs[0] = scores
    if coefficient is None:
        return tuple(outputs)

    weight = _slope(scores, value, energy, reference) * coefficient.unsqueeze(1)
    if smoothing is not None and energy == SOFTMAX:
        weight = torch.where(value.isneginf().unsqueeze(1), weight, weight - smoothing.unsqueeze(1))
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
        similarity = similarity.masked_fill(~mask, 0)
    if want_query:
        grad_query = logit_scale * (weight.unsqueeze(2) * n).sum(1)
        outputs[2] = grad_query if query_inverse_norm is None else grad_query * query_inverse_norm.unsqueeze(1)
    if want_negatives:
        direction = x.unsqueeze(1).expand_as(n)
        if query_inverse_norm is not None:
            along = torch.where(norm < NORM_FLOOR, 0, similarity)
            direction = (direction - along.unsqueeze(2) * n) * inverse_norm.unsqueeze(2)
        grad_negatives = (logit_scale * weight).unsqueeze(2) * direction
        if mask is not None:
            grad_negatives = grad_negatives.masked_fill(~mask.unsqueeze(2), 0)
        outputs[3] = grad_negatives.to(negatives.dtype)
    outputs[4] = (weight * similarity).sum(1)
    outputs[5] = weight.sum(1)
    return tuple(outputs)


def _value(scores: Tensor, energy: int, reference: Tensor | None, final: bool) -> Tensor:
    if energy == SIGMOID:
        return -torch.nn.functional.logsigmoid(-scores).sum(1)
    if energy == HINGE:
        return (scores if reference is None else scores - reference.unsqueeze(1)).clamp_min(0).sum(1)
    if reference is None:
        return scores.logsumexp(1)
    return reference.clone() if final else torch.logaddexp(reference, scores.logsumexp(1))


def _slope(scores: Tensor, value: Tensor, energy: int, reference: Tensor | None) -> Tensor:
    """dvalue/ds."""
    if energy == SIGMOID:
        return scores.sigmoid()
    if energy == HINGE:
        over = scores if reference is None else scores - reference.unsqueeze(1)
        return torch.where(over.isnan(), over, (over > 0).to(over.dtype))
    return torch.where(value.isneginf().unsqueeze(1), 0, (scores - value.unsqueeze(1)).exp())


def _native(
    query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
    final, want_query, want_negatives, want_scores,
):  # fmt: skip
    outputs = empty_outputs(query, negatives, coefficient is not None, want_query, want_negatives, want_scores)
    torch.ops.sslkernels_native.own_negatives(
        query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient,
        smoothing, final, *outputs,
    )  # fmt: skip
    return outputs


def _triton(
    query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
    final, want_query, want_negatives, want_scores,
):  # fmt: skip
    from sslkernels.triton_kernels.own_negatives import own_negatives

    outputs = empty_outputs(query, negatives, coefficient is not None, want_query, want_negatives, want_scores)
    own_negatives(
        query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient,
        smoothing, final, outputs,
    )  # fmt: skip
    return outputs


own_negatives = Op(
    "info_nce",
    "own_negatives(Tensor query, Tensor negatives, Tensor? mask, Tensor? query_inverse_norm, Tensor logit_scale, "
    "Tensor? logit_bias, int energy, Tensor? reference, Tensor? coefficient, Tensor? smoothing, bool final, "
    "bool want_query, bool want_negatives, bool want_scores) "
    "-> (Tensor scores, Tensor value, Tensor grad_query, Tensor grad_negatives, Tensor grad_scale, Tensor grad_bias)",
    fake=_fake,
    implementations={"reference": _reference, "cpu": _native, "triton": _triton, "cuda": _native},
    native_ops=("own_negatives",),
    prefer=PREFERENCE,
)
