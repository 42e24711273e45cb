"""Linear cross-entropy in chunks of rows: the plan of every backend but the reference.

Rows that are ignored are left out first. Then, chunk by chunk: logits = input @ linear_weight.T into a buffer that is
reused, one pass of the backend's row kernel that turns it into losses and, in place, the gradient of the logits, and
the matmuls of the gradients. The buffer's row pitch is a multiple of 64 elements, so that a vocabulary of any size has
aligned rows. The weight's gradient accumulates over chunks in float32; where one chunk holds all rows, a matmul writes
it.

In float16 the gradient of the logits is held divided by the largest coefficient of a row, which is returned: a loss
divided by a large batch would vanish in its subnormals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.ops.rows import RowOptions, RowOutputs, Rows, accumulation_dtype, empty_outputs

# Bytes of the logits buffer.
WORKSPACE_BYTES = {"cpu": 80 << 20, "cuda": 512 << 20}
PITCH = 64
# The compacted rows are padded to a multiple of this in the product that gives the input's gradient: for some smaller
# numbers of rows MKL sums a large vocabulary with four times the error.
ROW_MULTIPLE = 16
# Rows of the vocabulary whose weight gradient is computed at a time in half precision: the product stays in the cache
# until it is added, and oneDNN's matmul is faster on them than on a whole vocabulary.
VOCAB_BLOCK = 8192


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Of the input (N, D) and the weight (V, D) in their dtypes (but a float16 weight's in float32: without `scale` it
    may exceed float16), of the bias (V,) in the accumulation dtype; empty if not wanted. The true gradients are these
    times `scale` (0-d)."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor


def empty_gradients(input: Tensor, linear_weight: Tensor, wanted: Wanted) -> Gradients:
    acc = accumulation_dtype(input.dtype)
    weight_dtype = acc if linear_weight.dtype == torch.float16 else linear_weight.dtype
    return Gradients(
        input.new_empty(input.shape if wanted.input else (0, 0)),
        linear_weight.new_empty(linear_weight.shape if wanted.weight else (0, 0), dtype=weight_dtype),
        linear_weight.new_empty(linear_weight.shape[0] if wanted.bias else 0, dtype=acc),
        input.new_empty((), dtype=acc),
    )


def normalise(coefficient: Tensor, target: Tensor, ignore_index: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """(coefficient / scale, scale), with scale 1 unless one of `dtypes` is float16.

    Ignored rows, whose coefficient may be anything (1 / 0 where no row is valid), get 0 and do not count.
    """
    coefficient = torch.where(target != ignore_index, coefficient, 0)
    if torch.float16 not in dtypes or coefficient.numel() == 0:
        return coefficient, coefficient.new_ones(())
    largest = coefficient.abs().max()
    scale = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return coefficient / scale, scale


def forward(
    rows: Rows,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    coefficient: Tensor | None,
    compute_dtype: torch.dtype,
    options: RowOptions,
    wanted: Wanted,
    stats: bool,
) -> tuple[RowOutputs, Gradients]:
    """Losses and state of each row, and the gradients of sum(coefficient * loss) where they are wanted."""
    gradients = empty_gradients(input, linear_weight, wanted)
    gradients.scale.fill_(1)
    if any(wanted):
        assert coefficient is not None
        coefficient, scale = normalise(coefficient, target, options.ignore_index, input.dtype, compute_dtype)
        gradients.scale.copy_(scale)
    else:
        projection = (input.to(compute_dtype), linear_weight.to(compute_dtype))
        outputs = rows.evaluate(*projection, target, bias, weight, options, stats=stats)
        if outputs is not None:
            return outputs, gradients
    chunks = _Chunks(rows, input, linear_weight, target, compute_dtype, options, wanted, gradients)
    parts: list[RowOutputs] = []
    for x, y, take in chunks:
        logits = chunks.logits(x)
        grad = logits if any(wanted) else None
        part = None if coefficient is None else take(coefficient)
        parts.append(rows.forward(logits, y, bias, weight, options, stats=stats, coefficient=part, grad=grad))
        if grad is not None:
            chunks.accumulate(grad, x)
    chunks.finish()
    return chunks.spread(parts, stats), gradients


def backward(
    rows: Rows,
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    state: RowOutputs,
    compute_dtype: torch.dtype,
    options: RowOptions,
    wanted: Wanted,
) -> Gradients:
    """The gradients of sum(grad_loss * loss), from the logits computed again."""
    gradients = empty_gradients(input, linear_weight, wanted)
    chunks = _Chunks(rows, input, linear_weight, target, compute_dtype, options, wanted, gradients)
    coefficient, scale = normalise(grad_loss, target, options.ignore_index, input.dtype, compute_dtype)
    gradients.scale.copy_(scale)
    for x, y, take in chunks:
        logits = chunks.logits(x)
        part = RowOutputs(*(take(values) if values.numel() else values for values in state))
        rows.backward(logits, y, bias, weight, options, part, take(coefficient), logits)
        chunks.accumulate(logits, x)
    chunks.finish()
    return gradients


class _Chunks:
    """Walks over the valid rows in chunks and gathers their gradients."""

    def __init__(
        self,
        rows: Rows,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        compute_dtype: torch.dtype,
        options: RowOptions,
        wanted: Wanted,
        gradients: Gradients,
    ) -> None:
        # On a CPU a float16 matmul is about a thousand times slower than a float32 one.
        cpu_half = input.device.type == "cpu" and compute_dtype == torch.float16
        self.dtype = torch.float32 if cpu_half else compute_dtype
        self.kernels = rows
        self.options = options
        self.wanted = wanted
        self.gradients = gradients
        self.index = _valid_index(target, options.ignore_index)
        self.input = (input if self.index is None else input.index_select(0, self.index)).to(self.dtype)
        self.target = target if self.index is None else target.index_select(0, self.index)
        self.weight = linear_weight.to(self.dtype)
        self.total = input.shape[0]
        self.count = self.input.shape[0]
        self.vocab = linear_weight.shape[0]
        self.chunk_rows = self._chunk_rows()
        buffer_shape = (_round_up(self.chunk_rows, ROW_MULTIPLE), _round_up(self.vocab, PITCH))
        self.buffer = input.new_empty(buffer_shape, dtype=self.dtype)
        self.grad_weight = gradients.weight
        one_chunk = self.chunk_rows >= self.count and gradients.weight.dtype == self.dtype
        if wanted.weight and not one_chunk and gradients.weight.dtype != accumulation_dtype(self.dtype):
            acc = accumulation_dtype(self.dtype)
            self.grad_weight = torch.empty_like(gradients.weight, dtype=acc)
        self.grad_input = gradients.input
        if wanted.input and (self.index is not None or input.dtype != self.dtype):
            self.grad_input = self.input.new_empty((_round_up(self.count, ROW_MULTIPLE), input.shape[1]))
        self.first = True

    def __iter__(self):
        for begin in range(0, self.count, max(self.chunk_rows, 1)):
            rows = slice(begin, min(begin + self.chunk_rows, self.count))
            self.rows = rows

            def take(values: Tensor, rows: slice = rows) -> Tensor:
                return values[rows] if self.index is None else values[self.index[rows]]

            yield self.input[rows], self.target[rows], take

    def _chunk_rows(self) -> int:
        """Equal chunks whose logits fit the workspace. In half precision that is at least as large as the accumulator
        of the weight's gradient, which is read and written once for each chunk."""
        size = WORKSPACE_BYTES.get(self.input.device.type, WORKSPACE_BYTES["cuda"])
        if self.wanted.weight and self.dtype.itemsize == 2:
            size = max(size, 4 * self.weight.numel())
        fit = max(size // (self.vocab * self.dtype.itemsize), ROW_MULTIPLE)
        chunks = max(-(-self.count // fit), 1)
        return min(_round_up(-(-self.count // chunks), ROW_MULTIPLE), self.count)

    def logits(self, x: Tensor) -> Tensor:
        out = self.buffer[: x.shape[0], : self.vocab]
        return torch.mm(x, self.weight.t(), out=out)

    def accumulate(self, grad_logits: Tensor, x: Tensor) -> None:
        """Adds the chunk's part of every gradient that is wanted."""
        if self.wanted.input:
            out = self.grad_input[self.rows.start : self.rows.start + _round_up(len(x), ROW_MULTIPLE)]
            torch.mm(self.buffer[: len(out), : self.vocab], self.weight, out=out)
        if self.wanted.weight:
            self._add_product(self.grad_weight, grad_logits, x)
        if self.wanted.bias:
            part = grad_logits.sum(0, dtype=self.gradients.bias.dtype)
            self.gradients.bias.copy_(part) if self.first else self.gradients.bias.add_(part)
        self.first = False

    def _add_product(self, total: Tensor, grad_logits: Tensor, x: Tensor) -> None:
        """total = (0 if first else total) + grad_logits.T @ x."""
        half = grad_logits.dtype.itemsize == 2
        if not half:
            torch.addmm(total, grad_logits.t(), x, beta=0 if self.first else 1, out=total)
            return
        direct = total.dtype == grad_logits.dtype
        out_dtype = {"out_dtype": total.dtype} if total.is_cuda and not direct else {}
        step = total.shape[0] if total.is_cuda and direct else VOCAB_BLOCK
        part = None if direct or total.is_cuda else x.new_empty((step, x.shape[1]))
        for begin in range(0, total.shape[0], step):
            block = total[begin : begin + step]
            grads = grad_logits[:, begin : begin + step].t()
            if direct:
                torch.mm(grads, x, out=block)
            else:
                out = {} if part is None else {"out": part[: block.shape[0]]}
                self.kernels.add(block, torch.mm(grads, x, **out_dtype, **out), self.first)

    def finish(self) -> None:
        """Applies logit_scale and puts the rows back in their places."""
        gradients, scale = self.gradients, self.options.logit_scale
        if self.first:
            for gradient in (self.grad_weight, gradients.bias):
                gradient.zero_()
        if self.wanted.weight and scale != 1.0:
            self.grad_weight.mul_(scale)
        if self.grad_weight is not gradients.weight:
            self.kernels.add(gradients.weight, self.grad_weight, True)
        if not self.wanted.input:
            return
        if scale != 1.0:
            self.grad_input.mul_(scale)
        if self.index is not None:
            valid_rows = self.grad_input[: self.count].to(gradients.input.dtype)
            gradients.input.zero_().index_copy_(0, self.index, valid_rows)
        elif self.grad_input is not gradients.input:
            gradients.input.copy_(self.grad_input[: self.count])

    def spread(self, parts: list[RowOutputs], stats: bool) -> RowOutputs:
        """The outputs of all rows; those of ignored rows as the row kernels give them."""
        if self.index is None and len(parts) == 1:
            return parts[0]
        result = empty_outputs(self.input, self.total, stats)
        if self.index is None:
            for name, out in result._asdict().items():
                if out.numel():
                    torch.cat([getattr(part, name) for part in parts], out=out)
            return result
        for (name, out), ignored in zip(result._asdict().items(), (0, 0, 1, 0, -1, 0), strict=True):
            out.fill_(ignored)
            if out.numel() and parts:
                out.index_copy_(0, self.index, torch.cat([getattr(part, name) for part in parts]))
        return result


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _valid_index(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that are not ignored; None for all of them, and while a CUDA graph is captured: their number is not
    known there without a synchronisation."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    index = (target != ignore_index).nonzero().squeeze(1)
    return None if index.numel() == target.numel() else index
