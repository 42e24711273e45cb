"""Cross-entropy of rows of logits against class probabilities: the row loss, in plain torch and by Triton.

For transformed logits z as in `softmax_rows`, given probabilities p, class weights w and label smoothing s:

    q_j = w_j ((1 - s) p_j + s / V)        loss = sum_j q_j (lse - z_j) + z_loss lse^2

The gradient with respect to l is (sum_j q_j + 2 z_loss lse) softmax(z) - q. Plain torch, which the compiled extension
runs too, takes blocks of a few rows: their intermediate results stay in the cache, and the matmul that made the logits
is many times the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.vocabulary.softmax_rows import RowOptions, Rows, RowState, TritonRows, empty_outputs, transform

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


class _Block(NamedTuple):
    """z, dz/dl if there is a softcap, and q, of a block of rows."""

    z: Tensor
    slope: Tensor | None
    q: Tensor


class ProbabilityOperands(NamedTuple):
    """Logits (N, V), class probabilities (N, V), bias (V,), class weights (V,); the number of classes of the whole
    vocabulary; the options."""

    logits: Tensor
    target: Tensor
    bias: Tensor | None
    weight: Tensor | None
    classes: int
    options: RowOptions


class ProbabilityRows(Rows):
    """`target` holds class probabilities (N, V) of any float dtype. The field `logprob` of the outputs and of the state
    is the sum of q. The logits may be overwritten, also without a gradient. classes: of the whole vocabulary, where
    the logits are a slice."""

    def __init__(self, classes: int | None = None) -> None:
        self.classes = classes

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        outputs = empty_outputs(logits, logits.shape[0], False)
        for rows in blocks_of(logits):
            z, slope, q = self._block(logits[rows], target[rows], bias, weight, options)
            row_max, largest = z.max(1, keepdim=True)
            shifted = z.sub_(row_max)
            total = q.sum(1)
            to_max = torch.mul(q, shifted).masked_fill_(q == 0, 0).sum(1)  # 0 where a logit is -inf and q is 0
            exp = shifted.exp_()
            # The sum leaves the largest term, 1, out and adds it last. An infinite maximum makes the row NaN.
            others = exp.scatter_(1, largest, 0).sum(1) + (row_max - row_max).squeeze(1)
            exp.scatter_(1, largest, 1)
            log_sum = torch.log1p(others)
            loss = total * log_sum - to_max
            if options.z_loss > 0:
                loss += options.z_loss * (row_max.squeeze(1) + log_sum).square()
            state = RowState(row_max.squeeze(1), 1 + others, total)
            for out, values in zip(outputs, (loss, *state), strict=False):
                out[rows] = values
            if grad is not None:
                _write(exp, q, slope, options, state, coefficient[rows], grad[rows])
        return outputs

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        for rows in blocks_of(logits):
            z, slope, q = self._block(logits[rows], target[rows], bias, weight, options)
            part = RowState(*(values[rows] for values in state))
            exp = z.sub_(part.row_max.unsqueeze(1)).exp_()
            _write(exp, q, slope, options, part, coefficient[rows], grad[rows])

    def _block(
        self, logits: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, options: RowOptions
    ) -> _Block:
        z, slope = transform(logits, bias, options)
        q = target.to(z.dtype)
        if options.label_smoothing > 0:
            q = q * (1 - options.label_smoothing) + options.label_smoothing / (self.classes or z.shape[1])
        return _Block(z, slope, q if weight is None else q * weight.to(z.dtype))


class TritonProbabilityRows(ProbabilityRows):
    """One program per row."""

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        from sslkernels.vocabulary.triton.probability_rows import probability_rows_fwd

        outputs = empty_outputs(logits, logits.shape[0], False)
        operands = ProbabilityOperands(logits, target, bias, weight, self.classes or logits.shape[1], options)
        probability_rows_fwd(operands, coefficient, outputs, grad)
        return outputs

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        from sslkernels.vocabulary.triton.probability_rows import probability_rows_bwd

        operands = ProbabilityOperands(logits, target, bias, weight, self.classes or logits.shape[1], options)
        probability_rows_bwd(operands, coefficient, state, grad)


def probability_rows(rows: Rows, classes: int | None = None) -> ProbabilityRows:
    """The row kernels for class probabilities of the backend whose kernels for class indices are `rows`."""
    return (TritonProbabilityRows if isinstance(rows, TritonRows) else ProbabilityRows)(classes)


def blocks_of(logits: Tensor) -> Iterator[slice]:
    count, vocab = logits.shape
    step = max(BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS["cuda"]) // vocab, 1)
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def _write(
    exp: Tensor,
    q: Tensor,
    slope: Tensor | None,
    options: RowOptions,
    state: RowState,
    coefficient: Tensor,
    grad: Tensor,
) -> None:
    """Fills grad, which may be the memory of exp, from exp = exp(z - row_max)."""
    factor = state.logprob
    if options.z_loss > 0:
        factor = factor + 2 * options.z_loss * (state.row_max + state.sum_exp.log())
    coefficient = coefficient.to(exp.dtype)
    result = exp.mul_((factor / state.sum_exp * coefficient).unsqueeze(1))
    result.addcmul_(q, coefficient.unsqueeze(1), value=-1)
    if slope is not None:
        result.mul_(slope)
    grad.copy_(result)
