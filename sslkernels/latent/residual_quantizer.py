"""Residual vector quantisation: each codebook quantises the residual that the ones before it leave."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.core.autograd import Function
from sslkernels.latent.quantizers import VectorQuantizer, codes_of
from sslkernels.random.seeds import wrap_int64

NAME = "ResidualVectorQuantizer"


class ResidualQuantized(NamedTuple):
    """The codes of the rows of an input `(..., D)`, of L levels.

    values: the sum of a row's codes, in the shape and dtype of the input.
    indices: `(..., L)`, int64, the index of each level's code.
    commitment: 0-d, the mean over levels of the mean squared difference of a level's residual and code.
    usage: `(L, K)`, int64, the number of rows with each code.
    """

    values: Tensor
    indices: Tensor
    commitment: Tensor
    usage: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of each level's `usage`, `(L,)` float32, from 1 (collapse) to K."""
        frequency = self.usage.float() / self.usage.sum(1, keepdim=True)
        return torch.special.entr(frequency).sum(1).exp()


class ResidualVectorQuantizer(nn.Module):
    """A sum of codes of several codebooks: each level is a `VectorQuantizer` of what the levels before it left.

    `values` is the sum of the codes, with one straight-through gradient to the input. `commitment` has the gradients of
    each level's: to the input through its residual, whose codes are constants, and with `decay=None` to the level's own
    codebook. Each level starts from its residuals of the first batch, moves its averages and revives its dead codes as
    `VectorQuantizer` does, over the ranks of `process_group`. Level l draws with seed + l.

    Args:
        num_levels: the number of codebooks.
        num_codes: the number of codes of each.
        dim: the size of a code.
        **options: of each `VectorQuantizer`; `init` is a name, or codes `(num_levels, num_codes, dim)`.

    Forward takes `(..., dim)` and `mask`, `(...)` bool, as there, and returns `ResidualQuantized`. Residuals are in the
    dtype of the codebooks, whatever the dtype of the input is.

    Source: Zeghidour et al., "SoundStream: an end-to-end neural audio codec", 2021.

    >>> import sslkernels as sk
    >>> quantizer = sk.nn.ResidualVectorQuantizer(4, 256, 16)
    >>> x = torch.randn(8, 100, 16, requires_grad=True)
    >>> quantized = quantizer(x)
    >>> (quantized.values.square().mean() + 0.25 * quantized.commitment).backward()
    >>> coarse = quantizer.decode(quantized.indices[..., :2])
    """

    @checks.with_python_numbers
    def __init__(self, num_levels: int, num_codes: int, dim: int, **options: Any) -> None:
        super().__init__()
        checks.integer(NAME, "num_levels", num_levels, low=1)
        init, seed = options.pop("init", "data"), options.pop("seed", 0)
        inits = [init] * num_levels
        if isinstance(init, Tensor):
            checks.shape(NAME, "init", init, (num_levels, num_codes, dim), "(num_levels, num_codes, dim)")
            inits = list(init)
        seeds = [seed] * num_levels
        if isinstance(seed, int) and not isinstance(seed, bool):
            seeds = [wrap_int64((seed + level) % 2**64) for level in range(num_levels)]
        self.levels = nn.ModuleList(
            VectorQuantizer(num_codes, dim, init=inits[level], seed=seeds[level], **options)
            for level in range(num_levels)
        )

    def forward(self, input: Tensor, mask: Tensor | None = None) -> ResidualQuantized:
        first = self.levels[0]
        first._check_input(input, mask)
        residual = input.to(torch.promote_types(input.dtype, first.codebook.dtype))
        total, found = torch.zeros_like(residual), []
        for level in self.levels:
            quantized = level(residual, mask)
            found.append(quantized)
            code = quantized.values.detach()
            total, residual = total + code, residual - code
        indices, commitment, usage = (
            torch.stack([getattr(level, field) for level in found], dim)
            for field, dim in (("indices", -1), ("commitment", 0), ("usage", 0))
        )
        return ResidualQuantized(_StraightThrough.run(input, total), indices, commitment.mean(), usage)

    def decode(self, indices: Tensor) -> Tensor:
        """The sum of the codes of indices `(..., l)`, int32 or int64, of the first l levels: `(..., dim)`."""
        checks.tensor(NAME, "indices", indices, checks.INDEX_DTYPES)
        checks.dims(NAME, "indices", indices, 1, "(..., levels)")
        if not 1 <= indices.shape[-1] <= len(self.levels):
            must = f"have shape (..., levels) with levels from 1 to {len(self.levels)}"
            checks.fail(ValueError, NAME, "indices", must, tuple(indices.shape))
        total = None
        for index, level in zip(indices.unbind(-1), self.levels, strict=False):
            codes = codes_of(NAME, index, level.codebook)
            total = codes if total is None else total + codes
        return total


class _StraightThrough(Function):
    """values, with the gradient of the input: exact, where input + (values - input) would round."""

    @staticmethod
    def forward(input: Tensor, values: Tensor) -> Tensor:
        return values.to(input.dtype, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None
