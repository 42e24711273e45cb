"""The rows of a contrastive loss, before and after the tiles of scores: one kernel for each function of
`contrastive/pair_rows.py`, which has the formulas. Rows are (R, D) blocks; a vector may be absent (None)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, next_power_of_2, on_device_of
from sslkernels.core.triton.numerics import log1p

NORM_EPS = tl.constexpr(1e-12)
NO_POSITIVE = tl.constexpr(-1)
SOFTMAX, SIGMOID = tl.constexpr(0), tl.constexpr(1)
ELEMENTS = 4096  # elements of rows in the registers of a program
LOSS_ROWS = 128


def config(dim: int, tables: int = 1) -> Config:
    """tables: how many rows of features a program holds for each of its rows."""
    block_d = min(next_power_of_2(dim), 1024)
    block_r = max(1, ELEMENTS // block_d // 2 // tables)
    return Config({"BLOCK_R": block_r, "BLOCK_D": block_d}, {"num_warps": 4})


@triton.jit
def _load_rows(pointer, row, has_row, column, dim, ACC: tl.constexpr):
    at = row.to(tl.int64)[:, None] * dim + column[None, :]
    return tl.load(pointer + at, has_row[:, None] & (column < dim)[None, :], other=0.0).to(ACC)


@triton.jit
def _softplus(x):
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _log_add_exp(a, b):
    LOG_2: tl.constexpr = 0.6931471805599453
    return tl.where(a == b, a + LOG_2, tl.where(a > b, a, b) + log1p(tl.exp(-tl.abs(a - b))))


@triton.jit
def inverse_norm_kernel(values, norm, rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    ACC: tl.constexpr = norm.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    square = tl.zeros((BLOCK_R,), ACC)
    for begin in range(0, dim, BLOCK_D):
        x = _load_rows(values, row, inside, begin + tl.arange(0, BLOCK_D), dim, ACC)
        square += tl.sum(x * x, 1)
    length = tl.sqrt(square)
    tl.store(norm + row, 1.0 / tl.where(length < NORM_EPS, NORM_EPS, length), inside)


@triton.jit
def positive_scores_kernel(
    query, key, query_norm, key_norm, positive, scale, bias, u_out, score_out, rows, keys, dim,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = u_out.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    partner = row.to(tl.int64)
    if positive is not None:
        partner = tl.load(positive + row, inside, other=NO_POSITIVE)
    has = inside & (partner >= 0) & (partner < keys)
    product = tl.zeros((BLOCK_R,), ACC)
    for begin in range(0, dim, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        x = _load_rows(query, row, has, column, dim, ACC)
        product += tl.sum(x * _load_rows(key, partner, has, column, dim, ACC), 1)
    if query_norm is not None:
        product *= tl.load(query_norm + row, has, other=0.0) * tl.load(key_norm + partner, has, other=0.0)
    u = tl.where(partner < NO_POSITIVE, float("nan"), tl.where(has, product, 0.0))
    score = tl.load(scale) * u
    if bias is not None:
        score += tl.load(bias)
    tl.store(u_out + row, u, inside)
    tl.store(score_out + row, score, inside)


@triton.jit
def pair_losses_kernel(
    max_in, sum_in, active, score_sum, positive_sum, score_in, u_in, positive, positives, candidates,
    weight_in, share_in, smoothing_in, others_out, reference_out, weight_out, loss_out, score_gradient, dot, total,
    rows, references, half: tl.float64, label_smoothing: tl.float64,
    ENERGY: tl.constexpr, SMOOTHING: tl.constexpr, IDS_POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = score_in.dtype.element_ty
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    e = tl.full((), label_smoothing, ACC)
    score = tl.load(score_in + row, inside, other=0.0)
    sums = tl.load(sum_in + row, inside, other=0.0)
    counted = inside
    if positive is not None:
        counted = inside & (tl.load(positive + row, inside, other=NO_POSITIVE) != NO_POSITIVE)
    loss = sums.to(ACC)
    slope = tl.zeros((BLOCK,), ACC)
    if weight_in is not None:
        weight = tl.load(weight_in + row, inside, other=0.0)
    if ENERGY == SOFTMAX:
        largest = tl.load(max_in + row, inside, other=0.0).to(tl.float64)
        others = tl.where(sums == 0.0, float("-inf"), largest + tl.log(sums))
        over = (others - score).to(ACC)
        lse = _log_add_exp(others, score.to(tl.float64))
        if others_out is not None:
            tl.store(others_out + row, others, inside)
        if reference_out is not None:  # without a positive every exponential is 0
            reference = lse.to(ACC)
            tl.store(reference_out + row, tl.where(counted, reference, float("inf")), row < references)
            if weight_out is not None:
                rounding = (reference.to(tl.float64) - lse).to(ACC)
                exact = (reference.to(tl.float64) == lse) | (counted == 0)
                settled = tl.where(exact, weight, weight * tl.exp(rounding))
                tl.store(weight_out + row, tl.where(inside, settled, 0.0), row < references)
        loss = _softplus(over)
        if IDS_POSITIVE and loss_out is not None:
            count = tl.load(positives + row, inside, other=1).to(tl.float64)
            part = tl.load(positive_sum + row, inside, other=0.0)
            loss = (lse - (part + score) / count).to(ACC)
        if SMOOTHING and loss_out is not None:
            count = tl.load(candidates + row, inside, other=1).to(tl.float64)
            mean = (tl.load(score_sum + row, inside, other=0.0) + score) / count
            loss = (1.0 - e) * loss + e * (lse - mean).to(ACC)
        if weight_in is not None:
            share = (1.0 - e) * weight
            if share_in is not None:
                share = tl.load(share_in + row, inside, other=0.0)
            # The difference of the probability and its target, without cancellation for a confident pair.
            slope = (weight - share) - tl.where(weight != 0.0, weight * _sigmoid(over), 0.0)
            if smoothing_in is not None:
                slope -= tl.load(smoothing_in + row, inside, other=0.0)
    elif ENERGY == SIGMOID:
        loss += tl.where(counted, _softplus(-score), 0.0)
        if weight_in is not None:
            slope = -weight * tl.where(counted, _sigmoid(-score), 0.0)
        counted = inside
    else:
        if weight_in is not None:
            slope = -weight * tl.load(active + row, inside, other=0.0).to(ACC)
    if loss_out is not None:
        before = tl.load(loss_out + row, counted, other=0.0)
        tl.store(loss_out + row, before + tl.full((), half, ACC) * loss, counted)
    if weight_in is not None:
        u = tl.load(u_in + row, inside, other=0.0)
        product = tl.where(slope != 0.0, slope * u, 0.0).to(tl.float64)
        tl.store(score_gradient + row, tl.load(score_gradient + row, inside, other=0.0) + slope, inside)
        tl.store(dot + row, tl.load(dot + row, inside, other=0.0) + product, inside)
        tl.store(total + row, tl.load(total + row, inside, other=0.0) + slope.to(tl.float64), inside)


@triton.jit
def finish_gradient_kernel(
    total, values, norm, partner, partner_norm, index, score_gradient, extra, scale_in, out,
    rows, partners, score_rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = total.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    scale = tl.load(scale_in)
    along = tl.zeros((BLOCK_R,), ACC)
    if norm is not None:
        r = tl.load(norm + row, inside, other=0.0)
    if partner is not None:
        factor = tl.load(score_gradient + row, inside & (row < score_rows), other=0.0)
        partner_row = row.to(tl.int64)
        if index is not None:
            partner_row = tl.load(index + row, inside, other=-1)
        has = inside & (partner_row >= 0) & (partner_row < partners) & (factor != 0.0)
        invalid = inside & (factor != factor)  # NaN without a partner
        if norm is not None:
            factor *= tl.where(has, r * tl.load(partner_norm + partner_row, has, other=0.0), 1.0)
    for begin in range(0, dim, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        at = row.to(tl.int64)[:, None] * dim + column[None, :]
        valid = inside[:, None] & (column < dim)[None, :]
        part = tl.load(total + at, valid, other=0.0)
        if partner is not None:
            added = factor[:, None] * _load_rows(partner, partner_row, has, column, dim, ACC)
            part += tl.where(has[:, None], added, tl.where(invalid, factor, 0.0)[:, None])
        part *= scale
        if extra is not None:
            part += tl.load(extra + at, valid, other=0.0)
        if norm is None:
            tl.store(out + at, part.to(out.dtype.element_ty), valid)
        else:
            along += tl.sum(part * _load_rows(values, row, inside, column, dim, ACC), 1)
            tl.store(total + at, part, valid)
    if norm is not None:
        along = tl.where(r * NORM_EPS < 1.0, along * r * r, 0.0)  # a norm that was clamped is a constant
        for begin in range(0, dim, BLOCK_D):
            column = begin + tl.arange(0, BLOCK_D)
            at = row.to(tl.int64)[:, None] * dim + column[None, :]
            valid = inside[:, None] & (column < dim)[None, :]
            part = tl.load(total + at, valid, other=0.0)
            part -= along[:, None] * _load_rows(values, row, inside, column, dim, ACC)
            tl.store(out + at, part.to(out.dtype.element_ty), valid)


def inverse_norm(values: Tensor, norm: Tensor) -> None:
    rows, dim = values.shape
    if rows == 0:
        return
    chosen = config(dim)
    with on_device_of(values):
        inverse_norm_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_R"]),)](
            values, norm, rows, dim, **chosen.constexprs, **chosen.options
        )


def positive_scores(pairs: Any, scale: Tensor, bias: Tensor | None, u: Tensor, score: Tensor) -> None:
    rows, dim = pairs.query.shape
    if rows == 0:
        return
    chosen = config(dim, tables=2)
    with on_device_of(u):
        positive_scores_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_R"]),)](
            *pairs, scale, bias, u, score, rows, pairs.key.shape[0], dim, **chosen.constexprs, **chosen.options
        )


def add_losses(rows: Any, options: Any, outputs: Any) -> None:
    sums, score, u, positive, positives, candidates, (weight, _, share, smoothing) = rows
    count = score.shape[0]
    references = count if outputs.reference is None else outputs.reference.shape[0]
    if references == 0:
        return
    with on_device_of(score):
        pair_losses_kernel[(triton.cdiv(references, LOSS_ROWS),)](
            *sums, score, u, positive, positives, candidates, weight, share, smoothing, *outputs,
            count, references, options.half, options.label_smoothing,
            ENERGY=options.energy,
            SMOOTHING=options.label_smoothing > 0,
            IDS_POSITIVE=options.ids_positive,
            BLOCK=LOSS_ROWS,
            num_warps=4,
        )  # fmt: skip


def finish_gradient(gradient: Any, scale: Tensor, out: Tensor) -> None:
    rows, dim = gradient.values.shape
    if rows == 0:
        return
    partners = 0 if gradient.partner is None else gradient.partner.shape[0]
    score_rows = 0 if gradient.score_gradient is None else gradient.score_gradient.shape[0]
    chosen = config(dim)
    with on_device_of(out):
        finish_gradient_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_R"]),)](
            *gradient, scale, out, rows, partners, score_rows, dim, **chosen.constexprs, **chosen.options
        )
