"""GloVe's weighted squares in Triton: a program gathers the rows of BLOCK_N pairs, BLOCK_D columns at a time."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sslkernels.core.triton.launch import next_power_of_2

BLOCK_BYTES = 2048  # bytes of a table's rows in a program, in the accumulation dtype
BLOCK_D = 128


@triton.jit
def glove_fwd_kernel(
    center_ptr,
    context_ptr,
    center_weight_ptr,
    context_weight_ptr,
    center_bias_ptr,
    context_bias_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    slope_ptr,
    count,
    center_rows,
    context_rows,
    dim,
    WRITE_SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < count
    acc = loss_ptr.dtype.element_ty
    center = tl.load(center_ptr + i, mask=valid, other=0).to(tl.int64)
    context = tl.load(context_ptr + i, mask=valid, other=0).to(tl.int64)
    # A pair with an index out of range reads nothing of the tables; its results are NaN.
    exists = (center >= 0) & (center < center_rows) & (context >= 0) & (context < context_rows) & valid
    score = tl.zeros((BLOCK_N,), acc)
    for first in range(0, dim, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = exists[:, None] & (column < dim)[None, :]
        u = tl.load(center_weight_ptr + center[:, None] * dim + column[None, :], mask=mask, other=0).to(acc)
        v = tl.load(context_weight_ptr + context[:, None] * dim + column[None, :], mask=mask, other=0).to(acc)
        score += tl.sum(u * v, 1)
    bias = tl.load(center_bias_ptr + center, mask=exists, other=0).to(acc)
    bias += tl.load(context_bias_ptr + context, mask=exists, other=0).to(acc)
    error = score + bias - tl.load(target_ptr + i, mask=valid, other=0)
    error = tl.where(exists, error, float("nan"))
    weight = tl.load(weight_ptr + i, mask=valid, other=0)
    tl.store(loss_ptr + i, weight * error * error, mask=valid)
    if WRITE_SLOPE:
        tl.store(slope_ptr + i, 2 * weight * error, mask=valid)


def glove_fwd(parameters: Any, pairs: Any, outputs: Any) -> None:
    """Fills `outputs`, the record `Outputs`, from the records `Parameters` and `Pairs`; the slope has no elements where
    not wanted."""
    count, (center_rows, dim) = pairs.center.numel(), parameters.center_weight.shape
    if count == 0:
        return
    write_slope = outputs.slope.numel() > 0
    block_d = min(BLOCK_D, next_power_of_2(dim))
    block_n = min(BLOCK_BYTES // outputs.loss.element_size() // block_d, 64)
    glove_fwd_kernel[(triton.cdiv(count, block_n),)](
        pairs.center, pairs.context, *parameters, pairs.target, pairs.weight, outputs.loss,
        outputs.slope if write_slope else None, count, center_rows, parameters.context_weight.shape[0], dim,
        WRITE_SLOPE=write_slope, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
