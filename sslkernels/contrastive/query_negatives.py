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

from sslkernels.contrastive.score_tiles import HINGE, SIGMOID, SOFTMAX
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op

NORM_FLOOR = 1e-12  # of a negative's norm, as in torch.nn.functional.normalize

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_INPUTS = 11  # arguments of the operator before its outputs


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


def _reference(
    query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
    final, out_scores, out_value, out_query, out_negatives, out_scale, out_bias,
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
    out_value.copy_(value)
    if out_scores.numel():
        out_scores.copy_(scores)
    if coefficient is None:
        return

    weight = _slope(scores, value, energy, reference) * coefficient.unsqueeze(1)
    if smoothing is not None and energy == SOFTMAX:
        weight = torch.where(value.isneginf().unsqueeze(1), weight, weight - smoothing.unsqueeze(1))
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
        similarity = similarity.masked_fill(~mask, 0)
    if out_query.numel():
        grad_query = logit_scale * (weight.unsqueeze(2) * n).sum(1)
        out_query.copy_(grad_query if query_inverse_norm is None else grad_query * query_inverse_norm.unsqueeze(1))
    if out_negatives.numel():
        direction = x.unsqueeze(1).expand_as(n)
        if query_inverse_norm is not None:
            along = torch.where(norm < NORM_FLOOR, 0, similarity)
            direction = (direction - along.unsqueeze(2) * n) * inverse_norm.unsqueeze(2)
        grad_negatives = (logit_scale * weight).unsqueeze(2) * direction
        if mask is not None:
            grad_negatives = grad_negatives.masked_fill(~mask.unsqueeze(2), 0)
        out_negatives.copy_(grad_negatives)
    out_scale.copy_((weight * similarity).sum(1))
    out_bias.copy_(weight.sum(1))


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


def _native(*args):
    torch.ops.sslkernels_native.own_negatives(*args)


def _triton(*args):
    from sslkernels.contrastive.triton.query_negatives import own_negatives

    own_negatives(*args[:_INPUTS], args[_INPUTS:])


own_negatives_ = Op(
    "info_nce",
    "own_negatives_(Tensor query, Tensor negatives, Tensor? mask, Tensor? query_inverse_norm, Tensor logit_scale, "
    "Tensor? logit_bias, int energy, Tensor? reference, Tensor? coefficient, Tensor? smoothing, bool final, "
    "Tensor(a!) scores, Tensor(b!) value, Tensor(c!) grad_query, Tensor(d!) grad_negatives, Tensor(e!) grad_scale, "
    "Tensor(f!) grad_bias) -> ()",
    fake=lambda *args: None,
    implementations={"reference": _reference, "cpu": _native, "triton": _triton, "cuda": _native},
    native_ops=("own_negatives",),
    prefer=PREFERENCE,
)


def own_negatives(
    query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
    final, want_query, want_negatives, want_scores,
) -> Outputs:  # fmt: skip
    """The outputs of `own_negatives_`, in memory of their own."""
    outputs = empty_outputs(query, negatives, coefficient is not None, want_query, want_negatives, want_scores)
    own_negatives_(
        query, negatives, mask, query_inverse_norm, logit_scale, logit_bias, energy, reference, coefficient, smoothing,
        final, *outputs,
    )  # fmt: skip
    return outputs
