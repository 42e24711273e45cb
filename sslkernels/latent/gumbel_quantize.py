"""Codes drawn from logits and looked up in a codebook: the quantizer of wav2vec 2.0 without its one-hot product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import (
    Function,
    contiguous_rows,
    empty_gradients,
    once_differentiable,
    save,
    saved,
    wanted_only,
)
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import operator
from sslkernels.latent.gumbel_rows import (
    NATIVE_OPS,
    NONE,
    GumbelRows,
    NoisyLogits,
    RowGrads,
    RowOutputs,
    State,
    as_matrix,
    implementations,
)
from sslkernels.latent.gumbel_softmax import gumbel_softmax_fwd, inverse_tau_tensor
from sslkernels.random.seeds import seed_tensor

NAME = "gumbel_quantize"
SMALLEST = 1e-7  # added to a probability before its logarithm, as in fairseq
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # bytes of the one-hot's gradient at a time


class GumbelQuantized(NamedTuple):
    """The drawn codes, and with `return_stats` two perplexities, 0-d, of all rows in the mask, summed over groups.

    values: `(..., G * D)`, the codes; without groups `(..., D)`.
    indices: `(..., G)`, int64; without groups `(...)`.
    code_perplexity: of the frequencies with which each code has the largest logit.
    prob_perplexity: of the mean of softmax(logits); differentiable.
    """

    values: Tensor
    indices: Tensor
    code_perplexity: Tensor | None = None
    prob_perplexity: Tensor | None = None


class CodeState(NamedTuple):
    """What backward needs of each row and group (N, G); see `Codes`."""

    index: Tensor
    max: Tensor
    sum: Tensor
    softmax_max: Tensor
    softmax_sum: Tensor

    @property
    def state(self) -> State:
        return State(self.max.flatten(), self.sum.flatten())

    @property
    def softmax_state(self) -> State:
        return State(self.softmax_max.flatten(), self.softmax_sum.flatten())


class Codes(NamedTuple):
    """For each row and group (N, G): the drawn index and the state of its row; with statistics (else without elements)
    the index of the largest logit and the state without noise. probability (G, V): with statistics the sum of
    softmax(logits)."""

    probability: Tensor
    index: Tensor
    max: Tensor
    sum: Tensor
    best: Tensor
    softmax_max: Tensor
    softmax_sum: Tensor

    @property
    def code_state(self) -> CodeState:
        return CodeState(self.index, self.max, self.sum, self.softmax_max, self.softmax_sum)


class OutputGrads(NamedTuple):
    """The gradients with respect to the values (N, G, D) and to `Codes.probability`; None if there is none."""

    values: Tensor | None
    probability: Tensor | None


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    logits: bool
    codebook: bool


class Gradients(NamedTuple):
    """In the shape and dtype of the input; without elements if not wanted."""

    logits: Tensor
    codebook: Tensor


def _empty_codes(logits: Tensor, stats: bool) -> Codes:
    rows, groups, codes = logits.shape
    acc = accumulation_dtype(logits.dtype)
    shape, stats_shape = (rows, groups), (rows, groups) if stats else 0
    return Codes(
        probability=logits.new_empty((groups, codes) if stats else 0, dtype=acc),
        index=logits.new_empty(shape, dtype=torch.int64),
        max=logits.new_empty(shape, dtype=acc),
        sum=logits.new_empty(shape, dtype=acc),
        best=logits.new_empty(stats_shape, dtype=torch.int64),
        softmax_max=logits.new_empty(stats_shape, dtype=acc),
        softmax_sum=logits.new_empty(stats_shape, dtype=acc),
    )


def _empty_gradients(logits: Tensor, codebook: Tensor, wanted: Wanted) -> Gradients:
    return Gradients(*empty_gradients((logits, codebook), wanted))


def _fwd(kernels: GumbelRows, source: NoisyLogits, mask: Tensor | None, stats: bool) -> Codes:
    codes = _empty_codes(source.logits, stats)
    groups = source.logits.shape[1]
    source = source._replace(logits=as_matrix(source.logits))
    filled = RowOutputs(None, codes.index.flatten(), codes.code_state.state)
    if not stats:
        kernels.forward(source, NONE, filled)
        return codes
    softmax_state = codes.code_state.softmax_state
    kernels.forward(source, NONE, filled._replace(best=codes.best.flatten(), softmax_state=softmax_state))
    return codes._replace(probability=kernels.probability_sums(source.logits, softmax_state, mask, groups))


def _bwd(
    sum_rows: Callable[..., None],
    kernels: GumbelRows,
    grads: OutputGrads,
    source: NoisyLogits,
    codebook: Tensor,
    mask: Tensor | None,
    codes: CodeState,
    wanted: Wanted,
) -> Gradients:
    gradients = _empty_gradients(source.logits, codebook, wanted)
    if wanted.codebook:
        _sum_rows_of_codes(sum_rows, grads.values, codes, gradients.codebook)
    if wanted.logits:
        _fill_grad_logits(kernels, grads, source, codebook, mask, codes, gradients.logits)
    return gradients


def _sum_rows_of_codes(
    sum_rows: Callable[..., None], grad_values: Tensor, codes: CodeState, grad_codebook: Tensor
) -> None:
    groups, count, dim = grad_codebook.shape
    keys = (codes.index + torch.arange(groups, device=codes.index.device) * count).flatten()
    # A row that is not finite has NaN values, and so makes the gradient of its code NaN.
    weight = torch.ones_like(codes.sum, dtype=accumulation_dtype(grad_codebook.dtype))
    weight = weight.masked_fill_(codes.sum.isnan(), torch.nan).flatten()
    sum_rows(keys, weight, grad_values.reshape(keys.numel(), dim), None, grad_codebook.view(groups * count, dim))


def _fill_grad_logits(
    kernels: GumbelRows,
    grads: OutputGrads,
    source: NoisyLogits,
    codebook: Tensor,
    mask: Tensor | None,
    codes: CodeState,
    grad_logits: Tensor,
) -> None:
    """Block by block of rows: the gradient of the one-hot, grad_values @ codebook.T, in a buffer or, if the dtypes
    allow, in grad_logits itself, and from it the gradient of the logits."""
    rows, groups, count = source.logits.shape
    source = source._replace(logits=as_matrix(source.logits))
    filled = grad_logits.view(-1, count)
    softmax_state = codes.softmax_state if grads.probability is not None else None
    if grads.values is None or source.seed is None:
        kernels.backward(RowGrads(None, grads.probability, mask), source, None, softmax_state, filled)
        return
    state, acc = codes.state, codes.sum.dtype
    in_place = grad_logits.dtype == acc
    block = _block_rows(grad_logits, acc, in_place)
    buffer = None if in_place else codes.sum.new_empty(min(block, rows), groups, count)
    factor = codebook if _multiplies_half_into_float(grads.values, acc) else codebook.to(acc)
    for first in range(0, rows, block):
        last = min(first + block, rows)
        grad = grad_logits[first:last] if in_place else buffer[: last - first]
        _multiply(grads.values[first:last], factor, grad)
        part = slice(first * groups, last * groups)
        kernels.backward(
            RowGrads(grad.view(-1, count), grads.probability, None if mask is None else mask[part]),
            source.rows(part.start, part.stop),
            State(state.max[part], state.sum[part]),
            None if softmax_state is None else State(softmax_state.max[part], softmax_state.sum[part]),
            filled[part],
        )


def _block_rows(logits: Tensor, dtype: torch.dtype, in_place: bool) -> int:
    """Rows per block. On a GPU all rows if no buffer is needed; on a CPU few enough that a block stays in the cache
    between its two uses."""
    if in_place and logits.device.type != "cpu":
        return max(logits.shape[0], 1)
    row_bytes = logits.shape[1] * logits.shape[2] * dtype.itemsize
    return max(BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"]) // row_bytes, 16)


def _multiplies_half_into_float(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch.mm takes half precision and writes float32."""
    return values.is_cuda and dtype == torch.float32 and values.dtype in (torch.bfloat16, torch.float16)


def _multiply(grad_values: Tensor, codebook: Tensor, out: Tensor) -> None:
    """out[:, g] = grad_values[:, g] @ codebook[g].T, (n, G, D) and (G, V, D) -> (n, G, V)."""
    grad_values = grad_values.to(codebook.dtype)
    out_dtype = {} if codebook.dtype == out.dtype else {"out_dtype": out.dtype}
    for g in range(codebook.shape[0]):
        torch.mm(grad_values[:, g], codebook[g].t(), **out_dtype, out=out[:, g])


BACKWARD = {name: implementations(partial(_bwd, sum_rows))[name] for name, sum_rows in segment_sum.SUMS.items()}


@operator(NAME, implementations(_fwd), native_ops=(*NATIVE_OPS, "weighted_row_sums"))
def gumbel_quantize_fwd(source: NoisyLogits, mask: Tensor | None, stats: bool) -> Codes:
    return _empty_codes(source.logits, stats)


@operator(NAME, BACKWARD, native_ops=(*NATIVE_OPS, "weighted_row_sums"))
def gumbel_quantize_bwd(
    grads: OutputGrads, source: NoisyLogits, codebook: Tensor, mask: Tensor | None, codes: CodeState, wanted: Wanted
) -> Gradients:
    return _empty_gradients(source.logits, codebook, wanted)


def _look_up(codebook: Tensor, codes: Codes) -> Tensor:
    """The drawn codes (N, G, D); NaN for a row that is not finite."""
    groups, count, dim = codebook.shape
    keys = (codes.index + torch.arange(groups, device=codebook.device) * count).flatten()
    values = codebook.reshape(groups * count, dim).index_select(0, keys).reshape(*codes.index.shape, dim)
    # Not in place: torch.compile of torch 2.11 would return the values twice, and their gradient for the wrong one.
    return values.masked_fill(codes.sum.isnan()[..., None], torch.nan)


class _Quantize(Function):
    """Saves logits, codebook and seed, and for each row the index and two numbers, four with statistics."""

    differentiable = 2

    @staticmethod
    def forward(source: NoisyLogits, codebook: Tensor, mask: Tensor | None, stats: bool) -> tuple[Tensor, Codes]:
        codes = gumbel_quantize_fwd(source, mask, stats)
        return _look_up(codebook, codes), codes

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        source, codebook, mask, ctx.stats = inputs
        _, codes = outputs
        save(ctx, source, codebook, mask, codes.code_state)

    @staticmethod
    def backward(ctx, grad_values, grad_codes):
        # Without statistics a compiled graph passes zeros as the gradient of the probabilities.
        grads = OutputGrads(grad_values, grad_codes.probability if ctx.stats else None)
        needs_source, needs_codebook, *_ = _Quantize.wanted(ctx)
        source, codebook, mask, codes = saved(ctx)
        reach_logits = grads.probability is not None or (grads.values is not None and source.seed is not None)
        wanted = Wanted(needs_source.logits and reach_logits, needs_codebook and grads.values is not None)
        if not any(wanted):
            return None
        found = wanted_only(_gradients(grads, source, codebook, mask, codes, wanted), wanted)
        return NoisyLogits(found.logits, None, None, None), found.codebook


class _SoftValues(Function):
    """The soft sample times the codebook, (N, G, D), and the sample. Backward goes from the gradient of the values to
    the logits in one step, as with `hard`; a gradient of the sample, in its dtype, would overflow in half precision."""

    differentiable = 1

    @staticmethod
    def forward(source: NoisyLogits, codebook: Tensor, state: CodeState) -> tuple[Tensor, Tensor]:
        logits = source.logits
        y = gumbel_softmax_fwd(source._replace(logits=as_matrix(logits)), False).y.reshape(logits.shape)
        return (y.to(codebook.dtype).transpose(0, 1) @ codebook).transpose(0, 1), y

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        source, codebook, state = inputs
        _, y = outputs
        save(ctx, source, codebook, state, y)

    @staticmethod
    def backward(ctx, grad_values, _):
        if grad_values is None:
            return None
        source, codebook, state, y = saved(ctx)
        needs_source, needs_codebook, *_ = _SoftValues.wanted(ctx)
        grad_logits = grad_codebook = None
        if needs_source.logits:
            grads, wanted = OutputGrads(grad_values, None), Wanted(True, False)
            grad_logits = _gradients(grads, source, codebook, None, state, wanted).logits
        if needs_codebook:
            grad_codebook = _soft_sums(y, grad_values.to(codebook.dtype), source.logits)
        return NoisyLogits(grad_logits, None, None, None), grad_codebook


@once_differentiable(NAME)
def _soft_sums(y: Tensor, grad_values: Tensor, logits: Tensor) -> Tensor:
    """logits: passed so that differentiating again raises, since y depends on them but is saved without a gradient."""
    return y.to(grad_values.dtype).permute(1, 2, 0) @ grad_values.transpose(0, 1)


@once_differentiable(NAME)
def _gradients(
    grads: OutputGrads, source: NoisyLogits, codebook: Tensor, mask: Tensor | None, codes: CodeState, wanted: Wanted
) -> Gradients:
    grads = OutputGrads(*(None if grad is None else contiguous_rows(grad) for grad in grads))
    return gumbel_quantize_bwd(grads, source, codebook, mask, codes, wanted)


@checks.with_python_numbers
def gumbel_quantize(
    logits: Tensor,
    codebook: Tensor,
    *,
    tau: float | Tensor = 1.0,
    hard: bool = True,
    noise: bool = True,
    mask: Tensor | None = None,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    return_stats: bool = False,
) -> GumbelQuantized:
    """Draws a code from softmax(logits) for each row and group and looks it up; gradients are straight-through.

    The values equal `gumbel_softmax(logits, tau, hard) @ codebook`, group by group, concatenated in the last dimension.
    With `hard` they are gathered: neither the one-hot nor its product with the codebook is materialised, and backward
    recomputes noise and probabilities. The gradient of the logits is that of the soft sample, from
    `grad_values @ codebook.T` in blocks of rows of at most 8 MB (64 MB on a GPU), or in place of the gradient; the
    gradient of the codebook is the sum over the rows that drew each code, in a fixed order. The noise of group g of
    row n is row n * G + g of `random_gumbel`.

    Args:
        logits: unnormalised log-probabilities `(..., G, V)`, or `(..., V)` without groups; float32, bfloat16, float16
            or float64. -inf is probability 0.
        codebook: `(G, V, D)`, or `(V, D)` without groups, in any of these dtypes.
        tau: temperature of the gradient and of soft values, a number in [1e-30, 1e30] or a 0-d floating tensor.
        hard: values are codes. Otherwise they are means under the soft sample, by torch's matmul, and the sample, of
            the size of the logits, is saved for backward.
        noise: False takes the code with the largest logit, whatever `hard` is, and gives the logits no gradient
            through the values, as wav2vec 2.0 does in evaluation.
        mask: bool `(...)`, the rows that the statistics count; values are computed for all rows.
        row_ids: int64 `(...)`, the number of each row for the noise in place of its flattened index.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device.
        generator: draws the seed if `seed` is None; default torch's generator of the device.
        return_stats: adds the perplexities, which take a second pass over the logits.

    Returns:
        `GumbelQuantized(values, indices, code_perplexity, prob_perplexity)`: values `(..., G * D)` in the dtype of the
        codebook, indices `(..., G)`, int64; without groups `(..., D)` and `(...)`. The perplexities are None, or 0-d in
        float32 (float64 for float64 logits): the sum over groups of `exp(-sum(p * log(p + 1e-7)))`, where p is the
        frequency with which each code has the largest logit, or the mean of softmax(logits) without noise. The latter
        is differentiable: the diversity loss of wav2vec 2.0 is `(G * V - prob_perplexity) / (G * V)`. A row that
        holds NaN or +inf, or nothing but -inf, has NaN values and an index in range. Without rows the perplexities are
        NaN.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: Baevski, Zhou, Mohamed and Auli, "wav2vec 2.0", NeurIPS 2020, section 2.

    >>> import sslkernels as sk
    >>> logits = torch.randn(8, 50, 2, 320, requires_grad=True)
    >>> codebook = torch.randn(2, 320, 128, requires_grad=True)
    >>> code = sk.gumbel_quantize(logits, codebook, tau=2.0, return_stats=True)
    >>> (code.values.square().mean() + (640 - code.prob_perplexity) / 640).backward()
    >>> code.values.shape, code.indices.shape
    (torch.Size([8, 50, 256]), torch.Size([8, 50, 2]))
    """
    _check(logits, codebook, hard, noise, mask, row_ids, return_stats)
    grouped = codebook.dim() == 3
    if grouped:
        batch = logits.shape[:-2]
    else:
        batch, logits, codebook = logits.shape[:-1], logits.unsqueeze(-2), codebook.unsqueeze(0)
    groups, count, dim = codebook.shape
    rows = logits.reshape(batch.numel(), groups, count)
    inverse_tau = inverse_tau_tensor(NAME, tau, logits.device)
    if noise:
        seed = seed_tensor(NAME, seed, generator, logits.device)
    numbers = None
    if row_ids is not None:
        numbers = (row_ids.reshape(-1, 1) * groups + torch.arange(groups, device=logits.device)).flatten()
    valid = None if mask is None else mask.reshape(-1).repeat_interleave(groups)
    gathered = hard or not noise
    table = codebook if gathered else codebook.detach()[..., :0]
    source = NoisyLogits(rows, seed if noise else None, numbers, inverse_tau)
    values, codes = _Quantize.run(source, table, valid, return_stats)
    if not gathered:
        values, _ = _SoftValues.run(source, codebook, codes.code_state)
    values = values.reshape(*batch, groups * dim)
    indices = codes.index.reshape(*batch, groups) if grouped else codes.index.reshape(batch)
    if not return_stats:
        return GumbelQuantized(values, indices)
    counted = rows.shape[0] if mask is None else mask.sum()
    usage = _usage(codes.best, count, valid).to(codes.probability.dtype)
    return GumbelQuantized(values, indices, _perplexity(usage / counted), _perplexity(codes.probability / counted))


def _usage(best: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """How many rows have each code as their best, (G, V)."""
    groups = best.shape[1]
    keys = (best + torch.arange(groups, device=best.device) * count).flatten()
    ones = torch.ones_like(keys) if valid is None else valid.to(keys.dtype)
    zeros = torch.zeros(groups * count, dtype=keys.dtype, device=keys.device)
    return zeros.scatter_add(0, keys, ones).view(groups, -1)  # vmap allows no in-place addition to an unbatched tensor


def _perplexity(probability: Tensor) -> Tensor:
    return (-(probability * (probability + SMALLEST).log()).sum(-1)).exp().sum()


def _check(
    logits: Tensor,
    codebook: Tensor,
    hard: bool,
    noise: bool,
    mask: Tensor | None,
    row_ids: Tensor | None,
    return_stats: bool,
) -> None:
    checks.tensor(NAME, "logits", logits, checks.FLOAT_DTYPES)
    checks.tensor(NAME, "codebook", codebook, checks.FLOAT_DTYPES)
    checks.dims(NAME, "codebook", codebook, 2, "(G, V, D) or (V, D)", high=3)
    if codebook.shape[0] == 0 or codebook.shape[-2] == 0:
        checks.fail(ValueError, NAME, "codebook", "have at least one code", tuple(codebook.shape))
    last = codebook.shape[:-1]
    if logits.shape[logits.dim() - len(last) :] != last:
        meaning = "(..., G, V)" if len(last) == 2 else "(..., V)"
        checks.fail(ValueError, NAME, "logits", f"have shape {meaning} with {tuple(last)} last", tuple(logits.shape))
    batch = logits.shape[: logits.dim() - len(last)]
    checks.tensor(NAME, "mask", mask, (torch.bool,), optional=True)
    checks.shape(NAME, "mask", mask, batch, "logits.shape without codes and groups")
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, batch, "logits.shape without codes and groups")
    for argument, value in (("codebook", codebook), ("mask", mask), ("row_ids", row_ids)):
        checks.same_device(NAME, argument, value, "logits", logits.device)
    for argument, value in (("hard", hard), ("noise", noise), ("return_stats", return_stats)):
        checks.boolean(NAME, argument, value)
