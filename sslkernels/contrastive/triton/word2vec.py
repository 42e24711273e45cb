"""Skip-gram with negative sampling in Triton: one program per pair, which reads each of its rows once and keeps those
of BLOCK_K candidates (the context and the negatives) in registers for their scores and for the direction."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sslkernels.core.triton.launch import next_power_of_2
from sslkernels.core.triton.numerics import log1p

ELEMENTS = 4096  # elements in the registers of a program, more only where a single row is longer


def config(dim: int, candidates: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, options)."""
    block_d = next_power_of_2(dim)
    long = block_d >= 1024 and itemsize < 8  # the addresses of a row take registers, too
    block_k = max(1, min(next_power_of_2(candidates), (ELEMENTS // 2 if long else ELEMENTS) // block_d))
    warps = max(1, min(16, block_d * block_k // (512 if long else 1024)))
    return {"BLOCK_K": block_k, "BLOCK_D": block_d}, {"num_warps": warps}


@triton.jit
def _candidates(context, negatives_ptr, first, negatives, BLOCK_K: tl.constexpr):
    """(number, inside, used, index) of the candidates from `first` on; number 0 is the context, and a negative of -1 is
    not used."""
    k = first + tl.arange(0, BLOCK_K)
    inside = k <= negatives
    index = tl.load(negatives_ptr + (k - 1), mask=inside & (k > 0), other=0).to(tl.int64)
    used = inside & ((k == 0) | (index != -1))
    return k, inside, used, tl.where(k == 0, context, index)


@triton.jit
def negative_sampling_fwd_kernel(
    center_ptr,
    context_ptr,
    negatives_ptr,
    center_weight_ptr,
    context_weight_ptr,
    loss_ptr,
    slopes_ptr,
    direction_ptr,
    negatives,
    center_rows,
    context_rows,
    dim,
    EXCLUDE_POSITIVE: tl.constexpr,
    WRITE_SLOPES: tl.constexpr,
    WRITE_DIRECTION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    acc = loss_ptr.dtype.element_ty
    center = tl.load(center_ptr + i).to(tl.int64)
    context = tl.load(context_ptr + i).to(tl.int64)
    negatives_ptr += i * negatives

    # A pair with an index out of range reads valid rows instead, and NaN is added to all its results.
    center_wrong = (center < 0) | (center >= center_rows)
    wrong = center_wrong.to(tl.int32)
    for first in range(0, negatives + 1, BLOCK_K):
        _, _, used, index = _candidates(context, negatives_ptr, first, negatives, BLOCK_K)
        wrong += tl.sum((used & ((index < 0) | (index >= context_rows))).to(tl.int32), 0)
    poison = tl.where(wrong > 0, float("nan"), 0.0).to(acc)

    column = tl.arange(0, BLOCK_D)
    in_row = column < dim
    u = tl.load(center_weight_ptr + tl.where(center_wrong, 0, center) * dim + column, mask=in_row, other=0).to(acc)
    loss = poison
    direction = tl.zeros((BLOCK_D,), acc) + poison
    for first in range(0, negatives + 1, BLOCK_K):
        k, inside, used, index = _candidates(context, negatives_ptr, first, negatives, BLOCK_K)
        if EXCLUDE_POSITIVE:
            used &= (k == 0) | (index != context)
        row = tl.where((index >= 0) & (index < context_rows), index, 0)
        offset = row[:, None] * dim + column[None, :]
        v = tl.load(context_weight_ptr + offset, mask=used[:, None] & in_row[None, :], other=0).to(acc)
        score = tl.sum(v * u[None, :], 1)
        x = tl.where(k == 0, -score, score)
        e = tl.exp(-tl.abs(x))
        sigmoid = tl.where(x > 0, 1.0, e) / (1.0 + e)
        slope = tl.where(used, tl.where(k == 0, -sigmoid, sigmoid), 0.0)
        loss += tl.sum(tl.where(used, tl.where(x > 0, x, 0.0) + log1p(e), 0.0), 0)
        if WRITE_SLOPES:
            tl.store(slopes_ptr + i * (negatives + 1) + k, slope + poison, mask=inside)
        if WRITE_DIRECTION:
            direction += tl.sum(slope[:, None] * v, 0)
    tl.store(loss_ptr + i, loss)
    if WRITE_DIRECTION:
        tl.store(direction_ptr + i * dim + column, direction, mask=in_row)


def negative_sampling_fwd(tables: Any, indices: Any, exclude_positive: bool, outputs: Any) -> None:
    """Fills `outputs`, the record `Outputs`, from the records `Tables` and `Indices`; slopes and direction have no
    elements where not wanted."""
    count, negative_count = indices.negatives.shape
    center_rows, dim = tables.center_weight.shape
    if count == 0:
        return
    write_slopes, write_direction = outputs.slopes.numel() > 0, outputs.direction.numel() > 0
    constexprs, options = config(dim, 1 + negative_count, tables.context_weight.element_size())
    negative_sampling_fwd_kernel[(count,)](
        *indices, *tables, outputs.loss, outputs.slopes if write_slopes else None,
        outputs.direction if write_direction else None, negative_count, center_rows, tables.context_weight.shape[0],
        dim, EXCLUDE_POSITIVE=exclude_positive, WRITE_SLOPES=write_slopes, WRITE_DIRECTION=write_direction,
        **constexprs, **options,
    )  # fmt: skip
