"""Sampling from the softmax of a linear projection, whose logits are never materialised."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function
from sslkernels.core.chunks import TILE, equal_rows, row_pitch, waves
from sslkernels.core.dtypes import accumulation_dtype, compute_dtype_of, contiguous
from sslkernels.core.operator import operator
from sslkernels.random.seeds import seed_tensor
from sslkernels.random.streams import stream_values
from sslkernels.vocabulary.linear_cross_entropy import check_projection, linear_cross_entropy

NAME = "linear_sample"
# Bytes of a tile of products, which should stay in the cache.
WORKSPACE_BYTES = {"cpu": 8 << 20, "cuda": 24 << 20}
ROWS_AT_ONCE = 1024  # at most, per tile: more rows would leave too few columns
LEAST_TEMPERATURE = 1e-30  # the inverse is finite in float32


class LinearSample(NamedTuple):
    """index `(...)`, int64; logprob `(...)`, of that index under the softmax."""

    index: Tensor
    logprob: Tensor


class SampleInputs(NamedTuple):
    """input (N, D), linear_weight (V, D), linear_bias (V,) in the accumulation dtype, seed (), row_ids (N,)."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    seed: Tensor
    row_ids: Tensor


class SampleOptions(NamedTuple):
    compute_dtype: torch.dtype
    temperature: float


def _empty_outputs(inputs: SampleInputs) -> LinearSample:
    acc = accumulation_dtype(inputs.input.dtype)
    return LinearSample(torch.empty_like(inputs.row_ids), inputs.input.new_empty(inputs.input.shape[0], dtype=acc))


def _reference(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    input, linear_weight, linear_bias, seed, row_ids = inputs
    acc = accumulation_dtype(input.dtype)
    logits = input.to(options.compute_dtype).to(acc) @ linear_weight.to(options.compute_dtype).to(acc).t()
    if linear_bias is not None:
        logits = logits + linear_bias
    logits = logits * (1 / options.temperature)
    noise = stream_values("gumbel", seed, row_ids, *logits.shape, 0, torch.float32)
    perturbed = torch.where(logits.isnan(), float("-inf"), logits + noise)
    index = perturbed.argmax(1)
    return LinearSample(index, logits.log_softmax(1).gather(1, index[:, None]).squeeze(1))


def _native(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    """torch's matmul computes tiles of products, and one kernel reduces each at once. A tile of classes is multiplied
    with all rows before the next one, so that it is converted once and stays in the cache.

    On a GPU the products of half precision are float32, like Triton's: the tile is small enough for the cache all the
    same, and rounding them to bfloat16 would change the probability of a class by several per cent.
    """
    input, linear_weight, linear_bias, seed, row_ids = inputs
    compute_dtype = options.compute_dtype
    half = compute_dtype.itemsize == 2
    if compute_dtype == torch.float16 and not input.is_cuda:
        compute_dtype = torch.float32  # a CPU has no fast float16 matmul
    products_dtype = torch.float32 if half and input.is_cuda else compute_dtype
    outputs = _empty_outputs(inputs)
    count, vocab = input.shape[0], linear_weight.shape[0]
    row_max, sum_exp, best = outputs.logprob.new_empty((3, count))
    rows, columns = tile_shape(count, vocab, products_dtype.itemsize, input.device)
    buffer = input.new_empty((rows, row_pitch(columns)), dtype=products_dtype)
    state = (row_max, sum_exp, best, outputs.logprob, outputs.index)
    row_blocks = [
        (input[block], row_ids[block], [tensor[block] for tensor in state])
        for block in (slice(first, first + rows) for first in range(0, count, rows))
    ]
    for column in range(0, vocab, columns):
        weight = linear_weight[column : column + columns].to(compute_dtype).t()
        for x, ids, block_state in row_blocks:
            products = _multiply(x.to(compute_dtype), weight, buffer[: len(x), : weight.shape[1]])
            torch.ops.sslkernels_native.sample_rows(
                products, linear_bias, seed, ids, column, vocab, 1 / options.temperature, *block_state
            )
    return outputs


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    out_dtype = {} if out.dtype == x.dtype else {"out_dtype": out.dtype}
    return torch.mm(x, weight, **out_dtype, out=out)


def tile_shape(count: int, vocab: int, itemsize: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile; the columns are a multiple of 4, except in the last tile."""
    rows = max(equal_rows(count, ROWS_AT_ONCE), 1)
    workspace_bytes = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])
    fit = max(workspace_bytes // (rows * itemsize) // 1024, 1) * 1024
    if device.type != "cuda" or vocab <= fit:
        return rows, min(fit, vocab)
    return rows, wave_columns(rows, vocab, fit, torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache
def wave_columns(rows: int, vocab: int, fit: int, processors: int) -> int:
    """Columns of a tile, at most `fit`, on a GPU with so many multiprocessors: as few waves of the matmul's own tiles
    as possible, then as few tiles. Among any `processors` successive candidates, one fills whole waves."""
    candidates = range(TILE[0], fit + 1, TILE[0])[-processors:]
    return min(candidates, key=lambda columns: (waves(vocab, rows, columns, processors), -columns))


def _triton(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    from sslkernels.vocabulary.triton.linear_sample import linear_sample

    if options.compute_dtype == torch.float64:  # only tests use it, and it has no kernel
        return _reference(inputs, options)
    outputs = _empty_outputs(inputs)
    linear_sample(inputs, outputs, options)
    return outputs


@operator(
    NAME,
    {"reference": _reference, "cpu": _native, "cuda": _native, "triton": _triton},
    native_ops=("sample_rows",),
)
def linear_sample_fwd(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    return _empty_outputs(inputs)


class _NoGradient(Function):
    """Passes logprob on where no gradient is wanted, so that forward-mode differentiation raises: without this its
    tangent would silently be 0."""

    @staticmethod
    def forward(logprob: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        return logprob.clone()

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass


def linear_sample(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LinearSample:
    """Draw an index from `softmax((input @ linear_weight.T + linear_bias) / temperature)` without materialising logits.

    By the Gumbel-max trick: the index with the largest sum of logit and Gumbel noise, ties going to the lowest, and in
    the same pass the log-sum-exp. The noise is `random_gumbel(shape, seed, row_ids=row_ids)` with the class as column,
    so that a draw depends only on its own row, the seed and the row's number, not on the batch or the backend (except
    if two sums are equal up to the rounding of the products). It has the resolution to draw a class 20 nats behind all
    others at its rate.

    Args:
        input: hidden states `(..., D)`; float32, bfloat16, float16 or float64. Under autocast the products are in its
            dtype, whatever the dtypes of input and weight; otherwise the two must be equal.
        linear_weight: `(V, D)`.
        linear_bias: `(V,)`, any float dtype.
        temperature: divides the logits; at least 1e-30, infinity for uniform draws.
        row_ids: int64 `(...)`, the number of each row for the noise, in place of its flattened index.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device of `input`.
        generator: draws the seed if `seed` is None; default: torch's default generator of the device.

    Returns:
        `LinearSample(index, logprob)`, both `(...)`: int64, and float32 (float64 for float64 input). `logprob` is the
        log-probability of the index under the distribution it was drawn from, and differentiable in input, weight and
        bias; if a gradient is wanted it comes from `linear_cross_entropy` of the drawn indices, another pass. A row
        with a NaN has a NaN logprob and an arbitrary index in range.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: Gumbel, "Statistical theory of extreme values and some practical applications", 1954, as in Maddison,
    Tarlow and Minka, "A* sampling", NeurIPS 2014.

    >>> import sslkernels as sk
    >>> hidden, embedding = torch.randn(4, 16), torch.randn(1000, 16)
    >>> index, logprob = sk.linear_sample(hidden, embedding, temperature=0.7, seed=0)
    """
    check_projection(NAME, input, linear_weight, linear_bias)
    checks.number(NAME, "temperature", temperature, low=LEAST_TEMPERATURE)
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, input.shape[:-1], "that of input without its last dimension")
    checks.same_device(NAME, "row_ids", row_ids, "input", input.device)
    compute_dtype = compute_dtype_of(NAME, input, linear_weight)
    temperature = float(temperature)
    shape = input.shape[:-1]
    x = input.reshape(math.prod(shape), input.shape[-1]).contiguous()
    bias = None if linear_bias is None else linear_bias.to(accumulation_dtype(input.dtype))
    inputs = SampleInputs(
        x.detach(),
        linear_weight.detach().contiguous(),
        None if bias is None else contiguous(bias.detach()),
        seed_tensor(NAME, seed, generator, x.device),
        torch.arange(x.shape[0], device=x.device) if row_ids is None else row_ids.reshape(-1).contiguous(),
    )
    index, logprob = linear_sample_fwd(inputs, SampleOptions(compute_dtype, temperature))
    leaves = (input, linear_weight, linear_bias)
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        logprob = -linear_cross_entropy(
            x,
            linear_weight,
            index,
            linear_bias=None if bias is None else bias / temperature,
            logit_scale=1 / temperature,
            reduction="none",
        )
    else:
        logprob = _NoGradient.run(logprob, *leaves)
    return LinearSample(index.reshape(shape), logprob.reshape(shape))
