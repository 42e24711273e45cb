"""Distillation of a teacher's softmax over a large head, whose logits are never materialised as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function, may_want_gradient, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype, compute_dtype_of, contiguous
from sslkernels.core.operator import full, operator
from sslkernels.core.overloads import returns_stats
from sslkernels.core.ranks import check_ranks, sum_over_ranks, summed_gradient
from sslkernels.core.scale import scaled
from sslkernels.core.slices import own_slice
from sslkernels.vocabulary.linear_records import empty_gradients
from sslkernels.vocabulary.prototypes import chunked_distillation, distillation_reference
from sslkernels.vocabulary.prototypes.distillation_records import (
    NAME,
    Gradients,
    Operands,
    Options,
    RowOutputs,
    Wanted,
    empty_outputs,
)
from sslkernels.vocabulary.prototypes.distillation_rows import DistillationRows, NativeRows, TritonRows
from sslkernels.vocabulary.prototypes.heads import Heads, check_heads, check_rows, temperature_tensor
from sslkernels.vocabulary.reduction import check_reduction, reduced


class DistillationStats(NamedTuple):
    """Statistics of the softmaxes that are compared, without gradients. Whether the prototypes collapsed: the teacher's
    entropy near 0 with a low perplexity (one prototype), or near log V (uniform).

    teacher_entropy, student_entropy `(...)`: of q and p, in nats; 0 in a row without a teacher. agreement `(...)`:
    bool, whether both are largest at the same prototype. usage `(V,)`: mass of each prototype, the mean of q over the
    rows with a teacher. perplexity `()`: exp of the entropy of the usage.
    """

    teacher_entropy: Tensor
    student_entropy: Tensor
    agreement: Tensor
    usage: Tensor
    perplexity: Tensor


def _checked(
    forward: Callable[..., Any], operands: Operands, coefficient: Tensor | None, options: Options, wanted: Wanted
) -> tuple[RowOutputs, Gradients]:
    """Raises `ValueError` for wrong temperatures and indices in tensors on a CPU; elsewhere they give NaN."""
    if operands.input.device.type == "cpu":
        for name, value in zip(("student_temperature", "teacher_temperature"), operands.temperature, strict=True):
            if not value > 0:
                checks.fail(ValueError, NAME, name, "be positive", value.item())
        index, teachers = operands.teacher_index, operands.teacher.shape[0]
        if index is not None and index.numel() > 0:
            low, high = (int(bound) for bound in index.aminmax())
            if low < -1 or high >= teachers:
                must = f"be in [0, {teachers}), or -1 for none"
                checks.fail(ValueError, NAME, "teacher_index", must, low if low < -1 else high)
    return forward(operands, coefficient, options, wanted)


def _reference(
    operands: Operands, coefficient: Tensor | None, options: Options, wanted: Wanted
) -> tuple[RowOutputs, Gradients]:
    """Plain torch; over slices of the prototypes the chunked plan, whose `SlicedRows` all backends share."""
    if options.group is not None:
        return chunked_distillation.forward(DistillationRows(), operands, coefficient, options, wanted)
    return distillation_reference.forward(operands, coefficient, options, wanted)


def _flops(operands: Operands, wanted: Wanted) -> int:
    """Logits of student and teacher, and the wanted gradients of input and weight, as if no row were left out and each
    teacher row computed once."""
    (rows, dim), (teachers, teacher_dim) = operands.input.shape, operands.teacher.shape
    vocab = operands.linear_weight.shape[0]
    return 2 * vocab * (rows * dim * (1 + wanted.input + wanted.linear_weight) + teachers * teacher_dim)


_NATIVE = partial(_checked, partial(chunked_distillation.forward, NativeRows()))


@operator(
    NAME,
    {
        "reference": partial(_checked, _reference),
        "cpu": _NATIVE,
        "triton": partial(_checked, partial(chunked_distillation.forward, TritonRows())),
        "cuda": _NATIVE,
    },
    native_ops=NativeRows.OPS,
    flops=lambda operands, coefficient, options, wanted: _flops(operands, wanted),
)
def linear_distillation_fwd(
    operands: Operands, coefficient: Tensor | None, options: Options, wanted: Wanted
) -> tuple[RowOutputs, Gradients]:
    """Loss and statistics of each row, and the wanted gradients of sum(coefficient * loss)."""
    return empty_outputs(operands, operands.input.shape[0], options.stats), empty_gradients(operands, wanted)


class _RowLosses(Function):
    """Per-row losses and statistics, "compact": backward recomputes the logits of student and teacher."""

    differentiable = 1

    @staticmethod
    def forward(operands: Operands, options: Options) -> RowOutputs:
        nothing = Wanted(input=False, linear_weight=False, linear_bias=False)
        rows, _ = linear_distillation_fwd(operands, None, options, nothing)
        return rows

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        operands, options = inputs
        (rows,) = outputs
        ctx.options = options._replace(stats=False)
        save(ctx, operands, rows.gap)

    @staticmethod
    def backward(ctx, grads):
        if grads.loss is None:
            return None
        needs, _ = _RowLosses.wanted(ctx)
        wanted = Wanted(*[getattr(needs, name) for name in Wanted._fields])
        operands, gap = saved(ctx)
        grad_temperature = None
        if needs.temperature:
            grad_temperature = _temperature_gradient(grads.loss, gap, operands.temperature, operands)
        found = Operands(*[None] * len(Operands._fields))
        if any(wanted):
            found = _row_gradients(grads.loss.contiguous(), operands, ctx.options, wanted)
        return (found._replace(temperature=grad_temperature),)


@once_differentiable(NAME)
def _row_gradients(grad_loss: Tensor, operands: Operands, options: Options, wanted: Wanted) -> Operands:
    """The gradients of the operands, None where not wanted."""
    _, gradients = linear_distillation_fwd(operands, grad_loss, options, wanted)
    found = {
        name: scaled(getattr(gradients, name), gradients.scale, getattr(operands, name).dtype)
        for name in Wanted._fields
        if getattr(wanted, name)
    }
    return _operand_gradients(found)


@once_differentiable(NAME)
def _temperature_gradient(weights: Tensor, gap: Tensor, temperature: Tensor, leaves: Operands) -> Tensor:
    """The gradient of sum(weights * loss) by both temperatures; the teacher's is 0."""
    by_student = (weights * gap).sum().to(temperature.dtype) / temperature[0]
    return torch.stack([by_student, torch.zeros_like(by_student)])


class _Leaves(NamedTuple):
    """The tensors of a reduced loss that may require a gradient."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    temperature: Tensor
    row_weight: Tensor | None


class _ReducedLoss(Function):
    """sum(row_weight * loss) / divisor, "fast": its gradients are computed with it and kept, and backward multiplies
    them by grad_output. A gradient that backward needs but forward was not asked for raises an error."""

    differentiable = 1

    @staticmethod
    def forward(
        operands: Operands, row_weight: Tensor | None, divisor: Tensor | None, options: Options, wanted: Wanted
    ) -> tuple[Tensor, RowOutputs, Gradients]:
        acc = accumulation_dtype(operands.input.dtype)
        count = operands.input.shape[0]
        coefficient = operands.input.new_ones(count, dtype=acc) if row_weight is None else row_weight.to(acc)
        if divisor is not None:
            coefficient = coefficient / divisor
        rows, gradients = linear_distillation_fwd(operands, coefficient, options, wanted)
        loss = (rows.loss if row_weight is None else rows.loss * row_weight).sum()
        return loss if divisor is None else loss / divisor, rows, gradients

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        operands, row_weight, divisor, _, ctx.computed = inputs
        _, rows, gradients = outputs
        leaves = _Leaves(operands.input, operands.linear_weight, operands.linear_bias, operands.temperature, row_weight)
        save(ctx, gradients, rows.loss, rows.gap, divisor, leaves)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None
        gradients, losses, gap, divisor, leaves = saved(ctx)
        needs, needs_row_weight, *_ = _ReducedLoss.wanted(ctx)
        scale = grad_loss * gradients.scale
        found = {}
        for name in Wanted._fields:
            if not getattr(needs, name):
                continue
            if not getattr(ctx.computed, name):
                raise RuntimeError(f"{NAME}: forward saw no gradient wanted for {name}; use mode='compact' here")
            found[name] = _kept_gradient(getattr(gradients, name), scale, getattr(leaves, name).dtype, leaves)
        by_row = grad_loss if divisor is None else grad_loss / divisor
        if needs.temperature:
            weights = by_row if leaves.row_weight is None else by_row * leaves.row_weight
            found["temperature"] = _kept_temperature_gradient(weights.to(gap.dtype), gap, leaves)
        grad_row_weight = None
        if needs_row_weight:
            grad_row_weight = _kept_gradient(losses, by_row, leaves.row_weight.dtype, leaves)
        return _operand_gradients(found), grad_row_weight


@once_differentiable(NAME)
def _kept_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype, leaves: _Leaves) -> Tensor:
    return scaled(gradient, scale, dtype, saved=True)


@once_differentiable(NAME)
def _kept_temperature_gradient(weights: Tensor, gap: Tensor, leaves: _Leaves) -> Tensor:
    by_student = (weights * gap).sum().to(leaves.temperature.dtype) / leaves.temperature[0]
    return torch.stack([by_student, torch.zeros_like(by_student)])


def _operand_gradients(found: dict[str, Tensor]) -> Operands:
    return Operands(*[found.get(name) for name in Operands._fields])


@checks.with_python_numbers
@returns_stats(Tensor, DistillationStats)
def linear_distillation(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    center: Tensor | None = None,
    teacher_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    divergence: str = "cross_entropy",
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    on_empty: str = "nan",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    process_group: Any = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Cross-entropy between the softmaxes of a teacher and of a student over a large head, without their logits.

    With `p = softmax((student @ student_weight.T + student_bias) / student_temperature)` and Q the softmax of
    `(teacher @ teacher_weight.T + teacher_bias - center) / teacher_temperature`, row i has the loss
    `-sum_v q_iv log p_iv`, where q_i is row i of Q or the mean of those that `teacher_index` names. DINO, iBOT, SwAV,
    MSN and the distillation of language models are this with tables of 65,536 to 262,144 prototypes or words.

    Rows go chunk by chunk through two buffers of `workspace_bytes` together, teacher rows that a chunk shares once. In
    16-bit dtypes the logits are float32.

    Args:
        student: features `(..., D)`; float32, bfloat16, float16 or float64. Under autocast its matmuls run in the dtype
            of autocast, whatever the dtypes of student and weight; otherwise the two must be equal. On a CPU 16-bit
            dtypes compute in float32.
        student_weight: `(V, D)`.
        teacher: features `(..., Dt)`, of the same number of rows as student without a `teacher_index`; detached, like
            `teacher_weight`, `teacher_bias` and `center`. float64 only if student is.
        teacher_weight: `(V, Dt)`, of the dtype of teacher outside autocast. May be the student's.
        student_bias: `(V,)`, any float dtype.
        teacher_bias: `(V,)`, any float dtype.
        student_temperature: positive; a float, or a float tensor of one element. Differentiable.
        teacher_temperature: positive; a float, or a float tensor of one element, without a gradient.
        center: `(V,)`, any float dtype, subtracted from the teacher's logits; see `teacher_center`, `sinkhorn_center`.
        teacher_index: `(..., T)`, int64 or int32, rows of teacher (flattened) whose softmaxes are averaged; -1 for
            none. A row of none is left out: its loss is 0, and it does not count.
        row_weight: `(...)`, multiplies the loss of each row; not part of the divisor of "mean". Differentiable.
        divergence: "cross_entropy", or "kl", which subtracts the entropy of q.
        reduction: "mean" divides by the number of rows with a teacher or by `num_items`; "sum"; or "none", which
            returns the shape of the rows.
        num_items: int or 0-d tensor, overrides the divisor of "mean" (for gradient accumulation).
        on_empty: loss of a mean over no rows: "nan", as in torch, or "zero", with gradients of zero.
        mode: "fast": the gradients are computed in forward and kept until backward; "compact": backward recomputes the
            logits, and no buffer of the size of a gradient lives before it; "auto": fast if a gradient is wanted. With
            `reduction="none"` every mode runs the compact plan.
        workspace_bytes: upper bound of the bytes of the buffers of logits, which hold at least 16 rows. Default: 512
            MiB on CUDA or, if that is more, a 64th of the GPU's memory; 128 MiB on a CPU.
        process_group: ranks that the prototypes are sliced over, a `torch.distributed.ProcessGroup` or a DeviceMesh of
            one dimension. Both weights, both biases and the center then have the rows of this rank's slice, of any
            size and in the order of the ranks; everything else is the same on every rank. Loss and statistics are the
            same on every rank, but for the usage, which has this rank's prototypes; the gradient of student is
            complete. A `student_weight` and `student_bias` may be DTensors, `Shard(0)` over this group or a mesh
            dimension named "tp". The rows are computed in plain torch; no logits are exchanged.
        return_stats: also return `DistillationStats`, from the same pass.

    Returns:
        The loss, float32 (float64 for float64 student); with `return_stats` the pair (loss, statistics).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. An index out of range or a
            temperature that is not positive raises `ValueError` on the CPU; on a GPU the loss of its rows is NaN.

    Nothing synchronises.

    Sources: Caron et al., "Emerging properties in self-supervised vision transformers", 2021; Hinton, Vinyals and Dean,
    "Distilling the knowledge in a neural network", 2015.

    >>> import sslkernels as sk
    >>> student, prototypes = torch.randn(8, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    >>> teacher, center = torch.randn(4, 16), torch.zeros(1000)
    >>> index = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    >>> sk.linear_distillation(student, prototypes, teacher, prototypes, center=center, teacher_index=index).backward()
    """
    rows_shape = student.shape[:-1] if isinstance(student, Tensor) else ()
    student_weight, student_bias, group, sizes = own_slice(NAME, student_weight, student_bias, process_group, None)
    heads = Heads(student_weight, student_bias, teacher_weight, teacher_bias, center)
    check_heads(student, teacher, heads, group is not None)
    check_rows(student, teacher, teacher_index, row_weight)
    check_reduction(NAME, reduction, num_items, on_empty, student.device)
    checks.choice(NAME, "divergence", divergence, ("cross_entropy", "kl"))
    checks.choice(NAME, "mode", mode, ("auto", "fast", "compact"))
    checks.integer(NAME, "workspace_bytes", workspace_bytes, low=1, optional=True)
    checks.boolean(NAME, "return_stats", return_stats)
    student_dtype = compute_dtype_of(NAME, student, student_weight, ("student", "student_weight"))
    teacher_dtype = compute_dtype_of(NAME, teacher, teacher_weight, ("teacher", "teacher_weight"))
    options = Options(divergence == "kl", return_stats, student_dtype, teacher_dtype, workspace_bytes, group, sizes)
    if group is not None:
        same = {"student": student, "teacher": teacher, "teacher_index": teacher_index, "row_weight": row_weight}
        same |= heads._asdict() | {"reduction": reduction, "num_items": num_items, "on_empty": on_empty, "mode": mode}
        same |= {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        check_ranks(NAME, group, same | {"divergence": divergence, "stats": return_stats, "bytes": workspace_bytes})
        student = summed_gradient(student, group)
    device = student.device
    student_tau = temperature_tensor(NAME, "student_temperature", student_temperature, "student", device)
    teacher_tau = temperature_tensor(NAME, "teacher_temperature", teacher_temperature, "student", device)
    if teacher_tau.requires_grad:
        checks.fail(ValueError, NAME, "teacher_temperature", "not require grad", "requires_grad=True")

    acc = accumulation_dtype(student.dtype)
    index = None
    if teacher_index is not None:
        index = teacher_index.reshape(math.prod(rows_shape), teacher_index.shape[-1]).contiguous()
    operands = Operands(
        student.reshape(math.prod(rows_shape), student.shape[-1]).contiguous(),
        student_weight.contiguous(),
        contiguous(student_bias),
        teacher.detach().reshape(math.prod(teacher.shape[:-1]), teacher.shape[-1]).contiguous(),
        teacher_weight.detach().contiguous(),
        _offset(teacher_bias, center),
        index,
        torch.stack([student_tau, teacher_tau]),
    )
    weights = None if row_weight is None else row_weight.reshape(-1).contiguous()
    divisor = _divisor(operands, num_items, on_empty, acc) if reduction == "mean" else None

    wanted = Wanted(*[may_want_gradient(getattr(operands, name)) for name in Wanted._fields])
    if mode != "compact" and reduction != "none" and any(wanted):
        loss, rows, _ = _ReducedLoss.run(operands, weights, divisor, options, wanted)
    else:
        rows = _RowLosses.run(operands, options)
        loss = reduced(rows.loss, weights, divisor, reduction, rows_shape)
    return (loss, _statistics(rows, rows_shape, group)) if return_stats else loss


def _statistics(rows: RowOutputs, shape: tuple[int, ...], group: str | None) -> DistillationStats:
    usage = rows.usage.detach()
    entropy = torch.special.entr(usage).sum()
    perplexity = (entropy if group is None else sum_over_ranks(entropy, group)).exp()
    by_row = (rows.teacher_entropy, rows.student_entropy, rows.agreement)
    return DistillationStats(*(values.detach().reshape(shape) for values in by_row), usage, perplexity)


def _offset(teacher_bias: Tensor | None, center: Tensor | None) -> Tensor | None:
    """The sum that is added to the teacher's logits, float64: a center far from 0 costs no digits."""
    if center is None:
        return None if teacher_bias is None else teacher_bias.detach().double()
    offset = -center.detach().double()
    return offset if teacher_bias is None else offset + teacher_bias.detach().double()


def _divisor(operands: Operands, num_items: int | Tensor | None, on_empty: str, dtype: torch.dtype) -> Tensor:
    device, index = operands.input.device, operands.teacher_index
    if index is None:
        count = torch.full((), operands.input.shape[0], dtype=dtype, device=device)
    else:
        count = (index != -1).any(1).count_nonzero().to(dtype)
    if isinstance(num_items, Tensor):
        divisor = num_items.detach().reshape(()).to(dtype)
    else:
        divisor = count if num_items is None else full((), float(num_items), dtype, device)
    return torch.where(count == 0, 1, divisor) if on_empty == "zero" else divisor
