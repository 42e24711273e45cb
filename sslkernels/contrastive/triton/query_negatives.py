"""Queries against their per-query negatives: one program per row, its negatives in tiles of BLOCK_K by BLOCK_D.

A row that fits one tile stays in registers: it is read once, and its gradient written once. For a longer row the
softmax reads each tile twice, because its weights need the sum over all of them; where a negative is wider than a tile,
its gradient reads it again.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sslkernels.core.triton.launch import Config, capability, next_power_of_2, on_device_of
from sslkernels.core.triton.numerics import log1p

SOFTMAX, SIGMOID, HINGE = range(3)
NORM_FLOOR = tl.constexpr(1e-12)


def config(count: int, dim: int, dtype: torch.dtype, by_index: bool, capability: tuple[int, int]) -> Config:
    """The largest tile that fits the registers: 32 elements per thread, fewer in float64, and by index, where
    the addresses of the rows take registers, too."""
    most, per_warp, most_warps = {2: (16384, 512, 16), 4: (8192, 512, 8), 8: (2048, 128, 16)}[dtype.itemsize]
    if by_index and dtype.itemsize < 8:
        most //= 2
        per_warp = per_warp // 2 if dtype.itemsize == 2 else per_warp
    block_d = min(next_power_of_2(dim), most)
    block_k = min(next_power_of_2(count), most // block_d)
    warps = min(max(block_k * block_d // per_warp, 1), most_warps)
    shape = {"ONE_TILE": count <= block_k and dim <= block_d, "ONE_BLOCK": dim <= block_d}
    options = {"num_warps": warps}
    if dtype == torch.float64 and warps == 8 and capability < (10, 0):
        options["maxnreg"] = 128  # ptxas uses as many without a limit, and spills 8 bytes
    return Config({**shape, "BLOCK_K": block_k, "BLOCK_D": block_d}, options)


@triton.jit
def _rows(negatives, index, bank, k, valid, D, key_rows, rows):
    """(pointers to the negatives k, which are valid, which can be read). By index they are rows of `negatives` and then
    of `bank`; -1 is not valid, and an index out of range cannot be read."""
    if index is None:
        return negatives + k * D, valid, valid
    else:
        at = tl.load(index + k, mask=valid, other=-1).to(tl.int64)
        valid = valid & (at != -1)
        readable = (at >= 0) & (at < rows)
        at = tl.where(readable, at, 0)
        found = negatives + at * D
        if bank is not None:
            found = tl.where(at < key_rows, found, bank + (at - key_rows) * D)
        return found, valid, readable


@triton.jit
def _block(query, found, d, readable, D, ACC: tl.constexpr):
    """Columns d of the query and of the negatives at `found`; zeros for negatives that are not to be read."""
    x = tl.load(query + d, mask=d < D, other=0.0).to(ACC)
    return x, tl.load(found[:, None] + d[None, :], mask=readable[:, None] & (d < D)[None, :], other=0.0).to(ACC)


@triton.jit
def _dots(x, n, dot, square, NORMALISE: tl.constexpr):
    dot += tl.sum(n * x[None, :], 1)
    if NORMALISE:
        square += tl.sum(n * n, 1)
    return dot, square


@triton.jit
def _tile(
    query, negatives, index, bank, mask, k, K, D, key_rows, rows, inverse_norm, scale, bias,
    HAS_MASK: tl.constexpr, NORMALISE: tl.constexpr, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(found, valid, readable, scores, similarities, inverse norms, projections, x, n) of the negatives k. If not valid
    they have score -inf and similarity 0; projection * n is subtracted from the query x in the gradient of n.
    x and n are whole rows only where a row is one block."""
    valid = k < K
    if HAS_MASK:
        valid = valid & (tl.load(mask + k, mask=valid, other=0) != 0)
    d = tl.arange(0, BLOCK_D)
    dot = tl.zeros((BLOCK_K,), ACC)
    square = tl.zeros((BLOCK_K,), ACC)
    found, valid, readable = _rows(negatives, index, bank, k, valid, D, key_rows, rows)
    x, n = _block(query, found, d, readable, D, ACC)
    dot, square = _dots(x, n, dot, square, NORMALISE)
    if not ONE_BLOCK:
        for start in range(BLOCK_D, D, BLOCK_D):
            x_block, n_block = _block(query + start, found + start, d, readable, D - start, ACC)
            dot, square = _dots(x_block, n_block, dot, square, NORMALISE)
    inverse = tl.full((BLOCK_K,), 1.0, ACC)
    projection = tl.zeros((BLOCK_K,), ACC)
    similarity = dot
    if NORMALISE:
        norm = tl.sqrt(square)
        floor = tl.full((BLOCK_K,), NORM_FLOOR, ACC)
        inverse = 1.0 / tl.where(norm < floor, floor, norm)
        along = inverse * dot
        similarity = inverse_norm * along
        projection = tl.where(norm < floor, 0.0, inverse * along)
    score = tl.where(valid, scale * similarity + bias, float("-inf"))
    if index is not None:
        score = tl.where(valid & ~readable, float("nan"), score)
    return found, valid, readable, score, tl.where(valid, similarity, 0.0), inverse, projection, x, n


@triton.jit
def _anchor(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _merge(top, total, score):
    """The largest score and the sum of exp(score - top), merged with more scores. A NaN score makes the sum NaN."""
    new_top = tl.maximum(top, tl.max(tl.where(score == score, score, float("-inf")), 0))
    anchor = _anchor(new_top)
    kept = tl.where(top == float("-inf"), total, total * tl.exp(_anchor(top) - anchor))
    return new_top, kept + tl.sum(tl.exp(score - anchor), 0)


@triton.jit
def _merged(others, top, total):
    """logaddexp(others, top + log(total)) in float64."""
    own = _anchor(top).to(tl.float64) + tl.log(total).to(tl.float64)
    larger = tl.where(others > own, others, own)
    rest = log1p(tl.exp(-tl.abs(others - own).to(top.dtype))).to(tl.float64)
    return tl.where((others == own) & (others - others != 0.0), others, larger + rest)


@triton.jit
def _energy(score, valid, threshold, ENERGY: tl.constexpr):
    """The sum of the scores' terms in a sigmoid or hinge energy."""
    if ENERGY == 1:
        term = tl.where(score < 0.0, 0.0, score) + log1p(tl.exp(-tl.abs(score)))
    else:
        over = score - threshold
        term = tl.where(over < 0.0, 0.0, over)
    return tl.sum(tl.where(valid, term, 0.0), 0)


@triton.jit
def _weights(score, valid, value, threshold, coefficient, smoothing, ENERGY: tl.constexpr, ACC: tl.constexpr):
    """The derivative of the energy times the coefficient; 0 for negatives that are not valid. value: float64, whose
    rounding the coefficient makes up for."""
    if ENERGY == 0:
        rounded = value.to(ACC)
        rounding = (rounded.to(tl.float64) - value).to(ACC)
        coefficient = tl.where(rounded.to(tl.float64) == value, coefficient, coefficient * tl.exp(rounding))
        weight = coefficient * tl.exp(score - _anchor(rounded)) - smoothing
        weight = tl.where(rounded == float("-inf"), 0.0, weight)
    elif ENERGY == 1:
        e = tl.exp(-tl.abs(score))
        weight = coefficient * (tl.where(score < 0.0, e, 1.0) / (1.0 + e))
    else:
        weight = tl.where(score > threshold, coefficient, tl.where(score <= threshold, 0.0, score - threshold))
    return tl.where(valid, weight, 0.0)


@triton.jit
def _write(grad, x, n, k, d, valid, query_weight, projection, K, D):
    value = tl.where(valid[:, None], query_weight[:, None] * (x[None, :] - projection[:, None] * n), 0.0)
    at = k[:, None] * D + d[None, :]
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=(k < K)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["K", "key_rows", "rows"])
def query_negatives_kernel(
    query, negatives, index, bank, mask, query_inverse_norm, logit_scale, logit_bias, reference, coefficient, smoothing,
    scores, value_out, grad_query, grad_negatives, grad_scale, grad_bias, K, D, key_rows, rows,
    ENERGY: tl.constexpr, FINAL: tl.constexpr, HAS_MASK: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr,
    WANT_QUERY: tl.constexpr, WANT_NEGATIVES: tl.constexpr, WANT_SCORES: tl.constexpr,
    ONE_TILE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = logit_scale.dtype.element_ty
    INDEPENDENT: tl.constexpr = (ENERGY != 0) or FINAL  # each weight depends only on its own score
    TWICE: tl.constexpr = not (INDEPENDENT or ONE_TILE)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_K).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    query += row * D
    if index is None:
        negatives += row * K * D
    else:
        index += row * K
    scores += row * K
    if HAS_MASK:
        mask += row * K
    scale = tl.load(logit_scale)
    bias = tl.full((), 0.0, ACC)
    if HAS_BIAS:
        bias = tl.load(logit_bias)
    inverse_norm = tl.full((), 1.0, ACC)
    if NORMALISE:
        inverse_norm = tl.load(query_inverse_norm + row)
    others = tl.full((), float("-inf") if ENERGY == 0 else 0.0, tl.float64)
    if HAS_REFERENCE:
        others = tl.load(reference + row)
    threshold = others.to(ACC)
    factor = tl.full((), 0.0, ACC)
    if GRADIENT:
        factor = tl.load(coefficient + row)
    smooth = tl.full((), 0.0, ACC)
    if HAS_SMOOTHING:
        smooth = tl.load(smoothing + row)

    top = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0.0, ACC)
    value = others if ENERGY == 0 else total
    if TWICE:
        for start in range(0, K, BLOCK_K):
            k = start + lane
            found, valid, readable, score, similarity, inverse, projection, x, n = _tile(
                query, negatives, index, bank, mask, k, K, D, key_rows, rows, inverse_norm, scale, bias,
                HAS_MASK, NORMALISE, ONE_BLOCK, ACC, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            top, total = _merge(top, total, score)
            if WANT_SCORES:
                tl.store(scores + k, score, mask=k < K)
        value = _merged(others, top, total)

    scale_grad = tl.full((), 0.0, ACC)
    bias_grad = tl.full((), 0.0, ACC)
    query_grad = tl.zeros((BLOCK_D,), ACC)
    if GRADIENT or not TWICE:
        for start in range(0, K, BLOCK_K):
            k = start + lane
            found, valid, readable, score, similarity, inverse, projection, x, n = _tile(
                query, negatives, index, bank, mask, k, K, D, key_rows, rows, inverse_norm, scale, bias,
                HAS_MASK, NORMALISE, ONE_BLOCK, ACC, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            if WANT_SCORES and not TWICE:
                tl.store(scores + k, score, mask=k < K)
            if ENERGY != 0:
                value += _energy(score, valid, threshold, ENERGY)
            elif ONE_TILE and not FINAL:
                top, total = _merge(top, total, score)
                value = _merged(others, top, total)
            if GRADIENT:
                weight = _weights(score, valid, value, threshold, factor, smooth, ENERGY, ACC)
                scale_grad += tl.sum(weight * similarity, 0)
                bias_grad += tl.sum(weight, 0)
                negative_weight = weight * inverse
                query_weight = scale * inverse_norm * negative_weight
                if WANT_NEGATIVES and index is not None:
                    tl.store(grad_negatives + row * K + k, query_weight, mask=k < K)
                if ONE_BLOCK:
                    if WANT_QUERY:
                        query_grad += tl.sum(query_weight[:, None] * n, 0)
                    if WANT_NEGATIVES and index is None:
                        _write(grad_negatives + row * K * D, x, n, k, d, valid, query_weight, projection, K, D)
                elif WANT_QUERY or WANT_NEGATIVES:
                    for start_d in range(0, D, BLOCK_D):
                        columns = start_d + d
                        x_block, n_block = _block(query + start_d, found + start_d, d, readable, D - start_d, ACC)
                        if WANT_QUERY:
                            at = grad_query + row * D + columns
                            sums = tl.sum(query_weight[:, None] * n_block, 0)
                            before = tl.load(at, mask=(columns < D) & (start > 0), other=0.0)
                            tl.store(at, before + sums, mask=columns < D)
                        if WANT_NEGATIVES and index is None:
                            _write(
                                grad_negatives + row * K * D, x_block, n_block, k, columns, valid,
                                query_weight, projection, K, D,
                            )  # fmt: skip
                    tl.debug_barrier()  # another thread may read what this one wrote to grad_query

    tl.store(value_out + row, value.to(tl.float64))
    if GRADIENT:
        tl.store(grad_scale + row, scale_grad)
        tl.store(grad_bias + row, bias_grad)
        if WANT_QUERY and ONE_BLOCK:
            tl.store(grad_query + row * D + d, query_grad, mask=d < D)


def query_negatives(inputs: Any, merge: Any, outputs: Any) -> None:
    """Fills `outputs`, the record `NegativeOutputs`, from the records `NegativeInputs` and `RowMerge`; an output that
    is not wanted has no elements."""
    query, mask, index, bank = inputs.query, inputs.mask, inputs.index, inputs.bank
    (rows, dim), count = query.shape, (inputs.negatives if index is None else index).shape[1]
    key_rows = inputs.negatives.shape[0]
    if rows == 0:
        return
    if count == 0:
        outputs.grad_query.zero_()
    chosen = config(count, dim, query.dtype, index is not None, capability(query))
    with on_device_of(query):
        query_negatives_kernel[(rows,)](
            *inputs._replace(mask=None if mask is None else mask.view(torch.uint8)),
            merge.reference,
            merge.coefficient,
            merge.smoothing,
            *outputs,
            count,
            dim,
            key_rows,
            key_rows if bank is None else key_rows + bank.shape[0],
            ENERGY=merge.energy,
            FINAL=merge.energy == SOFTMAX and merge.final,
            HAS_MASK=mask is not None,
            NORMALISE=inputs.query_inverse_norm is not None,
            HAS_BIAS=inputs.logit_bias is not None,
            HAS_REFERENCE=merge.reference is not None,
            HAS_SMOOTHING=merge.smoothing is not None,
            GRADIENT=merge.coefficient is not None,
            WANT_QUERY=outputs.grad_query.numel() > 0,
            WANT_NEGATIVES=outputs.grad_negatives.numel() > 0,
            WANT_SCORES=outputs.scores.numel() > 0,
            **chosen.constexprs,
            **chosen.options,
        )
