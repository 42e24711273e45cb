"""Codes drawn from logits, looked up in a codebook: the quantizer of wav2vec 2.0 without its one-hot product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import distinct
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.latent.gumbel_rows import NATIVE_OPS, NONE, GumbelRows, State, Stream
from sslkernels.latent.gumbel_softmax import GumbelSoftmax, as_matrix, implementations, inverse_tau_tensor
from sslkernels.random.seeds import seed_tensor

NAME = "gumbel_quantize"
SMALLEST = 1e-7  # added to a probability before its logarithm, as in fairseq
STRIP_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # of the gradient of the one-hot, of which a strip exists at a time


class GumbelQuantized(NamedTuple):
    """values `(..., G * D)`: the codes that were drawn; indices `(..., G)`, int64; without groups `(..., D)` and
    `(...)`. With `return_stats`, of all rows in the mask, summed over groups, 0-d: code_perplexity, of how often each
    code has the largest logit; prob_perplexity, of the mean of softmax(logits), differentiable."""

    values: Tensor
    indices: Tensor
    code_perplexity: Tensor | None = None
    prob_perplexity: Tensor | None = None


class Codes(NamedTuple):
    """Of each row and group (N, G): the index that was drawn and the state of `GumbelRows`; with statistics (else
    without elements) the index of the largest logit and the state without noise; and (G, V), the sum of
    softmax(logits)."""

    index: Tensor
    row_max: Tensor
    row_sum: Tensor
    best: Tensor
    plain_max: Tensor
    plain_sum: Tensor
    probability: Tensor


def _empty_codes(logits: Tensor, stats: bool) -> Codes:
    rows, groups, codes = logits.shape
    acc = accumulation_dtype(logits.dtype)

    def empty(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return logits.new_empty(shape if stats else 0, dtype=dtype)

    index = logits.new_empty(rows, groups, dtype=torch.int64)
    state = (logits.new_empty(rows, groups, dtype=acc) for _ in range(2))
    plain = (empty(rows, groups) for _ in range(2))
    return Codes(index, *state, empty(rows, groups, dtype=torch.int64), *plain, empty(groups, codes))


def _fwd(
    kernels: Callable[[], GumbelRows],
    logits: Tensor,
    seed: Tensor | None,
    row_ids: Tensor | None,
    mask: Tensor | None,
    inverse_tau: Tensor,
    stats: bool,
) -> Codes:
    codes = _empty_codes(logits, stats)
    groups = logits.shape[1]
    matrix, state, plain = as_matrix(logits), *_states(codes.row_max, codes.row_sum, codes.plain_max, codes.plain_sum)
    best = codes.best.flatten() if stats else None
    rows, plain = kernels(), plain if stats else None
    rows.forward(matrix, Stream(seed, row_ids), inverse_tau, NONE, None, codes.index.flatten(), state, best, plain)
    if not stats:
        return codes
    return codes._replace(probability=rows.probability_sums(matrix, plain, mask, groups))


def _bwd(
    kernels: Callable[[], GumbelRows],
    sum_rows: Callable[..., None],
    grad_values: Tensor | None,
    grad_probability: Tensor | None,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor | None,
    row_ids: Tensor | None,
    mask: Tensor | None,
    index: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    plain_max: Tensor,
    plain_sum: Tensor,
    inverse_tau: Tensor,
    want_logits: bool,
    want_codebook: bool,
) -> tuple[Tensor, Tensor]:
    grads = _empty_gradients(logits, codebook, want_logits, want_codebook)
    groups, codes, dim = codebook.shape
    if want_codebook:
        keys = (index + torch.arange(groups, device=index.device) * codes).flatten()
        # The values of a row without a state are NaN: so is the gradient of the code that it has.
        acc = accumulation_dtype(codebook.dtype)
        weight = torch.ones_like(row_sum, dtype=acc).masked_fill_(row_sum.isnan(), torch.nan).flatten()
        sum_rows(keys, weight, grad_values.reshape(keys.numel(), dim), None, grads[1].view(groups * codes, dim))
    if not want_logits:
        return grads
    matrix, out = as_matrix(logits), grads[0].view(-1, codes)
    stream, states = Stream(seed, row_ids), _states(row_max, row_sum, plain_max, plain_sum)
    plain = states[1] if grad_probability is not None else None
    rows = kernels()
    if grad_values is None or seed is None:
        rows.backward(None, grad_probability, mask, matrix, stream, inverse_tau, None, plain, out)
        return grads
    in_place = grads[0].dtype == row_sum.dtype
    strip = _strip_rows(logits, row_sum.dtype, in_place)
    buffer = None if in_place else row_sum.new_empty(min(strip, logits.shape[0]), groups, codes)
    wide_codebook = codebook if _multiplies_wide(grad_values, row_sum.dtype) else codebook.to(row_sum.dtype)
    for first in range(0, logits.shape[0], strip):
        last = min(first + strip, logits.shape[0])
        grad = grads[0][first:last] if in_place else buffer[: last - first]
        _multiply(grad_values[first:last], wide_codebook, grad)
        part = slice(first * groups, last * groups)
        state, own_plain = (None if s is None else State(*(t[part] for t in s)) for s in (states[0], plain))
        rows.backward(
            grad.view(-1, codes), grad_probability, None if mask is None else mask[part], matrix[part],
            stream.rows(part.start, part.stop), inverse_tau, state, own_plain, out[part],
        )  # fmt: skip
    return grads


def _states(row_max: Tensor, row_sum: Tensor, plain_max: Tensor, plain_sum: Tensor) -> tuple[State, State]:
    return State(row_max.flatten(), row_sum.flatten()), State(plain_max.flatten(), plain_sum.flatten())


def _strip_rows(logits: Tensor, dtype: torch.dtype, in_place: bool) -> int:
    """All rows where no buffer is needed, but on a CPU, whose cache holds a strip between its two uses."""
    if in_place and logits.device.type != "cpu":
        return max(logits.shape[0], 1)
    bytes_of_row = logits.shape[1] * logits.shape[2] * dtype.itemsize
    return max(STRIP_BYTES.get(logits.device.type, STRIP_BYTES["cuda"]) // bytes_of_row, 16)


def _multiplies_wide(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch multiplies half precision into float32."""
    return values.is_cuda and dtype == torch.float32 and values.dtype in (torch.bfloat16, torch.float16)


def _multiply(grad_values: Tensor, codebook: Tensor, out: Tensor) -> None:
    """out[:, g] = grad_values[:, g] @ codebook[g].T, (n, G, D) and (G, V, D) -> (n, G, V)."""
    wide = grad_values if grad_values.dtype == codebook.dtype else grad_values.to(codebook.dtype)
    out_dtype = {} if wide.dtype == out.dtype else {"out_dtype": out.dtype}
    for g in range(codebook.shape[0]):
        torch.mm(wide[:, g], codebook[g].t(), **out_dtype, out=out[:, g])


def _empty_gradients(logits: Tensor, codebook: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    tensors = (logits, codebook)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(tensors, wanted, strict=True))


def _backward_implementations() -> dict[str, Callable[..., Any] | str]:
    sums = {
        "reference": segment_sum.reference,
        "cpu": segment_sum.native,
        "triton": segment_sum.triton,
        "cuda": segment_sum.native,
    }

    return {name: partial(_bwd, function.args[0], sums[name]) for name, function in implementations(_bwd).items()}


gumbel_quantize_fwd = Op(
    NAME,
    "gumbel_quantize_fwd(Tensor logits, Tensor? seed, Tensor? row_ids, Tensor? mask, Tensor inverse_tau, bool stats) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, seed, row_ids, mask, inverse_tau, stats: _empty_codes(logits, stats),
    implementations=implementations(_fwd),
    native_ops=(*NATIVE_OPS, "weighted_row_sums"),
    prefer=PREFERENCE,
)
gumbel_quantize_bwd = Op(
    NAME,
    "gumbel_quantize_bwd(Tensor? grad_values, Tensor? grad_probability, Tensor logits, Tensor codebook, Tensor? seed, "
    "Tensor? row_ids, Tensor? mask, Tensor index, Tensor row_max, Tensor row_sum, Tensor plain_max, Tensor plain_sum, "
    "Tensor inverse_tau, bool want_logits, bool want_codebook) -> (Tensor, Tensor)",
    fake=lambda grad_values, grad_probability, logits, codebook, *rest: _empty_gradients(logits, codebook, *rest[-2:]),
    implementations=_backward_implementations(),
    native_ops=(*NATIVE_OPS, "weighted_row_sums"),
    prefer=PREFERENCE,
)


def _look_up(codebook: Tensor, codes: Codes) -> Tensor:
    """(N, G, D); NaN where a row has no state."""
    groups, count, dim = codebook.shape
    keys = (codes.index + torch.arange(groups, device=codebook.device) * count).flatten()
    values = codebook.reshape(groups * count, dim).index_select(0, keys).reshape(*codes.index.shape, dim)
    return values.masked_fill_(codes.row_sum.isnan()[..., None], torch.nan)


class _Quantize(Function):
    """Saves logits, codebook and seed, and of each row the index and two numbers, four with statistics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, codebook, seed, row_ids, mask, inverse_tau, stats):
        codes = Codes(*gumbel_quantize_fwd(logits, seed, row_ids, mask, inverse_tau, stats))
        return _look_up(codebook, codes), *codes

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, codebook, seed, row_ids, mask, inverse_tau, _ = inputs
        index, row_max, row_sum, best, plain_max, plain_sum, _ = output[1:]
        ctx.mark_non_differentiable(index, row_max, row_sum, best, plain_max, plain_sum)
        states = (index, row_max, row_sum, plain_max, plain_sum, inverse_tau)
        ctx.save_for_backward(logits, codebook, seed, row_ids, mask, *states)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_values, *grads):
        grad_probability = grads[-1]
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes it
        drawn = saved[2] is not None
        reaches_logits = grad_probability is not None or (grad_values is not None and drawn)
        wanted = (ctx.needs_input_grad[0] and reaches_logits, ctx.needs_input_grad[1] and grad_values is not None)
        if not any(wanted):
            return (None,) * 7
        found = _QuantizeBackward.apply(grad_values, grad_probability, *saved, *wanted)
        return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), *(None,) * 5


class _QuantizeBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_values, grad_probability, logits, codebook, seed, row_ids, mask, index, row_max, row_sum, plain_max,
        plain_sum, inverse_tau, want_logits, want_codebook,
    ):  # fmt: skip
        grad_values, grad_probability = (None if g is None else g.contiguous() for g in (grad_values, grad_probability))
        return gumbel_quantize_bwd(
            grad_values, grad_probability, logits, codebook, seed, row_ids, mask, index, row_max, row_sum, plain_max,
            plain_sum, inverse_tau, want_logits, want_codebook,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


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

    The values are those of `gumbel_softmax(logits, tau, hard) @ codebook`, group by group, joined in the last
    dimension, but with `hard` they are gathered: no one-hot exists, nor its product with the codebook, and backward
    makes noise and probabilities again. The gradient of the logits is that of the soft sample, from
    `grad_values @ codebook.T` in strips of at most 8 MB (64 MB on a GPU), or in place of the gradient; the codebook's
    is the sum over the rows that drew each code, in a fixed order. The noise of group g of row n is that of row
    n * G + g of `random_gumbel`.

    Args:
        logits: unnormalised log-probabilities `(..., G, V)`, or `(..., V)` without groups; float32, bfloat16, float16
            or float64. -inf is probability 0.
        codebook: `(G, V, D)`, or `(V, D)` without groups, of any of these dtypes.
        tau: temperature of the gradient and of soft values, a number in [1e-30, 1e30] or a 0-d floating tensor.
        hard: values are codes. Otherwise they are means under the soft sample, by torch's matmul, and the sample, of
            the size of the logits, is kept for backward.
        noise: False takes the code with the largest logit, whatever `hard` is, and gives the logits no gradient
            through the values: what wav2vec 2.0 does in evaluation.
        mask: bool `(...)`, the rows that the statistics count; the values are of all rows.
        row_ids: int64 `(...)`, the number of each row for the noise, in place of its flattened index.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device.
        generator: draws the seed where `seed` is None; torch's default generator of the device if it is None too.
        return_stats: adds the perplexities, which take a second pass over the logits.

    Returns:
        `GumbelQuantized(values, indices, code_perplexity, prob_perplexity)`: values `(..., G * D)` in the dtype of the
        codebook, indices `(..., G)`, int64; without groups `(..., D)` and `(...)`. The perplexities are None, or 0-d in
        float32 (float64 for float64 logits): with p the frequencies with which each code has the largest logit, or
        the mean of softmax(logits) without noise, the sum over groups of `exp(-sum(p * log(p + 1e-7)))`. The latter
        is differentiable: the diversity loss of wav2vec 2.0 is `(G * V - prob_perplexity) / (G * V)`. A row that
        holds NaN or +inf, or nothing but -inf, has NaN values and an index in range; no rows have NaN perplexities.

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
    tensors = distinct((rows, table, seed if noise else None, numbers, valid))
    values, *codes = _Quantize.apply(*tensors, inverse_tau, return_stats)
    if not gathered:
        values = _soft_values(rows, codebook, inverse_tau, seed, numbers)
    codes = Codes(*codes)
    values = values.reshape(*batch, groups * dim)
    indices = codes.index.reshape(*batch, groups) if grouped else codes.index.reshape(batch)
    if not return_stats:
        return GumbelQuantized(values, indices)
    counted = rows.shape[0] if mask is None else mask.sum()
    usage = _usage(codes.best, count, valid).to(codes.probability.dtype)
    return GumbelQuantized(values, indices, _perplexity(usage / counted), _perplexity(codes.probability / counted))


def _soft_values(rows: Tensor, codebook: Tensor, inverse_tau: Tensor, seed: Tensor, numbers: Tensor | None) -> Tensor:
    y = GumbelSoftmax.apply(rows, seed, numbers, inverse_tau, False, 2)[0]
    return (y.to(codebook.dtype).transpose(0, 1) @ codebook).transpose(0, 1)


def _usage(best: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """(G, V): how many rows have each code as their best."""
    groups = best.shape[1]
    keys = (best + torch.arange(groups, device=best.device) * count).flatten()
    ones = torch.ones_like(keys) if valid is None else valid.to(keys.dtype)
    none = torch.zeros(groups * count, dtype=keys.dtype, device=keys.device)
    return none.scatter_add(0, keys, ones).view(groups, -1)  # vmap adds nothing in place to what has no batch


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
    own = codebook.shape[:-1]
    if logits.shape[logits.dim() - len(own) :] != own:
        meaning = "(..., G, V)" if len(own) == 2 else "(..., V)"
        checks.fail(ValueError, NAME, "logits", f"have shape {meaning} with {tuple(own)} last", tuple(logits.shape))
    batch = logits.shape[: logits.dim() - len(own)]
    checks.tensor(NAME, "mask", mask, (torch.bool,), optional=True)
    checks.shape(NAME, "mask", mask, batch, "that of logits without codes and groups")
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, batch, "that of logits without codes and groups")
    for argument, value in (("codebook", codebook), ("mask", mask), ("row_ids", row_ids)):
        checks.same_device(NAME, argument, value, "logits", logits.device)
    for argument, value in (("hard", hard), ("noise", noise), ("return_stats", return_stats)):
        checks.boolean(NAME, argument, value)
