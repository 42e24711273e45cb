"""The per-row stages of a contrastive loss, before and after the tiles of scores, in plain torch, which defines them.

Before: inverse norms, and the scores of the positives. After: the losses, from sums that leave the positive out, and
the gradients of the features, from the tiles' gradients. A confident pair keeps its digits: the score of the positive
is compared with the log-sum-exp of all others, rather than subtracted from a log-sum-exp that contains it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12
# Values of `positive` for rows without a positive, and for rows whose index was out of range.
NO_POSITIVE, INVALID_POSITIVE = -1, -2
SOFTMAX, SIGMOID, HINGE = 0, 1, 2
# Elements of a block of rows: small enough for its temporaries in the accumulation dtype, large on a GPU, where each
# block costs launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


class ColumnSums(NamedTuple):
    """Running sums per column, None where not wanted; float64, except max.

    max: of s (softmax). sum: of exp(s - max), of softplus(s) (of softplus(-s) for extra positives), or of
    max(0, s - threshold). active: how many s > threshold (hinge). score_sum: of s. positive_sum: of the s of extra
    positives.
    """

    max: Tensor | None
    sum: Tensor
    active: Tensor | None
    score_sum: Tensor | None
    positive_sum: Tensor | None


class SideGrad(NamedTuple):
    """The part of the rows, or of the columns, in the gradient of a score; weight None: no part.

    softmax: weight * exp(s - reference) - share (extra positives) - smoothing, where reference is the rounded
    log-sum-exp and weight is multiplied by what the rounding took from the probabilities (`settled`);
    sigmoid: weight * sigmoid(s), or -weight * sigmoid(-s) for extra positives;
    hinge: weight where s > reference, the threshold.
    """

    weight: Tensor | None = None
    reference: Tensor | None = None
    share: Tensor | None = None
    smoothing: Tensor | None = None


class PositivePairs(NamedTuple):
    """queries (N, D) and keys (M, D) in one dtype, with their inverse norms if they are normalised; positive (N,)
    int64: the key of each query, negative for none; None: row i."""

    query: Tensor
    key: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    positive: Tensor | None


class LossOptions(NamedTuple):
    """half: the share of this direction in the loss."""

    energy: int
    half: float
    label_smoothing: float
    ids_positive: bool


class LossRows(NamedTuple):
    """One direction of a loss, per row: the sums over all candidates but the positive, the positive's score and u, the
    positive as in `PositivePairs`, how many positives and candidates there are (None if the loss needs neither), and
    the row's part in the gradient, without the references of a softmax. The sums may have more entries than there are
    rows."""

    sums: ColumnSums
    score: Tensor
    u: Tensor
    positive: Tensor | None
    positives: Tensor | None
    candidates: Tensor | None
    side: SideGrad


class LossOutputs(NamedTuple):
    """others (softmax; written): the log-sum-exp without the positive, float64. reference, weight (softmax; written):
    of `SideGrad`, from the log-sum-exp with the positive; inf without a positive. loss, score_gradient (of the
    positive's score), dot, total (of the gradient times u, and of the gradient; float64): added to.
    None: not wanted."""

    others: Tensor | None
    reference: Tensor | None
    weight: Tensor | None
    loss: Tensor | None
    score_gradient: Tensor
    dot: Tensor
    total: Tensor


class FeatureGradient(NamedTuple):
    """total (N, D), in the accumulation dtype or the dtype of the features: the gradient before logit_scale and
    normalisation, as if u were the product of the features themselves. values (N, D), norm: the features and their
    inverse norms.

    partner: the features of the positive, row `index` (row i if None, as far as there are rows), which add
    score_gradient * norm * partner_norm * partner. extra (N, D): added after logit_scale.
    """

    total: Tensor
    values: Tensor
    norm: Tensor | None
    partner: Tensor | None = None
    partner_norm: Tensor | None = None
    index: Tensor | None = None
    score_gradient: Tensor | None = None
    extra: Tensor | None = None


def row_blocks(values: Tensor, share: int = 1) -> list[slice]:
    """Slices of the rows of `values` (rows, width) whose temporaries are small; share: that many times smaller."""
    count, width = values.shape
    rows = max(BLOCK_ELEMENTS.get(values.device.type, BLOCK_ELEMENTS["cuda"]) // share // max(width, 1), 1)
    return [slice(begin, min(begin + rows, count)) for begin in range(0, count, rows)]


def inverse_norm(values: Tensor, acc: torch.dtype) -> Tensor:
    """1 / max(norm, 1e-12) of each row, in the dtype `acc`."""
    return torch.linalg.vector_norm(values, dim=1, dtype=acc).clamp_min(NORM_EPS).reciprocal()


def positive_scores(pairs: PositivePairs, scale: Tensor, bias: Tensor | None, u: Tensor, score: Tensor) -> None:
    """Writes u and s of each row's positive: 0 and the bias without one, NaN for an invalid one."""
    u.zero_()
    if pairs.key.shape[0] > 0:
        index, has = _partners(pairs.positive, u, pairs.key)
        for rows in row_blocks(pairs.query):
            part = (pairs.query[rows].to(u.dtype) * pairs.key[index[rows]].to(u.dtype)).sum(1)
            u[rows] = torch.where(has[rows], part, 0)
        if pairs.query_norm is not None:
            u.mul_(torch.where(has, pairs.query_norm * pairs.key_norm[index], 0))
    if pairs.positive is not None:
        u.masked_fill_(pairs.positive == INVALID_POSITIVE, float("nan"))
    torch.mul(u, scale, out=score)
    if bias is not None:
        score.add_(bias)


def _partners(positive: Tensor | None, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """An index into `keys` that is safe to gather with, and which of `rows` have a partner."""
    if positive is None:
        positive = torch.arange(rows.shape[0], device=rows.device)
        positive = torch.where(positive < keys.shape[0], positive, NO_POSITIVE)
    return positive.clamp(min=0), positive >= 0


def add_losses(rows: LossRows, options: LossOptions, outputs: LossOutputs) -> None:
    """The losses of rows whose sums are complete, and the gradient of their positives' scores."""
    score, count = rows.score, rows.score.shape[0]
    sums, side = (type(part)(*(None if v is None else v[:count] for v in part)) for part in (rows.sums, rows.side))
    counts = (None if v is None else v[:count] for v in (rows.positives, rows.candidates))
    rows = LossRows(sums, score, rows.u, rows.positive, *counts, side)
    counted = torch.ones_like(score, dtype=torch.bool) if rows.positive is None else rows.positive != NO_POSITIVE
    slope = None
    if options.energy == SOFTMAX:
        others = log_sum(sums)
        if outputs.others is not None:
            outputs.others.copy_(others)
        if outputs.reference is not None:
            outputs.reference.fill_(float("inf"))  # without a positive every exponential is 0
            lse = torch.logaddexp(others, score.double()).masked_fill_(~counted, float("inf"))
            outputs.reference[:count] = lse
            if outputs.weight is not None:
                outputs.weight.zero_()
                outputs.weight[:count] = settled(side.weight, outputs.reference[:count], lse)
        if outputs.loss is not None:
            loss = softmax_loss(rows, options, others)
        if side.weight is not None:
            slope = softmax_slope(side, options, others, score)
    elif options.energy == SIGMOID:
        loss = sums.sum.to(score.dtype) + torch.where(counted, -F.logsigmoid(score), 0)
        if side.weight is not None:
            slope = -side.weight * torch.where(counted, torch.sigmoid(-score), 0)
    else:
        loss = sums.sum.to(score.dtype)
        if side.weight is not None:
            slope = -(side.weight * sums.active).to(score.dtype)
    if outputs.loss is not None:
        has_loss = counted | (options.energy == SIGMOID)
        outputs.loss.add_(torch.where(has_loss, loss, 0), alpha=options.half)
    if slope is not None:
        outputs.score_gradient.add_(slope)
        outputs.dot.add_(torch.where(slope != 0, slope * rows.u, 0))
        outputs.total.add_(slope)


def settled(weight: Tensor, reference: Tensor, lse: Tensor) -> Tensor:
    """weight * exp(reference - lse), where `reference` is the rounded `lse` (float64). Times exp(s - reference) it
    keeps what the rounding takes from a probability, 3e-5 at a score of 1000 in float32."""
    rounding = torch.where(reference == lse, 0, reference.double() - lse)
    return weight * rounding.exp().to(weight.dtype)


def log_sum(sums: ColumnSums) -> Tensor:
    """max + log(sum) in float64, -inf for an empty sum."""
    return torch.where(sums.sum == 0, float("-inf"), sums.max + sums.sum.log())


def softmax_loss(rows: LossRows, options: LossOptions, others: Tensor) -> Tensor:
    """The loss of positives, where `others` (float64) is the log-sum-exp of all other candidates."""
    e, sums, score = options.label_smoothing, rows.sums, rows.score
    loss = -F.logsigmoid(score - others)
    if options.ids_positive:
        loss = torch.logaddexp(others, score.double()) - (sums.positive_sum + score) / rows.positives
    if e > 0:
        mean = (sums.score_sum + score) / rows.candidates
        loss = (1 - e) * loss + e * (torch.logaddexp(others, score.double()) - mean)
    return loss.to(score.dtype)


def softmax_slope(side: SideGrad, options: LossOptions, others: Tensor, score: Tensor) -> Tensor:
    """weight * (probability - 1) + weight - share - smoothing, without cancellation for a confident pair; others:
    float64."""
    weight, _, share, smoothing = side
    if share is None:
        share = (1 - options.label_smoothing) * weight
    probability = torch.sigmoid(others - score).to(score.dtype)
    slope = (weight - share) - torch.where(weight != 0, weight * probability, 0)
    return slope if smoothing is None else slope - smoothing


def finish_gradient(gradient: FeatureGradient, scale: Tensor, out: Tensor) -> None:
    """out = the gradient of the features: adds the positive's part to `total`, applies logit_scale, adds `extra`, and
    projects out the direction of normalised features. Overwrites total, which may be `out`."""
    total, values, norm, partner, partner_norm, index, score_gradient, extra = gradient
    if partner is not None and partner.shape[0] == 0:
        partner = None
    if partner is not None:
        index, has = _partners(index, total, partner)
        factor = F.pad(score_gradient, (0, total.shape[0] - score_gradient.shape[0]))
        if norm is not None:
            pair_norm = torch.where(has, norm * partner_norm[index], 1)
            factor = torch.where(factor != 0, factor * pair_norm, 0)
    for rows in row_blocks(total):
        part = total[rows].to(scale.dtype)
        if partner is not None:
            of_row = factor[rows].unsqueeze(1)
            part += torch.where(of_row != 0, of_row * partner[index[rows]].to(part.dtype), 0)
        part *= scale
        if extra is not None:
            part += extra[rows]
        if norm is not None:
            x, r = values[rows].to(part.dtype), norm[rows]
            along = (part * x).sum(1) * r * r
            along = torch.where(r * NORM_EPS < 1, along, 0)  # a norm that was clamped is a constant
            part.addcmul_(along.unsqueeze(1), x, value=-1)
        out[rows] = part
