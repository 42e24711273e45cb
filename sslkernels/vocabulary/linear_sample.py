"""Sampling from the softmax of a linear projection, whose logits are never materialised."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function
from sslkernels.core.chunks import TILE, chunked_waves, equal_rows, row_pitch
from sslkernels.core.dtypes import accumulation_dtype, compute_dtype_of, contiguous
from sslkernels.core.operator import full, operator
from sslkernels.core.ranks import check_ranks, group_named
from sslkernels.core.slices import Slices, own_slice, slices_of
from sslkernels.random.seeds import seed_tensor
from sslkernels.random.streams import stream_values
from sslkernels.vocabulary.linear_cross_entropy import check_projection, linear_cross_entropy

NAME = "linear_sample"
# Bytes of a tile of products, which should stay in the cache.
WORKSPACE_BYTES = {"cpu": 8 << 20, "cuda": 24 << 20}
ROWS_AT_ONCE = 1024  # at most, per tile: more rows would leave too few columns
LEAST_TEMPERATURE = 1e-30  # the inverse is finite in float32


class LinearSample(NamedTuple):
    """index `(...)`, int64, and logprob `(...)`, of that index under the softmax; given `num_samples`, `(..., K)`."""

    index: Tensor
    logprob: Tensor


class SampleInputs(NamedTuple):
    """input (N, D), linear_weight (V, D), linear_bias (V,) in the accumulation dtype, seed (), row_ids (N,), and in the
    accumulation dtype scale (N,), one over the temperature; infinity draws the largest logit."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    seed: Tensor
    row_ids: Tensor
    scale: Tensor


class SampleOptions(NamedTuple):
    """The dtype of the matmul, and the number of draws of each row."""

    compute_dtype: torch.dtype
    samples: int


class Slicing(NamedTuple):
    """group, sizes, vocab_start: as in `linear_records.PlanOptions`; own_seeds: each rank drew a seed of its own, and
    the seed of the first rank is used."""

    group: str
    sizes: tuple[int, ...]
    vocab_start: int | None
    own_seeds: bool


class SliceState(NamedTuple):
    """What a slice of the classes has drawn, (samples, N): the largest logit, the sum of exponentials relative to it,
    the largest sum of logit and noise, its logit and its class."""

    row_max: Tensor
    sum_exp: Tensor
    best: Tensor
    logit: Tensor
    index: Tensor


def _empty_outputs(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    """(samples, N)."""
    acc = accumulation_dtype(inputs.input.dtype)
    shape = (options.samples, inputs.input.shape[0])
    return LinearSample(inputs.row_ids.new_empty(shape), inputs.input.new_empty(shape, dtype=acc))


def _reference(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    logits, greedy = _reference_logits(inputs, options)
    log_softmax = logits.log_softmax(1)
    drawn = []
    for sample in range(options.samples):
        noise = stream_values("gumbel", inputs.seed, inputs.row_ids, *logits.shape, sample, torch.float32)
        index = _perturbed(logits, noise, greedy).argmax(1, keepdim=True)
        logprob = log_softmax.gather(1, index)
        drawn.append((index[:, 0], logprob.masked_fill(greedy & ~logprob.isnan(), 0)[:, 0]))
    return LinearSample(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def _reference_slice(inputs: SampleInputs, options: SampleOptions, slices: Slices) -> SliceState:
    logits, greedy = _reference_logits(inputs, options)
    row_max = logits.amax(1)
    sum_exp = (logits - row_max.masked_fill(row_max == float("-inf"), 0)[:, None]).exp().sum(1)
    drawn = []
    for sample in range(options.samples):
        shape = (len(logits), slices.total)
        noise = stream_values("gumbel", inputs.seed, inputs.row_ids, *shape, sample, torch.float32)
        best, index = _perturbed(logits, noise[:, slices.start : slices.stop], greedy).max(1)
        drawn.append((row_max, sum_exp, best, logits.gather(1, index[:, None])[:, 0], index + slices.start))
    return SliceState(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def _reference_logits(inputs: SampleInputs, options: SampleOptions) -> tuple[Tensor, Tensor]:
    """The logits over the temperature, and which rows (N, 1) draw the largest one."""
    input, linear_weight, linear_bias, _, _, scale = inputs
    acc = accumulation_dtype(input.dtype)
    logits = input.to(options.compute_dtype).to(acc) @ linear_weight.to(options.compute_dtype).to(acc).t()
    if linear_bias is not None:
        logits = logits + linear_bias
    greedy = torch.isinf(scale)[:, None]
    scaled = logits * torch.where(greedy, 1, scale[:, None])
    return torch.where(logits == float("-inf"), logits, scaled), greedy  # 0 * -inf is NaN


def _perturbed(logits: Tensor, noise: Tensor, greedy: Tensor) -> Tensor:
    perturbed = logits + torch.where(greedy, 0, noise)
    return torch.where(logits.isnan(), float("-inf"), perturbed)


def _native(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    outputs = _empty_outputs(inputs, options)
    vocab = inputs.linear_weight.shape[0]
    numbers = outputs.logprob.new_empty((3, *outputs.logprob.shape))
    _draw_tiles(inputs, options, SliceState(*numbers, outputs.logprob, outputs.index), 0, vocab)
    return outputs


def _native_slice(inputs: SampleInputs, options: SampleOptions, slices: Slices) -> SliceState:
    state = _initial_state(inputs, options)
    if inputs.linear_bias is not None:  # the kernel takes the bias of all classes
        bias = inputs.linear_bias.new_zeros(slices.total)
        bias[slices.start : slices.stop] = inputs.linear_bias
        inputs = inputs._replace(linear_bias=bias)
    _draw_tiles(inputs, options, state, slices.start, slices.total)
    logit = state.logit
    if slices.stop == slices.total:  # the kernel made it a log-probability after the last class
        logit = logit + state.row_max + state.sum_exp.log()
    return state._replace(logit=torch.where(torch.isinf(inputs.scale), state.best, logit))


def _draw_tiles(inputs: SampleInputs, options: SampleOptions, state: SliceState, start: int, vocab: int) -> None:
    """torch's matmul computes tiles of products, and one kernel reduces each at once. A tile of classes is multiplied
    with all rows before the next one, so that it is converted once and stays in the cache.

    The products of half precision are float32, like Triton's: the tile is small enough for the cache all the same, and
    rounding them to bfloat16 would change the probability of a class by several per cent.

    The weight has the classes from `start` of `vocab`. Since a tile begins with a group of four noise words, the first
    one has up to three products before `start`, which are -inf.
    """
    input, linear_weight, linear_bias, seed, row_ids, scale = inputs
    rounded_to = options.compute_dtype
    half = rounded_to.itemsize == 2
    products_dtype = torch.float32 if half else rounded_to
    compute_dtype = rounded_to if input.is_cuda else products_dtype  # a CPU's matmul has no float32 output for them
    count, stop = input.shape[0], start + linear_weight.shape[0]
    aligned = start // 4 * 4
    rows, columns = tile_shape(count, stop - aligned, products_dtype.itemsize, input.device)
    buffer = input.new_empty((rows, row_pitch(columns)), dtype=products_dtype)
    row_blocks = [
        (input[block], row_ids[block], scale[block], [[t[k][block] for t in state] for k in range(options.samples)])
        for block in (slice(first, first + rows) for first in range(0, count, rows))
    ]
    for column in range(aligned, stop, columns):
        before = max(start - column, 0)
        weight = linear_weight[column + before - start : column + columns - start].to(rounded_to).to(compute_dtype).t()
        for x, ids, row_scale, states in row_blocks:
            products = buffer[: len(x), : before + weight.shape[1]]
            if before:
                products[:, :before] = -math.inf
            _multiply(x.to(rounded_to).to(compute_dtype), weight, products[:, before:])
            for draw, sample_state in enumerate(states):
                torch.ops.sslkernels_native.sample_rows(
                    products, linear_bias, seed, ids, column, vocab, row_scale, draw, *sample_state
                )


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
    return min(candidates, key=lambda columns: (chunked_waves(vocab, rows, columns, processors), -columns))


def _triton(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    from sslkernels.vocabulary.triton.linear_sample import linear_sample

    if options.compute_dtype == torch.float64:  # only tests use it, and it has no kernel
        return _reference(inputs, options)
    outputs = _empty_outputs(inputs, options)
    linear_sample(inputs, outputs, options)
    return outputs


def _triton_slice(inputs: SampleInputs, options: SampleOptions, slices: Slices) -> SliceState:
    from sslkernels.vocabulary.triton.linear_sample import linear_sample_slice

    if options.compute_dtype == torch.float64:
        return _reference_slice(inputs, options, slices)
    state = _initial_state(inputs, options)
    linear_sample_slice(inputs, state, options, slices.start, slices.total)
    return state


def _initial_state(inputs: SampleInputs, options: SampleOptions) -> SliceState:
    """The state before the first class."""
    index, logit = _empty_outputs(inputs, options)
    row_max, best = torch.empty_like(logit).fill_(-math.inf), torch.empty_like(logit).fill_(-math.inf)
    return SliceState(row_max, torch.zeros_like(logit), best, logit.fill_(-math.inf), index.zero_())


def _over_ranks(
    draw_slice: Callable[[SampleInputs, SampleOptions, Slices], SliceState],
    inputs: SampleInputs,
    options: SampleOptions,
    slicing: Slicing,
) -> LinearSample:
    """The draws from all slices: each rank draws from its own slice, with the noise of the columns of the whole
    vocabulary, and the largest sum of logit and noise of all ranks wins."""
    _check_scale(inputs)
    slices = slices_of(NAME, slicing.group, inputs.linear_weight, slicing.vocab_start, slicing.sizes)
    if slicing.own_seeds:
        seed = inputs.seed.clone()
        dist.broadcast(seed, dist.get_global_rank(slices.group, 0), group=slices.group)
        inputs = inputs._replace(seed=seed)
    empty = slices.sizes[slices.rank] == 0
    own = _initial_state(inputs, options) if empty else draw_slice(inputs, options, slices)
    *fields, index = own
    numbers, index = torch.stack(fields), index.contiguous()
    every, indices = ([torch.empty_like(part) for _ in slices.sizes] for part in (numbers, index))
    dist.all_gather(every, numbers, group=slices.group)
    dist.all_gather(indices, index, group=slices.group)
    row_max, sum_exp, best, logit = torch.stack(every, 1)
    winner = best.argmax(0, keepdim=True)  # ties go to the first rank, the lowest index
    lse = (row_max + sum_exp.log()).logsumexp(0)
    logprob = logit.gather(0, winner)[0] - lse
    logprob.masked_fill_(torch.isinf(inputs.scale) & ~logprob.isnan(), 0)
    return LinearSample(torch.stack(indices).gather(0, winner)[0], logprob)


def _check_scale(inputs: SampleInputs) -> None:
    """Raises `ValueError` on a CPU for an invalid temperature, which made the scale of its row NaN."""
    if inputs.scale.device.type == "cpu" and bool(inputs.scale.isnan().any()):
        row = int(inputs.scale.isnan().nonzero()[0])
        checks.fail(ValueError, NAME, "temperature", "be in [0, inf] in every row", f"another value in row {row}")


def _checked(
    function: Callable[[SampleInputs, SampleOptions], LinearSample], inputs: SampleInputs, options: SampleOptions
) -> LinearSample:
    _check_scale(inputs)
    return function(inputs, options)


@operator(
    NAME,
    {
        name: partial(_checked, function)
        for name, function in (("reference", _reference), ("cpu", _native), ("cuda", _native), ("triton", _triton))
    },
    native_ops=("sample_rows",),
    flops=lambda inputs, options: 2 * inputs.input.numel() * inputs.linear_weight.shape[0],
)
def linear_sample_fwd(inputs: SampleInputs, options: SampleOptions) -> LinearSample:
    return _empty_outputs(inputs, options)


@operator(
    NAME,
    {
        "reference": partial(_over_ranks, _reference_slice),
        "cpu": partial(_over_ranks, _native_slice),
        "cuda": partial(_over_ranks, _native_slice),
        "triton": partial(_over_ranks, _triton_slice),
    },
    native_ops=("sample_rows",),
    flops=lambda inputs, options, slicing: 2 * inputs.input.numel() * inputs.linear_weight.shape[0],
)
def linear_sample_slice_fwd(inputs: SampleInputs, options: SampleOptions, slicing: Slicing) -> LinearSample:
    """The draws from the whole vocabulary, of which linear_weight is this rank's slice."""
    return _empty_outputs(inputs, options)


class _NoGradient(Function):
    """Passes logprob on where no gradient is wanted, so that forward-mode differentiation raises: without this its
    tangent would silently be 0."""

    @staticmethod
    def forward(logprob: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        return logprob.clone()

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass


@checks.with_python_numbers
def linear_sample(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_samples: int | None = None,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: Any = None,
    vocab_start: int | None = None,
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
        temperature: divides the logits; a float in [0, inf] or a float tensor `(...)`, one for each row. 0 (and what is
            below 1e-30) draws the largest logit, the lowest index of equals, with logprob 0 and no gradient; infinity
            draws uniformly among the classes whose logit is not -inf. On a GPU a negative one makes logprob NaN.
        num_samples: independent draws of each row, a last dimension of the results; None: one, without it. Draw k has
            the noise of `random_gumbel(..., sample=k)`.
        row_ids: int64 `(...)`, the number of each row for the noise, in place of its flattened index.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device of `input`.
        generator: draws the seed if `seed` is None; default: torch's default generator of the device.
        process_group: ranks that the vocabulary is sliced over, as in `linear_cross_entropy`. Every other argument is
            the same on every rank, as are the results, which equal one process's with all classes; without a `seed`
            the first rank's counts. The ranks exchange five numbers a row.
        vocab_start: number of rows of the ranks before this one; None: from the sizes, which are exchanged once.

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
    linear_weight, linear_bias, group, sizes = own_slice(NAME, linear_weight, linear_bias, process_group, vocab_start)
    check_projection(NAME, input, linear_weight, linear_bias, sliced=group is not None)
    shape = input.shape[:-1]
    _check_temperature(temperature, shape, input.device)
    checks.integer(NAME, "num_samples", num_samples, low=1, optional=True)
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, shape, "input.shape[:-1]")
    checks.same_device(NAME, "row_ids", row_ids, "input", input.device)
    compute_dtype = compute_dtype_of(NAME, input, linear_weight)
    acc = accumulation_dtype(input.dtype)
    x = input.reshape(math.prod(shape), input.shape[-1]).contiguous()
    scale = _row_scale(temperature, x, acc)
    bias = None if linear_bias is None else linear_bias.to(acc)
    inputs = SampleInputs(
        x.detach(),
        linear_weight.detach().contiguous(),
        None if bias is None else contiguous(bias.detach()),
        seed_tensor(NAME, seed, generator, x.device),
        torch.arange(x.shape[0], device=x.device) if row_ids is None else row_ids.reshape(-1).contiguous(),
        scale,
    )
    options = SampleOptions(compute_dtype, num_samples or 1)
    if group is None:
        index, logprob = drawn = linear_sample_fwd(inputs, options)
    else:
        same = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias, "row_ids": row_ids}
        check_ranks(NAME, group, same | {"temperature": temperature, "num_samples": num_samples, "seed": seed})
        slicing = Slicing(group, sizes, None if sizes else vocab_start, seed is None)
        index, logprob = drawn = linear_sample_slice_fwd(inputs, options, slicing)
    leaves = (input, linear_weight, linear_bias)
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        inputs = inputs._replace(input=x, linear_weight=linear_weight)
        logprob = _differentiable(drawn, inputs, bias, temperature, None if group is None else group_named(group))
    else:
        logprob = _NoGradient.run(logprob, *leaves)
    drawn_shape = shape if num_samples is None else (*shape, num_samples)
    return LinearSample(index.t().reshape(drawn_shape), logprob.t().reshape(drawn_shape))


def _check_temperature(temperature: float | Tensor, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(temperature, Tensor):
        checks.number(NAME, "temperature", temperature, low=0.0)
        return
    checks.tensor(NAME, "temperature", temperature, checks.FLOAT_DTYPES)
    checks.shape(NAME, "temperature", temperature, shape, "input.shape[:-1]")
    checks.same_device(NAME, "temperature", temperature, "input", device)
    if temperature.requires_grad:
        checks.fail(ValueError, NAME, "temperature", "not require grad", "requires_grad=True")


def _row_scale(temperature: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / temperature of each row (N,): infinity for 0, NaN for an invalid temperature."""
    if not isinstance(temperature, Tensor):
        scale = math.inf if temperature < LEAST_TEMPERATURE else 1 / temperature
        return full(x.shape[:1], scale, dtype, x.device)
    given = temperature.reshape(-1).to(dtype)
    scale = torch.where(given < LEAST_TEMPERATURE, math.inf, 1 / given)
    return scale.masked_fill(~(given >= 0), math.nan)


def _differentiable(
    drawn: LinearSample, inputs: SampleInputs, bias: Tensor | None, temperature: float | Tensor, process_group: Any
) -> Tensor:
    """The log-probabilities (samples, N) of the indices, by `linear_cross_entropy`; 0 without a gradient where the
    largest logit was drawn. inputs, bias: as autograd tracks them."""
    x, weight, scale = inputs.input, inputs.linear_weight, inputs.scale
    samples, greedy = drawn.index.shape[0], torch.isinf(scale)
    options: dict[str, Any] = {"linear_bias": bias}
    if isinstance(temperature, Tensor):
        # The scale of a row multiplies its input and the bias, which becomes one more column of the weight.
        row_scale = torch.where(greedy, 1, scale)[:, None]
        x = (x * row_scale).to(weight.dtype)
        if bias is not None:
            masked = bias.detach() == float("-inf")
            options["linear_bias"] = torch.where(masked, bias.detach(), 0)
            column = bias.masked_fill(masked, 0).to(weight.dtype)
            x = torch.cat([x, row_scale.to(weight.dtype)], 1)
            weight = torch.cat([weight, column[:, None]], 1)
    elif temperature >= LEAST_TEMPERATURE:
        options["logit_scale"] = 1 / temperature
        if bias is not None:
            masked = bias.detach() == float("-inf")  # 0 * -inf is NaN, also as a gradient
            options["linear_bias"] = (bias.masked_fill(masked, 0) / temperature).masked_fill(masked, float("-inf"))
    losses = linear_cross_entropy(
        x.expand(samples, *x.shape).reshape(samples * x.shape[0], x.shape[1]),
        weight,
        torch.where(greedy, -100, drawn.index).reshape(-1),
        reduction="none",
        process_group=process_group,
        **options,
    )
    return torch.where(greedy, drawn.logprob, -losses.view(samples, -1))
