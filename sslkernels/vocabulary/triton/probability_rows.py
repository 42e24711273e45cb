"""Cross-entropy of rows of logits against class probabilities: one program per row, and the launchers.

A row and its probabilities are read once for all sums, which each lane keeps relative to its own largest logit, and
once more for the gradient, also in place. The sum of exponentials leaves the largest out and adds it last, so
that a confident row keeps its loss. Rows of logits and of the gradient have room for whole vectors at their end, where
what is read or written does not matter; the rows of the probabilities are the caller's, at any strides.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import VECTOR_BYTES, Config, next_power_of_2, on_device_of
from sslkernels.core.triton.numerics import log1p
from sslkernels.vocabulary.triton.softmax_row_kernels import cap_slope, capped, converted, uncapped_logits, vector_tile

NOT_SPECIALIZED = ["coefficient_stride"]


@triton.jit
def _logits(row, cols, access, inside, bias, logit_scale, HAS_BIAS: tl.constexpr):
    """l in the accumulation dtype."""
    raw = tl.load(row + cols, access, other=0.0).to(logit_scale.dtype)
    return uncapped_logits(raw, bias, cols, inside, logit_scale, HAS_BIAS)


@triton.jit
def _q(
    target, cols, stride, inside, weight, keep, spread, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    """q; 0 outside the row."""
    q = tl.load(target + cols.to(tl.int64) * stride, inside, other=0.0).to(keep.dtype)
    if SMOOTHING:
        q = tl.where(inside, q * keep + spread, 0.0)
    if HAS_WEIGHT:
        q *= tl.load(weight + cols, inside, other=0.0).to(keep.dtype)
    return q


@triton.jit
def _add(z, q, largest, others, total, to_largest):
    """Adds a column to the sums of each lane: exp(z - largest) without the largest, q, and q (z - largest), which is 0
    where q is 0 and -inf where only z is. A NaN is never the largest, and reaches the sums."""
    rises = z > largest
    e = tl.where(z == float("-inf"), 0.0, tl.exp(-tl.abs(z - largest)))
    higher = tl.where(rises, z, largest)
    moved = tl.where(rises & (total != 0.0), total * (largest - z), 0.0)
    below = z - tl.where(higher == float("-inf"), 0.0, higher)
    to_largest += moved + tl.where(q == 0.0, 0.0, q * below)
    # Before its first number a lane has no largest term to add: e is then 0.
    return higher, tl.where(rises, (others + 1.0) * e, others + e), total + q, to_largest


@triton.jit
def _write_row(
    row, target, target_column, bias, weight, out, row_max, exp_factor, coefficient, keep, spread, softcap, logit_scale,
    vocab, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient, backwards, because the cache still holds the end of the row."""
    tiles = tl.cdiv(vocab, BLOCK)
    for step in range(0, tiles):
        cols, access, inside = vector_tile((tiles - 1 - step) * BLOCK, vocab, BLOCK, VECTOR)
        uncapped = _logits(row, cols, access, inside, bias, logit_scale, HAS_BIAS)
        z = capped(uncapped, inside, softcap, HAS_SOFTCAP)
        q = _q(target, cols, target_column, inside, weight, keep, spread, HAS_WEIGHT, SMOOTHING)
        g = exp_factor * tl.exp(z - row_max) - coefficient * q
        if HAS_SOFTCAP:
            g *= cap_slope(uncapped, softcap)
        tl.store(out + cols, g.to(out.dtype.element_ty), access)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def probability_rows_fwd_kernel(
    logits, target, bias, weight, coefficient, loss, row_max_out, sum_exp_out, total_out, grad,
    vocab, classes, logits_stride, target_stride, target_column, grad_stride, coefficient_stride,
    label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    WRITE_GRAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = loss.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * logits_stride
    target += i * target_stride
    label_smoothing, z_loss, softcap, logit_scale = converted((label_smoothing, z_loss, softcap, logit_scale), ACC)
    keep, spread = 1.0 - label_smoothing, label_smoothing / classes

    largest = tl.full((BLOCK,), float("-inf"), ACC)
    others = tl.zeros((BLOCK,), ACC)
    total = tl.zeros((BLOCK,), ACC)
    to_largest = tl.zeros((BLOCK,), ACC)
    for start in range(0, vocab, BLOCK):
        cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
        z = capped(_logits(row, cols, access, inside, bias, logit_scale, HAS_BIAS), inside, softcap, HAS_SOFTCAP)
        q = _q(target, cols, target_column, inside, weight, keep, spread, HAS_WEIGHT, SMOOTHING)
        largest, others, total, to_largest = _add(z, q, largest, others, total, to_largest)

    row_max = tl.max(largest, 0)
    lane = tl.arange(0, BLOCK)
    winner = tl.min(tl.where(largest == row_max, lane, BLOCK), 0)
    distance = largest - row_max
    rest = tl.sum(tl.where(lane == winner, others, (others + 1.0) * tl.exp(distance)), 0)
    rest += row_max - row_max  # NaN without a finite maximum
    row_total = tl.sum(total, 0)
    to_max = tl.sum(to_largest + tl.where(total == 0.0, 0.0, total * distance), 0)
    log_sum = log1p(rest)
    lse = row_max + log_sum
    tl.store(loss + i, row_total * log_sum - to_max + tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0))
    tl.store(row_max_out + i, row_max)
    tl.store(sum_exp_out + i, 1.0 + rest)
    tl.store(total_out + i, row_total)
    if WRITE_GRAD:
        factor = tl.load(coefficient + i * coefficient_stride).to(ACC)
        slope = (row_total + 2.0 * z_loss * lse) / (1.0 + rest) * factor
        _write_row(
            row, target, target_column, bias, weight, grad + i * grad_stride, row_max, slope, factor, keep, spread,
            softcap, logit_scale, vocab, HAS_BIAS, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING, VECTOR, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def probability_rows_bwd_kernel(
    logits, target, bias, weight, coefficient, row_max_in, sum_exp_in, total_in, grad,
    vocab, classes, logits_stride, target_stride, target_column, grad_stride, coefficient_stride,
    label_smoothing: tl.float64, z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = row_max_in.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    label_smoothing, z_loss, softcap, logit_scale = converted((label_smoothing, z_loss, softcap, logit_scale), ACC)
    keep, spread = 1.0 - label_smoothing, label_smoothing / classes
    row_max, sum_exp = tl.load(row_max_in + i), tl.load(sum_exp_in + i)
    factor = tl.load(coefficient + i * coefficient_stride).to(ACC)
    slope = (tl.load(total_in + i) + 2.0 * z_loss * (row_max + tl.log(sum_exp))) / sum_exp * factor
    _write_row(
        logits + i * logits_stride, target + i * target_stride, target_column, bias, weight, grad + i * grad_stride,
        row_max, slope, factor, keep, spread, softcap, logit_scale, vocab,
        HAS_BIAS, HAS_WEIGHT, HAS_SOFTCAP, SMOOTHING, VECTOR, BLOCK,
    )  # fmt: skip


def config(vocab: int, dtype: torch.dtype) -> Config:
    """A thread has 8 columns of a tile, with four sums each."""
    block = min(max(64, next_power_of_2(vocab)), 1024 if dtype == torch.float64 else 2048)
    return Config({"BLOCK": block}, {"num_warps": min(max(block // 256, 1), 8)})


def probability_rows_fwd(operands: Any, coefficient: Tensor | None, outputs: Any, grad: Tensor | None) -> None:
    """Fills the losses and the state in the record `RowOutputs` from the record `ProbabilityOperands`. `grad` (N, V),
    if given, receives the gradient with respect to l times coefficient (N,), and may be the logits."""
    _launch(probability_rows_fwd_kernel, operands, coefficient, outputs[:4], grad, WRITE_GRAD=grad is not None)


def probability_rows_bwd(operands: Any, coefficient: Tensor, state: Any, grad: Tensor) -> None:
    """The gradient alone, from the record `RowState`."""
    _launch(probability_rows_bwd_kernel, operands, coefficient, state, grad)


def _launch(
    kernel: Any, operands: Any, coefficient: Tensor | None, rows: Any, grad: Tensor | None, **more: Any
) -> None:
    logits, target, bias, weight, classes, options = operands
    count, vocab = logits.shape
    if count == 0:
        return
    chosen = config(vocab, logits.dtype)
    with on_device_of(logits):
        kernel[(count,)](
            *(logits, target, bias, weight, coefficient),
            *rows,
            grad,
            *(vocab, classes, logits.stride(0), *target.stride()),
            0 if grad is None else grad.stride(0),
            0 if coefficient is None else coefficient.stride(0),
            *(float(value) for name, value in options._asdict().items() if name != "ignore_index"),
            HAS_BIAS=bias is not None,
            HAS_WEIGHT=weight is not None,
            HAS_SOFTCAP=options.softcap > 0,
            SMOOTHING=options.label_smoothing > 0,
            VECTOR=_vector(logits, grad),
            **more,
            **chosen.constexprs,
            **chosen.options,
        )


def _vector(logits: Tensor, grad: Tensor | None) -> int:
    """Elements of 16 bytes, if all rows have room for whole vectors; else 1."""
    vector = VECTOR_BYTES // logits.element_size()
    return 1 if logits.stride(0) % vector or (grad is not None and grad.stride(0) % vector) else vector
