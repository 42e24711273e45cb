"""Linear cross-entropy in chunks of rows: the plan of every backend but the reference.

Rows that are ignored are left out first. Then, chunk by chunk: logits = input @ linear_weight.T into a buffer that is
reused, one pass of the backend's row kernel that turns it into losses and, in place, the gradient of the logits, and
the matmuls of the gradients. The buffer's row pitch is a multiple of 64 elements, so that a vocabulary of any size has
aligned rows. The weight's gradient accumulates over chunks in float32.

In float16 the gradient of the logits is held divided by the largest coefficient of a row, which is returned: a loss
divided by a large batch would vanish in its subnormals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.ops.rows import RowOptions, RowOutputs, Rows, accumulation_dtype, empty_outputs

# Bytes of the logits buffer. CPU: measured, smaller ones make the weight's gradient wait for memory. CUDA: the bound
# of the documented peak memory.
WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
PITCH = 64
# Rows of the vocabulary whose weight gradient is added at a time where a matmul cannot accumulate in float32 itself:
# the partial product stays in the last-level cache.
VOCAB_BLOCK = 8192


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Of the input (N, D) in its dtype, of the weight (V, D) and bias (V,) in the accumulation dtype; empty if not
    wanted. The true gradients are these times `scale` (0-d)."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor


def empty_gradients(input: Tensor, linear_weight: Tensor, wanted: Wanted) -> Gradients:
    acc = accumulation_dtype(input.dtype)
    return Gradients(
        input.new_empty(input.shape if wanted.input else (0, 0)),
        linear_weight.new_empty(linear_weight.shape if wanted.weight else (0, 0), dtype=acc),
        linear_weight.new_empty(linear_weight.shape[0] if wanted.bias else 0, dtype=acc),
        input.new_empty((), dtype=acc),
    )


def normalise(coefficient: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """(coefficient / scale, scale), with scale 1 unless one of `dtypes` is float16."""
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
    chunks = _Chunks(rows, input, linear_weight, target, compute_dtype, options, wanted, gradients)
    parts: list[RowOutputs] = []
    if any(wanted):
        assert coefficient is not None
        coefficient, scale = normalise(coefficient, input.dtype, compute_dtype)
        gradients.scale.copy_(scale)
    else:
        gradients.scale.fill_(1)
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
    # Ignored rows are left out of the scale: their gradient may be anything (0 / 0 where no row is valid).
    grad_loss = torch.where(target != options.ignore_index, grad_loss, 0)
    coefficient, scale = normalise(grad_loss, input.dtype, compute_dtype)
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
        self.chunk_rows = _chunk_rows(self.count, self.vocab, self.dtype, input.device.type)
        pitch = -(-self.vocab // PITCH) * PITCH
        self.buffer = rows.fresh(input.new_empty((self.chunk_rows, pitch), dtype=self.dtype))
        rows.fresh(gradients.weight)
        in_place = self.index is None and input.dtype == self.dtype
        self.grad_input = gradients.input if in_place else torch.empty_like(self.input) if wanted.input else None
        self.first = True

    def __iter__(self):
        for begin in range(0, self.count, max(self.chunk_rows, 1)):
            rows = slice(begin, min(begin + self.chunk_rows, self.count))
            self.rows = rows

            def take(values: Tensor, rows: slice = rows) -> Tensor:
                return values[rows] if self.index is None else values[self.index[rows]]

            yield self.input[rows], self.target[rows], take

    def logits(self, x: Tensor) -> Tensor:
        out = self.buffer[: x.shape[0], : self.vocab]
        return torch.mm(x, self.weight.t(), out=out)

    def accumulate(self, grad_logits: Tensor, x: Tensor) -> None:
        """Adds the chunk's part of every gradient that is wanted."""
        if self.wanted.input:
            torch.mm(grad_logits, self.weight, out=self.grad_input[self.rows])
        if self.wanted.weight:
            self._add_product(self.gradients.weight, grad_logits, x)
        if self.wanted.bias:
            part = grad_logits.sum(0, dtype=self.gradients.bias.dtype)
            self.gradients.bias.copy_(part) if self.first else self.gradients.bias.add_(part)
        self.first = False

    def _add_product(self, total: Tensor, grad_logits: Tensor, x: Tensor) -> None:
        """total = (0 if first else total) + grad_logits.T @ x, accumulated in the dtype of `total`."""
        if grad_logits.dtype == total.dtype:
            torch.addmm(total, grad_logits.t(), x, beta=0 if self.first else 1, out=total)
            return
        out_dtype = {"out_dtype": total.dtype} if total.is_cuda else {}
        for begin in range(0, total.shape[0], VOCAB_BLOCK):
            block = slice(begin, begin + VOCAB_BLOCK)
            self.kernels.add(total[block], torch.mm(grad_logits[:, block].t(), x, **out_dtype), self.first)

    def finish(self) -> None:
        """Applies logit_scale and puts the rows back in their places."""
        gradients, scale = self.gradients, self.options.logit_scale
        if self.first:
            for gradient in (gradients.weight, gradients.bias):
                gradient.zero_()
        if self.wanted.weight and scale != 1.0:
            gradients.weight.mul_(scale)
        if not self.wanted.input:
            return
        if scale != 1.0:
            self.grad_input.mul_(scale)
        if self.index is not None:
            gradients.input.zero_().index_copy_(0, self.index, self.grad_input.to(gradients.input.dtype))
        elif self.grad_input is not gradients.input:
            gradients.input.copy_(self.grad_input)

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


def _valid_index(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that are not ignored; None for all of them, and while a CUDA graph is captured: their number is not
    known there without a synchronisation."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    index = (target != ignore_index).nonzero().squeeze(1)
    return None if index.numel() == target.numel() else index


def _chunk_rows(count: int, vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Equal chunks whose logits fit the workspace."""
    fit = max(WORKSPACE_BYTES.get(device_type, WORKSPACE_BYTES["cuda"]) // (max(vocab, 1) * dtype.itemsize), 16)
    chunks = max(-(-count // fit), 1)
    rows = -(-count // chunks)
    return min(-(-rows // 16) * 16, count)
