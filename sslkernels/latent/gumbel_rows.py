"""Gumbel-softmax over rows: the mechanism that `gumbel_softmax` and `gumbel_quantize` share.

A backend is a `GumbelRows`: kernels over rows of logits that make their noise while they read. With noise g (none where
there is no seed) and s = logits + g, the state of a row is its maximum and the sum of exp((s - maximum) / tau), and

    y = exp((s - maximum) / tau) / sum            index = the lowest with s = maximum

s is one addition in the accumulation dtype, so that the index is the same on every backend. A row that holds NaN or
+inf, or nothing but -inf, has the sum NaN, and y and gradients that are NaN; its index ignores NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.random import transforms
from sslkernels.random.philox import random_words

NONE, SOFT, HARD = 0, 1, 2  # what y is, in the order of csrc/common/gumbel.h
NATIVE_OPS = ("gumbel_rows_fwd", "gumbel_rows_bwd", "probability_sums")


class State(NamedTuple):
    """In the accumulation dtype, (rows,)."""

    max: Tensor
    sum: Tensor


class Stream(NamedTuple):
    """Noise of rows: seed None is no noise; row i has the number row_ids[i], or first_row + i."""

    seed: Tensor | None
    row_ids: Tensor | None
    first_row: int = 0

    def rows(self, first: int, last: int) -> Stream:
        """That of the rows [first, last)."""
        ids = None if self.row_ids is None else self.row_ids[first:last]
        return Stream(self.seed, ids, self.first_row + first)


class GumbelRows:
    """One backend's kernels. Logits and gradients of y are matrices with unit stride in their last dimension."""

    def forward(
        self,
        logits: Tensor,
        stream: Stream,
        inverse_tau: Tensor | None,
        output: int,
        y: Tensor | None,
        index: Tensor | None,
        state: State,
        best: Tensor | None = None,
        plain: State | None = None,
    ) -> None:
        """Fills y (none, the probabilities or the one-hot), index and state; best and plain are those without noise
        and with tau 1. inverse_tau: 0-d float64."""
        raise NotImplementedError

    def backward(
        self,
        grad: Tensor | None,
        uses: Tensor | None,
        mask: Tensor | None,
        logits: Tensor,
        stream: Stream,
        inverse_tau: Tensor | None,
        state: State | None,
        plain: State | None,
        grad_logits: Tensor,
    ) -> None:
        """Fills grad_logits with y * (grad - <grad, y>) / tau, plus p * (uses - <uses, p>) of the rows in `mask`, where
        p = softmax(logits) and row i has uses[i % groups]. `grad` is in the dtype of logits or in the accumulation
        dtype, and may be `grad_logits`."""
        raise NotImplementedError

    def probability_sums(self, logits: Tensor, plain: State, mask: Tensor | None, groups: int) -> Tensor:
        """The sum of softmax(logits) over the rows in `mask`, (groups, V): row i belongs to group i % groups."""
        raise NotImplementedError


def perturbed(logits: Tensor, stream: Stream) -> Tensor:
    """logits + noise in the accumulation dtype."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    if stream.seed is None:
        return wide
    rows, columns = logits.shape
    ids = stream.row_ids
    if ids is None:
        ids = torch.arange(stream.first_row, stream.first_row + rows, device=logits.device)
    # The words of whole groups: fewer columns would have other group numbers.
    words = random_words(stream.seed, ids, rows, (columns + 3) // 4 * 4, 0)
    return wide + transforms.gumbel(words)[:, :columns]


class ReferenceGumbelRows(GumbelRows):
    """Plain torch."""

    def forward(self, logits, stream, inverse_tau, output, y, index, state, best=None, plain=None):
        s = perturbed(logits, stream)
        self._reduce(s, inverse_tau, index, state)
        if plain is not None:
            self._reduce(logits.to(s.dtype), None, best, plain)
        if output == SOFT:
            y.copy_(self._soft(s, inverse_tau, state))
        elif output == HARD:
            where = s.masked_fill(s.isnan(), -torch.inf).argmax(1, keepdim=True)
            y.zero_().scatter_(1, where, 1).masked_fill_(state.sum.isnan()[:, None], torch.nan)

    def backward(self, grad, uses, mask, logits, stream, inverse_tau, state, plain, grad_logits):
        total = 0
        if grad is not None:
            y = self._soft(perturbed(logits, stream), inverse_tau, state)
            grad = grad.to(y.dtype)
            total = y * (grad - (grad * y).sum(1, keepdim=True)) * inverse_tau.to(y.dtype)
        if uses is not None:
            p = self._soft(logits.to(uses.dtype), None, plain)
            uses = uses.repeat(p.shape[0] // max(uses.shape[0], 1), 1)
            of_uses = p * (uses - (uses * p).sum(1, keepdim=True))
            total = total + (of_uses if mask is None else of_uses.masked_fill(~mask[:, None], 0))
        grad_logits.copy_(total)

    def probability_sums(self, logits, plain, mask, groups):
        p = self._soft(logits.to(plain.sum.dtype), None, plain)
        if mask is not None:
            p = p.masked_fill(~mask[:, None], 0)
        return p.reshape(p.shape[0] // groups, groups, p.shape[1]).sum(0)

    @staticmethod
    def _exp(s: Tensor, inverse_tau: Tensor | None, largest: Tensor) -> Tensor:
        behind = s - largest[:, None]
        return (behind if inverse_tau is None else behind * inverse_tau.to(s.dtype)).exp()

    def _soft(self, s: Tensor, inverse_tau: Tensor | None, state: State) -> Tensor:
        return self._exp(s, inverse_tau, state.max) / state.sum[:, None]

    def _reduce(self, s: Tensor, inverse_tau: Tensor | None, index: Tensor | None, state: State) -> None:
        if s.shape[0] == 0:
            return
        largest, where = s.masked_fill(s.isnan(), -torch.inf).max(1)
        state.max.copy_(largest)
        state.sum.copy_(self._exp(s, inverse_tau, largest).sum(1))
        if index is not None:
            index.copy_(where)


class NativeGumbelRows(GumbelRows):
    """The compiled kernels, on a CPU and on CUDA."""

    def forward(self, logits, stream, inverse_tau, output, y, index, state, best=None, plain=None):
        if logits.shape[0] == 0:
            return
        plain = (None, None) if plain is None else plain
        torch.ops.sslkernels_native.gumbel_rows_fwd(
            logits, *stream, inverse_tau, output, y, index, *state, best, *plain
        )

    def backward(self, grad, uses, mask, logits, stream, inverse_tau, state, plain, grad_logits):
        if logits.shape[0] == 0:
            return
        state, plain = ((None, None) if s is None else s for s in (state, plain))
        torch.ops.sslkernels_native.gumbel_rows_bwd(
            grad, uses, mask, logits, *stream, inverse_tau, *state, *plain, grad_logits
        )

    def probability_sums(self, logits, plain, mask, groups):
        rows, columns = logits.shape
        # On a GPU a thread has four columns of a chunk, and 2**17 threads fill it.
        chunk = chunk_rows(rows // groups, max(64, 2**17 // (groups * columns // 4 + 1)) if logits.is_cuda else 64)
        partial = plain.sum.new_empty(-(-rows // (chunk * groups)), groups, columns)
        if rows > 0:
            torch.ops.sslkernels_native.probability_sums(logits, *plain, mask, partial, chunk)
        return partial.sum(0)


def chunk_rows(rows: int, chunks: int) -> int:
    """Rows of a group in a chunk of `probability_sums`, about `chunks` of them: at least 8, so that the sums of chunks
    are small beside the logits, and at most 512, whose sum is in float32."""
    return max(8, min(512, -(-rows // chunks)))


def triton_rows() -> GumbelRows:
    from sslkernels.latent.triton.gumbel_rows import TritonGumbelRows

    return TritonGumbelRows()
