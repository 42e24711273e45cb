"""Distillation between rows of logits: kernels with one program per row, and their launchers.

A row is read once for its maximum, once for its sums and, in a student's row, once for its gradient; the exponentials
of a student are recomputed, which costs less than to write and read them. Sums leave the largest exponential out, so
that a confident row keeps its loss. Rows begin at a multiple of VECTOR elements and have room for whole vectors at
their end, where what is read or written does not matter.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, next_power_of_2, on_device_of
from sslkernels.core.triton.numerics import log1p
from sslkernels.vocabulary.triton.softmax_row_kernels import vector_tile

NOT_SPECIALIZED = ["vocab", "choices"]
VECTOR = 4


@triton.jit
def _load_z(row, offset, cols, access, inside, scale, HAS_OFFSET: tl.constexpr):
    """z; -inf outside the row."""
    z = tl.load(row + cols, access, other=0.0) * scale
    if HAS_OFFSET:
        z += tl.load(offset + cols, access, other=0.0)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _largest_lanes(z, cols, largest, column):
    """Updates the largest value of each lane and its column; NaN never wins."""
    better = z > largest
    return tl.where(better, z, largest), tl.where(better, cols, column)


@triton.jit
def _largest(values, columns):
    largest = tl.max(values, 0)
    return largest, tl.min(tl.where(values == largest, columns, 2147483647), 0)


@triton.jit
def _largest_of_row(
    row, offset, scale, vocab, HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    largest = tl.full((BLOCK,), float("-inf"), scale.dtype)
    column = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
        z = _load_z(row, offset, cols, access, inside, scale, HAS_OFFSET)
        largest, column = _largest_lanes(z, cols, largest, column)
    return _largest(largest, column)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def teacher_rows_kernel(
    logits, offset, scale_at, others_out, best_out, vocab, stride,
    HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    scale = tl.load(scale_at)
    largest, best = _largest_of_row(row, offset, scale, vocab, HAS_OFFSET, BLOCK, VECTOR)
    others = tl.zeros((BLOCK,), scale.dtype)
    for start in range(0, vocab, BLOCK):
        cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
        z = _load_z(row, offset, cols, access, inside, scale, HAS_OFFSET)
        e = tl.where(cols == best, 0.0, tl.exp(z - largest))
        others += tl.where(inside, e, 0.0)
        tl.store(row + cols, tl.where(cols == best, 1.0, e), access)
    tl.store(others_out + index, tl.sum(others, 0) + (largest - largest))  # NaN without a finite maximum
    tl.store(best_out + index, best)


@triton.jit
def _chosen(index, share, others, row, t, choices, HAS_INDEX: tl.constexpr):
    """The t-th teacher row of a row, whether it is given, its share, and the factor of its exponentials."""
    if HAS_INDEX:
        teacher = tl.load(index + row * choices + t)
        given = teacher >= 0
        part = tl.load(share + row * choices + t, given, other=0.0)
        return teacher, given, part, part / (1.0 + tl.load(others + teacher, given, other=0.0))
    total = 1.0 + tl.load(others + row)
    return row, row >= 0, total / total, 1.0 / total  # the share is 1, or NaN for a teacher row with a NaN


@triton.jit
def _mixture(
    teacher, teacher_stride, index, share, others, row, cols, access, inside, choices,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if HAS_INDEX:
        q = tl.zeros((BLOCK,), others.dtype.element_ty)
        for t in range(0, choices):
            k, given, _, factor = _chosen(index, share, others, row, t, choices, HAS_INDEX)
            q += factor * tl.load(teacher + k * teacher_stride + cols, access & given, other=0.0)
    else:
        q = tl.load(teacher + row * teacher_stride + cols, access, other=0.0) / (1.0 + tl.load(others + row))
    return tl.where(inside, q, 0.0)


@triton.jit
def _target_at(
    teacher, teacher_stride, index, share, others, teacher_best, row, column, choices, HAS_INDEX: tl.constexpr
):  # fmt: skip
    """q and 1 - q of a column, each without cancellation."""
    q = tl.full((), 0.0, others.dtype.element_ty)
    rest = tl.full((), 0.0, others.dtype.element_ty)
    for t in range(0, choices):
        k, given, part, factor = _chosen(index, share, others, row, t, choices, HAS_INDEX)
        term = factor * tl.load(teacher + k * teacher_stride + column, given, other=0.0)
        same = tl.load(teacher_best + k, given, other=-1) == column
        q += term
        rest += tl.where(same, factor * tl.load(others + k, given, other=0.0), part - term)
    return q, rest


@triton.jit
def _sure_column(
    teacher, teacher_stride, index, share, others, teacher_best, row, choices, HAS_INDEX: tl.constexpr
):  # fmt: skip
    """The column that has more than half of q, -1 if none has. It is the largest column of one of the teachers."""
    sure = tl.full((), -1, tl.int64)
    for t in range(0, choices):
        k, given, _, _ = _chosen(index, share, others, row, t, choices, HAS_INDEX)
        column = tl.load(teacher_best + k, given, other=0)
        q, _ = _target_at(teacher, teacher_stride, index, share, others, teacher_best, row, column, choices, HAS_INDEX)
        sure = tl.where(given & (q > 0.5), column, sure)
    return sure


@triton.jit
def _difference(p, q, rest_of_p, rest_of_q):
    """p - q of a column, where 1 - p and 1 - q are known without cancellation too."""
    return tl.where((p > 0.5) & (q > 0.5), rest_of_q - rest_of_p, p - q)


@triton.jit
def _terms(p, q, rest_of_p, rest_of_q, log_p):
    """-q log q and q log(q / p) + p - q of a column."""
    log_q = tl.where(q > 0.5, log1p(-rest_of_q), tl.log(tl.where(q == 0.0, 1.0, q)))
    term = q * (log_q - log_p) + _difference(p, q, rest_of_p, rest_of_q)
    return -q * log_q, tl.where(q == 0.0, p, term)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def distillation_rows_kernel(
    logits, offset, scale_at, teacher, others_in, best_in, index, share, coefficient,
    loss, gap_out, teacher_entropy, student_entropy, agreement, grad,
    vocab, choices, stride, teacher_stride, grad_stride,
    HAS_OFFSET: tl.constexpr, HAS_INDEX: tl.constexpr, WRITE_GRAD: tl.constexpr, DIVERGENCE: tl.constexpr,
    STATS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    scale = tl.load(scale_at)
    if WRITE_GRAD:
        out = grad + i * grad_stride
    if HAS_INDEX:
        given = 0
        for t in range(0, choices):
            given += (tl.load(index + i * choices + t) >= 0).to(tl.int32)
        if given == 0:  # left out
            tl.store(loss + i, 0.0)
            tl.store(gap_out + i, 0.0)
            if STATS:
                tl.store(teacher_entropy + i, 0.0)
                tl.store(student_entropy + i, 0.0)
                tl.store(agreement + i, tl.full((), 0, tl.int1))
            if WRITE_GRAD:
                for start in range(0, vocab, BLOCK):
                    cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
                    tl.store(out + cols, tl.zeros((BLOCK,), grad.dtype.element_ty), access)
            return

    largest, best = _largest_of_row(row, offset, scale, vocab, HAS_OFFSET, BLOCK, VECTOR)
    others_lanes = tl.zeros((BLOCK,), scale.dtype)
    student_lanes = tl.zeros((BLOCK,), scale.dtype)
    target_lanes = tl.zeros((BLOCK,), scale.dtype)
    for start in range(0, vocab, BLOCK):
        cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
        z = _load_z(row, offset, cols, access, inside, scale, HAS_OFFSET)
        q = _mixture(
            teacher, teacher_stride, index, share, others_in, i, cols, access, inside, choices, HAS_INDEX, BLOCK
        )
        gap = largest - z
        e = tl.where((cols == best) | ~inside, 0.0, tl.exp(-gap))
        others_lanes += e
        student_lanes += tl.where(e == 0.0, 0.0, e * gap)  # 0 where a logit is -inf
        target_lanes += tl.where(q == 0.0, 0.0, q * gap)
    others = tl.sum(others_lanes, 0) + (largest - largest)  # NaN without a finite maximum
    total = 1.0 + others
    log_sum = log1p(others)
    student_gap = tl.sum(student_lanes, 0) / total
    target_gap = tl.sum(target_lanes, 0)
    row_loss = target_gap + log_sum
    tl.store(gap_out + i, student_gap - target_gap)

    if DIVERGENCE or STATS:
        # The student's largest column and the column with more than half of q are added last, from 1 - p and 1 - q,
        # which keep their digits where p and q are near 1.
        sure = _sure_column(teacher, teacher_stride, index, share, others_in, best_in, i, choices, HAS_INDEX)
        entropy_lanes = tl.zeros((BLOCK,), scale.dtype)
        divergence_lanes = tl.zeros((BLOCK,), scale.dtype)
        highest = tl.full((BLOCK,), float("-inf"), scale.dtype)
        highest_col = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab, BLOCK):
            cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
            z = _load_z(row, offset, cols, access, inside, scale, HAS_OFFSET)
            q = _mixture(
                teacher, teacher_stride, index, share, others_in, i, cols, access, inside, choices, HAS_INDEX, BLOCK
            )
            gap = largest - z
            p = tl.where(inside, tl.exp(-gap) / total, 0.0)
            apart = (cols == best) | (cols == sure)
            present = (q != 0.0) & ~apart
            log_q = tl.log(tl.where(present, q, 1.0))
            entropy_lanes -= tl.where(present, q * log_q, 0.0)
            divergence_lanes += tl.where(present, q * (log_q + (gap + log_sum)) + (p - q), tl.where(apart, 0.0, p))
            highest, highest_col = _largest_lanes(tl.where(inside, q, float("-inf")), cols, highest, highest_col)
        q_best, rest_best = _target_at(
            teacher, teacher_stride, index, share, others_in, best_in, i, best, choices, HAS_INDEX
        )
        entropy, row_divergence = _terms(1.0 / total, q_best, others / total, rest_best, -log_sum)
        if (sure >= 0) & (sure != best):
            z_sure = tl.load(row + sure) * scale
            if HAS_OFFSET:
                z_sure += tl.load(offset + sure)
            gap_sure = largest - z_sure
            p_sure = tl.exp(-gap_sure) / total
            q_sure, rest_sure = _target_at(
                teacher, teacher_stride, index, share, others_in, best_in, i, sure, choices, HAS_INDEX
            )
            entropy_sure, divergence_sure = _terms(p_sure, q_sure, 1.0 - p_sure, rest_sure, -(gap_sure + log_sum))
            entropy += entropy_sure
            row_divergence += divergence_sure
        entropy += tl.sum(entropy_lanes, 0)
        row_divergence += tl.sum(divergence_lanes, 0)
        if DIVERGENCE:
            row_loss = row_divergence + 0.0 * (target_gap + others)  # NaN where the row has one
        if STATS:
            _, target_best = _largest(highest, highest_col)
            tl.store(teacher_entropy + i, entropy)
            tl.store(student_entropy + i, student_gap + log_sum)
            tl.store(agreement + i, target_best == best)
    tl.store(loss + i, row_loss)

    if WRITE_GRAD:
        factor = tl.load(coefficient + i)
        at_best, rest = _target_at(
            teacher, teacher_stride, index, share, others_in, best_in, i, best, choices, HAS_INDEX
        )
        difference = _difference(1.0 / total, at_best, others / total, rest)
        for start in range(0, vocab, BLOCK):
            cols, access, inside = vector_tile(start, vocab, BLOCK, VECTOR)
            z = _load_z(row, offset, cols, access, inside, scale, HAS_OFFSET)
            q = _mixture(
                teacher, teacher_stride, index, share, others_in, i, cols, access, inside, choices, HAS_INDEX, BLOCK
            )
            g = tl.where(cols == best, difference, tl.exp(z - largest) / total - q)
            tl.store(out + cols, (factor * g).to(grad.dtype.element_ty), access)


def config(vocab: int, dtype: torch.dtype) -> Config:
    block = min(max(64, next_power_of_2(vocab)), 1024 if dtype == torch.float64 else 4096)
    return Config({"BLOCK": block, "VECTOR": VECTOR}, {"num_warps": min(max(block // 256, 1), 16)})


def teacher_rows(head: Any, state: Any) -> None:
    """Overwrites the products of the record `TeacherState` with exp(z - max z), and fills the rest of it. Rows and the
    offset of the record `Head` have room for whole vectors."""
    count, vocab = state.exponentials.shape
    if count == 0:
        return
    chosen = config(vocab, state.exponentials.dtype)
    with on_device_of(state.exponentials):
        teacher_rows_kernel[(count,)](
            *(state.exponentials, head.offset, head.scale, state.others, state.best),
            *(vocab, state.exponentials.stride(0)),
            HAS_OFFSET=head.offset is not None,
            **chosen.constexprs,
            **chosen.options,
        )


def distillation_rows(
    products: Tensor,
    head: Any,
    teacher: Any,
    choice: Any,
    coefficient: Tensor | None,
    outputs: Any,
    divergence: bool,
    grad: Tensor | None,
) -> None:
    """Fills the rows of the record `RowOutputs` from products (N, V) of the student and the record `TeacherState`. With
    coefficient (N,) also `grad` (N, V), in any dtype, which may be the products."""
    count, vocab = products.shape
    if count == 0:
        return
    chosen = config(vocab, products.dtype)
    with on_device_of(products):
        distillation_rows_kernel[(count,)](
            *(products, *head, *teacher, *choice, coefficient, *outputs.rows, grad, vocab),
            1 if choice.index is None else choice.index.shape[1],
            *(products.stride(0), teacher.exponentials.stride(0), 0 if grad is None else grad.stride(0)),
            HAS_OFFSET=head.offset is not None,
            HAS_INDEX=choice.index is not None,
            WRITE_GRAD=coefficient is not None,
            DIVERGENCE=divergence,
            STATS=outputs.usage.numel() > 0,
            **chosen.constexprs,
            **chosen.options,
        )
