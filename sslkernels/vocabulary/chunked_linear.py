"""Linear cross-entropy in chunks of rows: the plan of every backend but the reference.

Ignored rows are dropped first (`selection`). Then, chunk by chunk: logits = input @ linear_weight.T into a reused
buffer, one pass of the backend's row kernel that reduces them to losses and overwrites them with their gradient, and
the matmuls of the gradients. The gradient of the weight accumulates over chunks in float32; if one chunk holds all
rows, a matmul writes it directly.

In float16 the gradient of the logits is divided by the largest row coefficient, which is returned: the gradient of a
mean over a large batch would vanish in the subnormals.
"""

from __future__ import annotations

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
from sslkernels.vocabulary.linear_records import Gradients, Operands, PlanOptions, Wanted, empty_gradients, normalise
from sslkernels.vocabulary.selection import IGNORED_ROW, Selection
from sslkernels.vocabulary.sliced_rows import rows_for, slices_in
from sslkernels.vocabulary.softmax_rows import RowOptions, RowOutputs, Rows, RowState, empty_outputs

# Bytes of the logits buffer, unless the caller bounds them or a GPU has much memory.
WORKSPACE_BYTES = {"cpu": 80 << 20, "cuda": 512 << 20}
# Rows of the weight's gradient that a CPU computes at a time in half precision: the product stays in the cache until it
# is added, and oneDNN's matmul is faster on a block than on a whole vocabulary.
VOCAB_BLOCK = 8192


def forward(
    rows: Rows,
    operands: Operands,
    coefficient: Tensor | None,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
    stats: bool,
) -> tuple[RowOutputs, Gradients]:
    """Loss and state of each row, and the wanted gradients of sum(coefficient * loss)."""
    input, linear_weight, bias, target, weight = operands
    slices = slices_in(plan, operands)
    row_kernels = rows_for(target, rows, slices)
    gradients = empty_gradients(operands, wanted)
    if not any(wanted):
        coefficient = None
        projection = (input.to(plan.compute_dtype), linear_weight.to(plan.compute_dtype))
        outputs = row_kernels.evaluate(*projection, target, bias, weight, options, stats=stats)
        if outputs is not None:
            return outputs, gradients
    chunks = _Chunks(rows, operands, slices, options, plan, wanted, gradients)
    if coefficient is not None:
        coefficient = chunks.coefficient_of_slots(coefficient, plan)
    parts: list[RowOutputs] = []
    for chunk, x, y in chunks:
        logits = chunks.logits(x)
        part, grad = (None, None) if coefficient is None else (coefficient[chunk], logits)
        parts.append(row_kernels.forward(logits, y, bias, weight, options, stats=stats, coefficient=part, grad=grad))
        if grad is not None:
            chunks.accumulate(grad, x, chunk.start or 0)
    chunks.finish()
    return chunks.outputs(parts, stats), gradients


def backward(
    rows: Rows,
    grad_loss: Tensor,
    operands: Operands,
    state: RowState,
    options: RowOptions,
    plan: PlanOptions,
    wanted: Wanted,
) -> Gradients:
    """The gradients of sum(grad_loss * loss), from recomputed logits."""
    _, _, bias, target, weight = operands
    slices = slices_in(plan, operands)
    row_kernels = rows_for(target, rows, slices)
    gradients = empty_gradients(operands, wanted)
    chunks = _Chunks(rows, operands, slices, options, plan, wanted, gradients)
    coefficient = chunks.coefficient_of_slots(grad_loss, plan)
    to_slots = chunks.selection.to_slots
    state = RowState(*(to_slots(values, empty) for values, empty in zip(state, IGNORED_ROW.state, strict=True)))
    for chunk, x, y in chunks:
        logits = chunks.logits(x)
        part = RowState(*(values[chunk] for values in state))
        row_kernels.backward(logits, y, bias, weight, options, part, coefficient[chunk], logits)
        chunks.accumulate(logits, x, chunk.start or 0)
    chunks.finish()
    return gradients


class _Chunks:
    """Iterates over the selected rows in chunks and accumulates their gradients."""

    def __init__(
        self,
        rows: Rows,
        operands: Operands,
        slices: Slices | None,
        options: RowOptions,
        plan: PlanOptions,
        wanted: Wanted,
        gradients: Gradients,
    ) -> None:
        input, linear_weight, target = operands.input, operands.linear_weight, operands.target
        # On a CPU a float16 matmul is about a thousand times slower than a float32 one.
        cpu_half = input.device.type == "cpu" and plan.compute_dtype == torch.float16
        self.dtype = torch.float32 if cpu_half else plan.compute_dtype
        self.kernels = rows
        self.options = options
        self.wanted = wanted
        self.gradients = gradients
        self.selection = Selection(target, options.ignore_index, plan.capacity)
        # Zero in an empty slot: its logits have gradient 0, and 0 times a NaN would reach the weight's gradient.
        self.input = self.selection.to_slots(input, 0).to(self.dtype)
        probabilities = target.is_floating_point()
        self.target = target if probabilities else self.selection.to_slots(target.long(), options.ignore_index)
        self.weight = linear_weight.to(self.dtype)
        self.count = self.selection.slots
        self.vocab = linear_weight.shape[0]
        # All ranks reduce as many chunks: their rows follow from the largest slice.
        self.widest = self.vocab if slices is None else slices.largest
        self.chunk_rows = self._chunk_rows(plan.workspace_bytes)
        self.buffer = padded_rows(input, round_up(self.chunk_rows, ROW_MULTIPLE), self.vocab, self.dtype)
        # A 16-bit gradient of several chunks accumulates in float32, and `finish` rounds it once.
        self.grad_weight = gradients.linear_weight
        one_chunk = self.chunk_rows >= self.count and gradients.linear_weight.dtype == self.dtype
        if wanted.linear_weight and not one_chunk and gradients.linear_weight.dtype != accumulation_dtype(self.dtype):
            acc = accumulation_dtype(self.dtype)
            self.grad_weight = torch.empty_like(gradients.linear_weight, dtype=acc)
        self.grad_input = gradients.input
        if wanted.input and not (self.selection.all_rows and input.dtype == self.dtype):
            self.grad_input = self.input.new_empty((round_up(self.count, ROW_MULTIPLE), input.shape[1]))
        self.first = True

    def coefficient_of_slots(self, coefficient: Tensor, plan: PlanOptions) -> Tensor:
        """The coefficients of the selected rows, divided by the scale that the gradients are given."""
        coefficient = self.selection.to_slots(coefficient, 0)
        return normalise(coefficient, self.gradients.scale, self.gradients.input.dtype, plan.compute_dtype)

    def __iter__(self):
        if 0 < self.count <= self.chunk_rows:
            yield slice(None), self.input, self.target
            return
        for begin in range(0, self.count, max(self.chunk_rows, 1)):
            chunk = slice(begin, min(begin + self.chunk_rows, self.count))
            yield chunk, self.input[chunk], self.target[chunk]

    def _chunk_rows(self, workspace_bytes: int | None) -> int:
        device = self.input.device
        if workspace_bytes is None:
            workspace_bytes = workspace_of(device, WORKSPACE_BYTES)
            if device.type == "cpu" and self.wanted.linear_weight and self.dtype.itemsize == 2:
                # The size of the accumulator of the weight's gradient, which every chunk reads and writes once.
                workspace_bytes = max(workspace_bytes, 4 * self.widest * self.weight.shape[1])
        fit = workspace_bytes // (row_pitch(self.widest) * self.dtype.itemsize)
        fit = max(fit // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        if device.type != "cuda":
            return equal_rows(self.count, fit)
        matmuls = Matmuls(self.widest, self.weight.shape[1], self.wanted.input, self.wanted.linear_weight)
        return wave_rows(self.count, matmuls, fit, torch.cuda.get_device_properties(device).multi_processor_count)

    def logits(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight.t(), out=first_rows(self.buffer, x.shape[0]))

    def accumulate(self, grad_logits: Tensor, x: Tensor, begin: int) -> None:
        """Adds the contribution of the chunk whose first row is `begin` to every wanted gradient."""
        if self.wanted.input:
            # CPU: pad to ROW_MULTIPLE with scratch rows whose results are discarded. GPU: no padding, the scratch rows
            # are uninitialised.
            rows = x.shape[0] if x.is_cuda else round_up(x.shape[0], ROW_MULTIPLE)
            out = self.grad_input[begin : begin + rows] if begin else first_rows(self.grad_input, rows)
            torch.mm(first_rows(self.buffer, out.shape[0]), self.weight, out=out)
        if self.wanted.linear_weight and self.vocab:
            self._add_product(self.grad_weight, grad_logits.t(), x)
        if self.wanted.linear_bias and self.vocab:
            self.kernels.add_column_sums(grad_logits, self.gradients.linear_bias, self.first)
        self.first = False

    def _add_product(self, total: Tensor, grads: Tensor, x: Tensor) -> None:
        """total = (0 if first else total) + grads @ x. In half precision the total is float32, unless one chunk holds
        all rows."""
        half = grads.dtype.itemsize == 2
        if total.is_cuda or not half:
            add_product(total, grads, x, self.first)
            return
        direct = total.dtype == grads.dtype
        part = None if direct else x.new_empty((VOCAB_BLOCK, x.shape[1]))
        for begin in range(0, total.shape[0], VOCAB_BLOCK):
            block = total[begin : begin + VOCAB_BLOCK]
            if part is None:
                torch.mm(grads[begin : begin + VOCAB_BLOCK], x, out=block)
            else:
                product = torch.mm(grads[begin : begin + VOCAB_BLOCK], x, out=part[: block.shape[0]])
                self.kernels.add(block, product, self.first)

    def finish(self) -> None:
        """Applies logit_scale, converts to the dtypes of the gradients, and scatters the rows of the input gradient."""
        gradients, scale = self.gradients, self.options.logit_scale
        if self.first:
            for gradient in (self.grad_weight, gradients.linear_bias):
                gradient.zero_()
        if self.wanted.linear_weight and scale != 1.0:
            self.grad_weight.mul_(scale)
        if self.grad_weight is not gradients.linear_weight and self.vocab:
            self.kernels.add(gradients.linear_weight, self.grad_weight, True)
        if not self.wanted.input:
            return
        if scale != 1.0:
            self.grad_input.mul_(scale)
        if self.grad_input is not gradients.input:
            self.selection.to_rows(self.grad_input[: self.count], 0, gradients.input)

    def outputs(self, parts: list[RowOutputs], stats: bool) -> RowOutputs:
        """The outputs of all rows; ignored rows get what the row kernels write for them."""
        if len(parts) == 1 and self.selection.all_rows:
            return parts[0]
        slots = RowOutputs(*map(torch.cat, zip(*parts, strict=True))) if parts else empty_outputs(self.input, 0, stats)
        result = empty_outputs(self.input, self.selection.rows, stats)
        for values, ignored, out in zip(slots, IGNORED_ROW, result, strict=True):
            if out.numel():
                self.selection.to_rows(values, ignored, out)
        return result


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """tensor[:rows]; the tensor itself if it has no more, without the microsecond that a view takes."""
    return tensor if tensor.shape[0] <= rows else tensor[:rows]
