"""Distillation over a projection in chunks of rows: the plan of every backend but the reference.

Chunk by chunk: the products of the teacher rows that the chunk needs into one reused buffer, and one pass that turns
them into exponentials; the products of the student rows into another, and one pass that turns these into losses and
their gradient; then the matmuls of the gradients. Rows are ordered so that those that share teachers share a chunk, and
rows without a teacher come last or, on a CPU, are dropped. Products, sums and exponentials are in the accumulation
dtype: at a temperature of 0.04 the rounding of a logit to bfloat16 would change its probability by tens of per cent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core.chunks import (
    ROW_MULTIPLE,
    Matmuls,
    equal_rows,
    padded_rows,
    round_up,
    row_pitch,
    wave_rows,
    workspace_of,
)
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.products import add_product
from sslkernels.core.slices import Slices
from sslkernels.vocabulary.linear_records import empty_gradients, normalise
from sslkernels.vocabulary.prototypes.distillation_records import (
    Gradients,
    Operands,
    Options,
    RowOutputs,
    Wanted,
    centered,
    empty_outputs,
    inverse_of,
    shares,
)
from sslkernels.vocabulary.prototypes.distillation_rows import Choice, DistillationRows, Head, TeacherState
from sslkernels.vocabulary.prototypes.sliced_distillation import SlicedRows, slices_in

# Bytes of the buffers, unless the caller bounds them.
WORKSPACE_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}


def forward(
    rows: DistillationRows, operands: Operands, coefficient: Tensor | None, options: Options, wanted: Wanted
) -> tuple[RowOutputs, Gradients]:
    """Loss and statistics of each row, and the wanted gradients of sum(coefficient * loss)."""
    gradients = empty_gradients(operands, wanted)
    outputs = empty_outputs(operands, operands.input.shape[0], options.stats)
    slices = slices_in(options, operands)
    rows = rows if slices is None else SlicedRows(slices)
    students = _Students(rows, operands, options, wanted, gradients, slices)
    teachers = _Teachers(rows, operands, options, slices)
    order = _order(operands, outputs.loss.dtype)
    coefficient = students.coefficient(coefficient, order, operands) if any(wanted) else None
    if options.stats:
        outputs.usage.zero_()
    parts: list[RowOutputs] = []
    for chunk in _chunks(order, students.chunk_rows(teachers, order)):
        state, choice = teachers.state(chunk, order)
        part = empty_outputs(operands, chunk.stop - chunk.start, options.stats)
        parts.append(part)
        x = students.rows_of(chunk, order)
        students.process(x, state, choice, coefficient if coefficient is None else coefficient[chunk], part)
        if options.stats:
            outputs.usage.add_(torch.mv(state.exponentials.t(), _masses(state, choice)))
        if any(wanted):
            students.accumulate(x, chunk.start)
    students.finish(order)
    if options.stats:
        outputs.usage.div_(order.valid)
    for out, *values in zip(outputs.rows, *(part.rows for part in parts), strict=True):
        _scatter(out, values, order)
    return outputs, gradients


class _Order(NamedTuple):
    """rows (count,): the rows to compute, in the order of the chunks; None for all as they are. valid: how many rows
    have a teacher, an int or a 0-d tensor. index (count, T), share (count, T): teachers and weights of these rows;
    None: row i has teacher row i."""

    count: int
    rows: Tensor | None
    valid: int | Tensor
    index: Tensor | None
    share: Tensor | None


def drops_rows(device: torch.device) -> bool:
    """Whether rows without a teacher are dropped; elsewhere that would synchronise, and they are computed as zeros."""
    return device.type == "cpu"


def _order(operands: Operands, dtype: torch.dtype) -> _Order:
    count, teachers, index = operands.input.shape[0], operands.teacher.shape[0], operands.teacher_index
    if index is None:
        return _Order(count, None, count, None, None)
    index, share = shares(index, teachers, dtype)
    given = torch.where(share != 0, index, teachers)  # NaN, for an index out of range, is given too
    first = given.amin(1)
    # A teacher's label is the first teacher of any row that has it: rows that share teachers sort next to each other.
    label = torch.full((teachers + 1,), teachers, dtype=torch.int64, device=index.device)
    label.scatter_reduce_(0, given.reshape(-1), first[:, None].expand_as(given).reshape(-1), "amin")
    label[teachers] = teachers
    rows = torch.argsort(label[given].amin(1), stable=True)
    valid = (first < teachers).sum()
    if teachers == 0:
        count, rows = 0, rows[:0]
    elif drops_rows(index.device):
        count = valid = int(valid)
        rows = rows[:count]
    return _Order(count, rows, valid, index[rows], share[rows])


def _chunks(order: _Order, chunk_rows: int) -> Iterator[slice]:
    for begin in range(0, order.count, max(chunk_rows, 1)):
        yield slice(begin, min(begin + chunk_rows, order.count))


def _scatter(out: Tensor, parts: list[Tensor], order: _Order) -> None:
    """Writes values, in the order of the chunks, to their rows of `out`; rows that were dropped become 0."""
    if out.numel() == 0:
        return
    if order.count < out.shape[0]:
        out.zero_()
    if order.rows is not None and parts:
        out.index_copy_(0, order.rows, torch.cat(parts))
    elif parts:
        torch.cat(parts, out=out)


def _masses(state: TeacherState, choice: Choice) -> Tensor:
    """The factor of each teacher row's exponentials in the sum of q over the rows."""
    inverse = 1 / (1 + state.others)
    if choice.index is None:
        return inverse
    # Sums of integers: on a GPU, floats would be summed in an order that varies.
    unit = 2.0 ** (62 - choice.share.shape[0].bit_length())
    units = (choice.share.nan_to_num().double() * unit).round().long()
    mass = torch.zeros_like(state.best).index_add_(0, choice.index.clamp_min(0).reshape(-1), units.reshape(-1))
    return (mass.double() / unit).to(inverse.dtype) * inverse


class Projection:
    """The products of rows and a weight, chunk by chunk, in a buffer in the accumulation dtype."""

    def __init__(
        self,
        rows: Tensor,
        weight: Tensor,
        offset: Tensor | None,
        temperature: Tensor,
        compute_dtype: torch.dtype,
        slices: Slices | None = None,
    ) -> None:
        """offset (V,), float64, is added to the logits, without its mean over all slices."""
        acc = accumulation_dtype(rows.dtype)
        # On a CPU a matmul of 16-bit numbers has no float32 result.
        self.dtype = compute_dtype if rows.device.type == "cuda" and acc != torch.float64 else acc
        self.rounded_to = compute_dtype
        self.weight = weight.to(compute_dtype).to(self.dtype)
        self.head = _head(centered(offset, slices), temperature, acc)
        self.buffer = rows.new_empty(0, dtype=acc)

    def matmul_operand(self, rows: Tensor) -> Tensor:
        return rows.to(self.rounded_to).to(self.dtype)

    def products(self, rows: Tensor) -> Tensor:
        """(rows, V), which the next call overwrites."""
        vocab = self.weight.shape[0]
        if self.buffer.shape[0] < rows.shape[0]:
            self.buffer = padded_rows(self.buffer, round_up(rows.shape[0], ROW_MULTIPLE), vocab, self.buffer.dtype)
        out = self.buffer[: rows.shape[0]]
        out_dtype = {} if out.dtype == self.dtype else {"out_dtype": out.dtype}
        return torch.mm(self.matmul_operand(rows), self.weight.t(), **out_dtype, out=out)


class _Teachers:
    """The teacher's softmaxes of a chunk."""

    def __init__(self, rows: DistillationRows, operands: Operands, options: Options, slices: Slices | None) -> None:
        self.kernels = rows
        # In the accumulation dtype of the student, whose float64 a teacher need not share.
        acc = accumulation_dtype(operands.input.dtype)
        self.teacher = operands.teacher.to(acc) if acc == torch.float64 else operands.teacher
        self.projection = Projection(
            self.teacher,
            operands.teacher_weight,
            operands.teacher_offset,
            operands.teacher_temperature,
            options.teacher_dtype,
            slices,
        )

    def state(self, chunk: slice, order: _Order) -> tuple[TeacherState, Choice]:
        if order.index is None:
            return self._exponentials(self.teacher[chunk]), Choice(None, None)
        index, share = order.index[chunk], order.share[chunk]
        teachers = self.teacher.shape[0]
        needed = torch.zeros(teachers + 1, dtype=torch.int64, device=index.device)
        needed.index_fill_(0, torch.where(share != 0, index, teachers).reshape(-1), 1)
        number = needed[:teachers].cumsum(0)
        # On a GPU room for as many as there can be: to count them would synchronise.
        slots = int(number[-1]) if index.device.type == "cpu" else min(teachers, index.numel())
        nth = torch.arange(1, slots + 1, device=index.device)
        rows = torch.searchsorted(number, nth).clamp_max(teachers - 1)
        local = torch.where(share != 0, number[index] - 1, -1)
        return self._exponentials(self.teacher[rows]), Choice(local, share)

    def _exponentials(self, rows: Tensor) -> TeacherState:
        return self.kernels.teacher(self.projection.products(rows), self.projection.head)


class _Students:
    """The student's logits of a chunk, and its gradients."""

    def __init__(
        self,
        rows: DistillationRows,
        operands: Operands,
        options: Options,
        wanted: Wanted,
        gradients: Gradients,
        slices: Slices | None,
    ) -> None:
        self.kernels, self.options, self.wanted, self.gradients = rows, options, wanted, gradients
        self.acc = accumulation_dtype(operands.input.dtype)
        self.input = operands.input
        self.projection = Projection(
            operands.input,
            operands.linear_weight,
            operands.linear_bias,
            operands.student_temperature,
            options.student_dtype,
            slices,
        )
        # All ranks reduce as many chunks: their rows follow from the largest slice.
        self.widest = operands.linear_weight.shape[0] if slices is None else slices.largest
        self.dtype, self.weight = self.projection.dtype, self.projection.weight
        self.gradient_buffer = operands.input.new_empty(0, dtype=self.acc)
        self.grad_weight = gradients.linear_weight
        if wanted.linear_weight and self.grad_weight.dtype != self.acc:
            self.grad_weight = torch.empty_like(self.grad_weight, dtype=self.acc)
        self.grad_input = gradients.input
        self.first = True

    def coefficient(self, coefficient: Tensor, order: _Order, operands: Operands) -> Tensor:
        """The factors of the gradients with respect to the products, in the order of the chunks."""
        coefficient = coefficient * inverse_of(operands.student_temperature).to(self.acc)
        if order.rows is not None:
            coefficient = coefficient[order.rows].masked_fill((order.share == 0).all(1), 0)
        return normalise(coefficient, self.gradients.scale, self.input.dtype, self.dtype).contiguous()

    def chunk_rows(self, teachers: _Teachers, order: _Order) -> int:
        """The rows of a chunk, as many as fit the workspace with the teachers that they may need, whose buffers it
        allocates."""
        device, pitch = self.input.device, row_pitch(self.widest)
        workspace_bytes = self.options.workspace_bytes
        if workspace_bytes is None:
            workspace_bytes = workspace_of(device, WORKSPACE_BYTES)
        separate = any(self.wanted) and self.dtype != self.acc
        student, teacher = self.acc.itemsize + separate * self.dtype.itemsize, self.acc.itemsize
        available = workspace_bytes // pitch
        choices = 1 if order.index is None else order.index.shape[1]
        fit = available // (student + choices * teacher)
        if order.index is not None:
            fit = max(fit, (available - teachers.teacher.shape[0] * teacher) // student)
        fit = max(fit // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        if device.type != "cuda":
            rows = equal_rows(order.count, fit)
        else:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            matmuls = Matmuls(self.widest, self.weight.shape[1], self.wanted.input, self.wanted.linear_weight)
            rows = wave_rows(order.count, matmuls, fit, processors)
        if separate:
            self.gradient_buffer = padded_rows(
                self.input, round_up(rows, ROW_MULTIPLE), self.weight.shape[0], self.dtype
            )
        if self.wanted.input:
            padded = round_up(order.count, ROW_MULTIPLE)
            self.grad_input = self.input.new_empty((padded, self.input.shape[1]), dtype=self.dtype)
        return rows

    def rows_of(self, chunk: slice, order: _Order) -> Tensor:
        """The input of a chunk. Rows without a teacher, which may hold anything, are 0."""
        x = self.input[chunk]
        if order.rows is not None:
            x = self.input[order.rows[chunk]].masked_fill_((order.share[chunk] == 0).all(1, keepdim=True), 0)
        return self.projection.matmul_operand(x)

    def process(
        self, x: Tensor, state: TeacherState, choice: Choice, coefficient: Tensor | None, outputs: RowOutputs
    ) -> None:
        count = x.shape[0]
        products = self.projection.products(x)
        if self.dtype == self.acc:
            self.gradient_buffer = self.projection.buffer
        grad = None if coefficient is None else self.gradient_buffer[:count]
        self.kernels.student(
            products, self.projection.head, state, choice, coefficient, outputs, self.options.divergence, grad
        )

    def accumulate(self, x: Tensor, begin: int) -> None:
        """Adds the contribution of the chunk whose first row is `begin` to every wanted gradient."""
        count = x.shape[0]
        grad = self.gradient_buffer[:count]
        if self.wanted.input:
            # On a CPU the rows are padded by scratch rows, whose results are not used.
            rows = count if x.is_cuda else round_up(count, ROW_MULTIPLE)
            out = self.grad_input[begin : begin + rows]
            torch.mm(self.gradient_buffer[: out.shape[0]], self.weight, out=out)
        if self.wanted.linear_weight:
            add_product(self.grad_weight, grad.t(), x, self.first)
        if self.wanted.linear_bias:
            self.kernels.add_column_sums(grad, self.gradients.linear_bias, self.first)
        self.first = False

    def finish(self, order: _Order) -> None:
        if self.first:
            self.grad_weight.zero_()
            self.gradients.linear_bias.zero_()
        if self.grad_weight is not self.gradients.linear_weight:
            self.gradients.linear_weight.copy_(self.grad_weight)
        if self.wanted.input:
            _scatter(self.gradients.input, [self.grad_input[: order.count].to(self.input.dtype)], order)


def _head(offset: Tensor | None, temperature: Tensor, dtype: torch.dtype) -> Head:
    inverse = inverse_of(temperature)
    if offset is not None:
        padded = offset.new_zeros(row_pitch(offset.shape[0]), dtype=dtype)  # a kernel reads whole vectors
        offset = padded[: offset.shape[0]].copy_(offset * inverse)
    return Head(offset, inverse.to(dtype).reshape(1))
