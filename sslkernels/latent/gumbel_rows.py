"""Gumbel-softmax over rows: the mechanism that `gumbel_softmax` and `gumbel_quantize` share.

A backend is a `GumbelRows`: kernels over rows of logits that generate their noise while they read. With noise g (none
without a seed) and s = logits + g, the state of a row is its maximum and the sum of exp((s - maximum) / tau), and

    y = exp((s - maximum) / tau) / sum            index = the lowest with s = maximum

s is one addition in the accumulation dtype, so that the index is the same on every backend. A row that holds NaN or
+inf, or nothing but -inf, has the sum NaN, and y and gradients that are NaN; its index ignores NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.core.autograd import contiguous_rows
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.random import transforms
from sslkernels.random.philox import random_words

NONE, SOFT, HARD = 0, 1, 2  # which y the forward writes, in the order of csrc/latent/gumbel.h
NATIVE_OPS = ("gumbel_rows_fwd", "gumbel_rows_bwd", "probability_sums")


class NoisyLogits(NamedTuple):
    """Logits; the seed of the noise that is added to them (None: no noise); the number of each row for the noise, or
    None if that is its index; and 1 / tau (0-d float64)."""

    logits: Tensor
    seed: Tensor | None
    row_ids: Tensor | None
    inverse_tau: Tensor

    def rows(self, first: int, last: int) -> NoisyLogits:
        """Rows [first, last) of a matrix of logits, with their noise."""
        if first == 0 and last == self.logits.shape[0]:
            return self
        ids = self.row_ids
        ids = torch.arange(first, last, device=self.logits.device) if ids is None else ids[first:last]
        return self._replace(logits=self.logits[first:last], row_ids=ids)


class State(NamedTuple):
    """max and sum of each row, (rows,) in the accumulation dtype."""

    max: Tensor
    sum: Tensor


class RowOutputs(NamedTuple):
    """What a forward fills; None if not wanted. index: of the maximum of s; best and softmax_state: index and state
    without noise and with tau 1."""

    y: Tensor | None
    index: Tensor | None
    state: State
    best: Tensor | None = None
    softmax_state: State | None = None


class RowGrads(NamedTuple):
    """Gradients that reach the rows. y: with respect to y, in the dtype of the logits or in the accumulation dtype;
    usage (groups, V): with respect to the sum of softmax(logits) over the rows in `mask` (None: all), where row i
    belongs to group i % groups."""

    y: Tensor | None
    usage: Tensor | None
    mask: Tensor | None


NO_STATE = State(None, None)


def as_matrix(tensor: Tensor) -> Tensor:
    """The rows of the last dimension, which is contiguous: a view if there is one."""
    return contiguous_rows(tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]))


class GumbelRows:
    """One backend's kernels. Logits and gradients of y are matrices whose columns are contiguous."""

    def forward(self, source: NoisyLogits, output: int, filled: RowOutputs) -> None:
        """Fills the tensors of `filled`; y according to output: SOFT, the probabilities, or HARD, the one-hot."""
        raise NotImplementedError

    def backward(
        self,
        grads: RowGrads,
        source: NoisyLogits,
        state: State | None,
        softmax_state: State | None,
        grad_logits: Tensor,
    ) -> None:
        """Fills grad_logits, which may be grads.y, with y * (g - <g, y>) / tau for g = grads.y, plus
        p * (u - <u, p>) for p = softmax(logits) and the rows u of grads.usage."""
        raise NotImplementedError

    def probability_sums(self, logits: Tensor, softmax_state: State, mask: Tensor | None, groups: int) -> Tensor:
        """The sum of softmax(logits) over the rows in `mask`, (groups, V): row i belongs to group i % groups."""
        rows, columns = logits.shape
        chunk = chunk_rows(rows // groups, self.sum_chunks(logits, groups))
        partial = softmax_state.sum.new_empty(-(-rows // (chunk * groups)), groups, columns)
        if rows > 0:
            self.add_probabilities(logits, softmax_state, mask, partial, chunk)
        return partial.sum(0)

    def sum_chunks(self, logits: Tensor, groups: int) -> int:
        """About how many partial sums `add_probabilities` computes in parallel."""
        raise NotImplementedError

    def add_probabilities(
        self, logits: Tensor, softmax_state: State, mask: Tensor | None, partial: Tensor, chunk: int
    ) -> None:
        """Fills partial (chunks, groups, V), the sums over `chunk` rows of a group each."""
        raise NotImplementedError


def perturbed(source: NoisyLogits) -> Tensor:
    """s = logits + noise in the accumulation dtype."""
    logits = source.logits
    wide = logits.to(accumulation_dtype(logits.dtype))
    if source.seed is None:
        return wide
    rows, columns = logits.shape
    ids = source.row_ids
    if ids is None:
        ids = torch.arange(rows, device=logits.device)
    # Whole groups of words: the number of columns determines the group numbers.
    words = random_words(source.seed, ids, rows, (columns + 3) // 4 * 4, 0)
    return wide + transforms.gumbel(words)[:, :columns]


class ReferenceGumbelRows(GumbelRows):
    """Plain torch."""

    def forward(self, source, output, filled):
        s = perturbed(source)
        self._reduce(s, source.inverse_tau, filled.index, filled.state)
        if filled.softmax_state is not None:
            self._reduce(source.logits.to(s.dtype), None, filled.best, filled.softmax_state)
        if output == SOFT:
            filled.y.copy_(self._soft(s, source.inverse_tau, filled.state))
        elif output == HARD:
            where = s.masked_fill(s.isnan(), -torch.inf).argmax(1, keepdim=True)
            filled.y.zero_().scatter_(1, where, 1).masked_fill_(filled.state.sum.isnan()[:, None], torch.nan)

    def backward(self, grads, source, state, softmax_state, grad_logits):
        total = 0
        if grads.y is not None:
            y = self._soft(perturbed(source), source.inverse_tau, state)
            grad = grads.y.to(y.dtype)
            total = y * (grad - (grad * y).sum(1, keepdim=True)) * source.inverse_tau.to(y.dtype)
        if grads.usage is not None:
            p = self._soft(source.logits.to(grads.usage.dtype), None, softmax_state)
            usage = grads.usage.repeat(p.shape[0] // max(grads.usage.shape[0], 1), 1)
            part = p * (usage - (usage * p).sum(1, keepdim=True))
            total = total + (part if grads.mask is None else part.masked_fill(~grads.mask[:, None], 0))
        grad_logits.copy_(total)

    def probability_sums(self, logits, softmax_state, mask, groups):
        p = self._soft(logits.to(softmax_state.sum.dtype), None, softmax_state)
        if mask is not None:
            p = p.masked_fill(~mask[:, None], 0)
        return p.reshape(p.shape[0] // groups, groups, p.shape[1]).sum(0)

    @staticmethod
    def _exp(s: Tensor, inverse_tau: Tensor | None, largest: Tensor) -> Tensor:
        distance = s - largest[:, None]
        return (distance if inverse_tau is None else distance * inverse_tau.to(s.dtype)).exp()

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

    def forward(self, source, output, filled):
        if source.logits.shape[0] == 0:
            return
        y, index, state, best, softmax_state = filled
        logits, seed, row_ids, inverse_tau = source
        torch.ops.sslkernels_native.gumbel_rows_fwd(
            logits, seed, row_ids, 0, inverse_tau, output, y, index, *state, best, *(softmax_state or NO_STATE)
        )

    def backward(self, grads, source, state, softmax_state, grad_logits):
        if source.logits.shape[0] == 0:
            return
        logits, seed, row_ids, inverse_tau = source
        states = (*(state or NO_STATE), *(softmax_state or NO_STATE))
        torch.ops.sslkernels_native.gumbel_rows_bwd(*grads, logits, seed, row_ids, 0, inverse_tau, *states, grad_logits)

    def sum_chunks(self, logits, groups):
        # On a GPU a thread sums four columns of a chunk, and 2**17 threads fill the GPU.
        return max(64, 2**17 // (groups * logits.shape[1] // 4 + 1)) if logits.is_cuda else 64

    def add_probabilities(self, logits, softmax_state, mask, partial, chunk):
        torch.ops.sslkernels_native.probability_sums(logits, *softmax_state, mask, partial, chunk)


class TritonGumbelRows(GumbelRows):
    """The Triton kernels, imported at the first call."""

    def forward(self, source, output, filled):
        from sslkernels.latent.triton.gumbel_rows import gumbel_rows_fwd

        gumbel_rows_fwd(source, output, filled)

    def backward(self, grads, source, state, softmax_state, grad_logits):
        from sslkernels.latent.triton.gumbel_rows import gumbel_rows_bwd

        gumbel_rows_bwd(grads, source, state or NO_STATE, softmax_state or NO_STATE, grad_logits)

    def sum_chunks(self, logits, groups):
        from sslkernels.latent.triton.gumbel_rows import sum_chunks

        return sum_chunks(logits, groups)

    def add_probabilities(self, logits, softmax_state, mask, partial, chunk):
        from sslkernels.latent.triton.gumbel_rows import probability_sums

        probability_sums(logits, softmax_state, mask, partial, chunk)


def chunk_rows(rows: int, chunks: int) -> int:
    """Rows of a group that `probability_sums` adds to one partial sum, for about `chunks` of them: at least 8, so that
    the partial sums are small beside the logits, and at most 512, few enough for float32."""
    return max(8, min(512, -(-rows // chunks)))


def implementations(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`function` with the kernels of each backend as its first argument."""
    native = partial(function, NativeGumbelRows())
    return {
        "reference": partial(function, ReferenceGumbelRows()),
        "cpu": native,
        "triton": partial(function, TritonGumbelRows()),
        "cuda": native,
    }
