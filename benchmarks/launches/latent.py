"""Gaussian and Gumbel samples, the search for the best code, and energies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launches.call import BF16, DTYPES, FP16, FP32, FP64, Call, binding, call, indices, when
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.latent import free_energy as energies
from sslkernels.latent import gaussian_operators as gaussian
from sslkernels.latent import prediction_energy as predictions
from sslkernels.latent.gumbel_rows import (
    HARD,
    NO_STATE,
    NONE,
    SOFT,
    NoisyLogits,
    RowGrads,
    RowOutputs,
    State,
    chunk_rows,
)
from sslkernels.latent.nearest_code import METRICS
from sslkernels.latent.triton.free_energy import free_energy_bwd, free_energy_fwd
from sslkernels.latent.triton.gaussian import ROWS_OF_BLOCK, columns_of_tile, gaussian_bwd, gaussian_fwd
from sslkernels.latent.triton.gumbel_rows import gumbel_rows_bwd, gumbel_rows_fwd, probability_sums, sum_chunks
from sslkernels.latent.triton.nearest_code import best_codes
from sslkernels.latent.triton.prediction_energy import prediction_energy_bwd, prediction_energy_fwd
from sslkernels.latent.triton.vector_quantize import code_difference, gather_codes

MODES = {"soft": False, "min": True}
OUTPUTS = {"none": NONE, "soft": SOFT, "hard": HARD}


def calls() -> Iterator[Call]:
    yield from gaussian_calls()
    yield from gumbel_calls()
    yield from code_calls()
    yield from energy_calls()


def gaussian_calls() -> Iterator[Call]:
    for dtype in DTYPES:
        yield call(gaussians, dtype, 256, "z kl rows prior bounds")
        if dtype == FP16:  # as bfloat16, but for the conversions
            continue
        yield call(gaussians, dtype, 256, "z kl rows")
        yield call(gaussians, dtype, 77, "z kl rows ids")
        yield call(gaussians, dtype, 256, "z kl rows shared statistics")
        yield call(gaussians, dtype, 256, "kl rows statistics")
        if dtype != FP64:
            yield call(gaussians, dtype, 256, "z kl")
            yield call(gaussians, dtype, 256, "z")
    yield binding(gaussians, FP32, 1, "z kl rows prior", rows=1)
    yield binding(gaussians, BF16, 1003, "z kl prior ids bounds statistics", rows=2)


def gaussians(dtype: torch.dtype, columns: int, parts: str, rows: int = 4096) -> None:
    """parts: z is sampled, the divergence is computed, its sums of rows; the prior, one for each row or shared; ids of
    rows; bounds of logvar and of the divergence; statistics."""
    acc, samples = accumulation_dtype(dtype), 3 if "ids" in parts else 1

    def matrix(of: torch.dtype, part: str = "", count: int = rows) -> Tensor | None:
        return when(part in parts, torch.empty(count, columns, dtype=of))

    mean, logvar = matrix(dtype), matrix(dtype)
    shared, sampled, by_row = "shared" in parts, "z" in parts, "rows" in parts
    given = [matrix(dtype, "shared", 1) if shared else matrix(dtype, "prior") for _ in range(2)]
    ids, seed = when("ids" in parts, indices(rows)), when(sampled, indices())
    inputs = gaussian.Inputs(mean, logvar, *given, ids, seed)
    bounds = (0.1, -8.0, 8.0) if "bounds" in parts else (0.0, -math.inf, math.inf)
    kind = gaussian.NO_KL if "kl" not in parts else gaussian.ROWS if by_row else gaussian.ELEMENTS
    options = gaussian.Options(samples if sampled else -1, False, kind, *bounds)
    z = when(sampled, torch.empty(rows, samples, columns, dtype=dtype))
    tiles, blocks = -(-columns // columns_of_tile(dtype, columns)), -(-rows // ROWS_OF_BLOCK)
    kl = when("kl" in parts, torch.empty(rows, tiles if by_row else columns, dtype=acc))
    statistics = when("statistics" in parts, torch.empty(blocks, 3, columns, dtype=acc))
    gaussian_fwd(inputs, options, gaussian.KernelOutputs(z, kl, statistics), by_row)
    grad_kl = when("kl" in parts, torch.empty((rows,) if by_row else (rows, columns), dtype=acc))
    prior = [matrix(acc, "shared", blocks) if shared else matrix(dtype, "prior") for _ in range(2)]
    filled = gaussian.Gradients(torch.empty_like(mean), torch.empty_like(mean), *prior)
    gaussian_bwd(inputs, options, gaussian.OutputGrads(z, grad_kl), filled, by_row)


def gumbel_calls() -> Iterator[Call]:
    for dtype, columns, output, stats in (
        (FP32, 8192, "hard", False),
        (FP32, 8192, "soft", False),
        (BF16, 320, "none", True),
        (BF16, 50257, "soft", False),
        (FP16, 131072, "hard", True),
        (BF16, 4096, "hard", False),
        (FP32, 3, "soft", False),
        (FP16, 7000, "none", True),
        (FP64, 1000, "soft", True),
        (FP64, 5000, "none", True),
    ):
        yield call(gumbel, dtype, columns, output, stats=stats)
        if not stats:
            yield call(gumbel, dtype, columns, output, ids=True)
    yield call(gumbel, BF16, 320, "none", stats=True, plain=True)
    for dtype, columns, wide, usage in (
        (FP32, 8192, False, False),
        (BF16, 320, True, True),
        (BF16, 320, True, False),
        (FP16, 50257, False, False),
        (BF16, 131072, True, True),
        (FP32, 3, False, True),
        (FP64, 1000, False, True),
        (FP64, 5000, False, True),
    ):
        yield call(gumbel_gradient, dtype, columns, wide=wide, usage=usage)
        yield call(gumbel_gradient, dtype, columns, wide=wide, usage=usage, ids=True, alone=usage, masked=usage)
    for dtype in DTYPES:
        yield call(usage_sums, dtype, 320, masked=True)
        if dtype != FP16:  # as bfloat16, but for the conversions
            yield call(usage_sums, dtype, 7)
            yield call(usage_sums, dtype, 131072)
    for dtype, every in ((BF16, False), (FP64, True)):
        yield binding(gumbel, dtype, 1, "hard", stats=every, ids=every)
        yield binding(gumbel_gradient, dtype, 1, wide=False, usage=every, ids=every, masked=every)
        yield binding(usage_sums, dtype, 1, masked=every)


def logits_of(dtype: torch.dtype, columns: int, ids: bool, noise: bool = True) -> NoisyLogits:
    logits, seed = torch.empty(4099, columns, dtype=dtype), when(noise, indices())
    return NoisyLogits(logits, seed, when(ids, indices(4099)), torch.empty((), dtype=FP64))


def state_of(logits: Tensor) -> State:
    return State(*(logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype)) for _ in range(2)))


def gumbel(
    dtype: torch.dtype, columns: int, output: str, *, stats: bool = False, ids: bool = False, plain: bool = False
) -> None:
    """plain: no noise."""
    source = logits_of(dtype, columns, ids, noise=not plain)
    state = state_of(source.logits)
    y, index = (torch.empty_like(source.logits), None) if output != "none" else (None, indices(4099))
    filled = RowOutputs(y, index, state, when(stats, indices(4099)), state if stats else None)
    gumbel_rows_fwd(source, OUTPUTS[output], filled)


def gumbel_gradient(
    dtype: torch.dtype, columns: int, *, wide: bool, usage: bool, ids: bool = False, alone: bool = False,
    masked: bool = False,
) -> None:  # fmt: skip
    """wide: the gradient of the sample has the accumulation dtype; usage: there is one of the usage, or it `alone`."""
    source, acc = logits_of(dtype, columns, ids), accumulation_dtype(dtype)
    state = state_of(source.logits)
    grads = RowGrads(
        when(not alone, torch.empty(4099, columns, dtype=acc if wide else dtype)),
        when(usage, torch.empty(1, columns, dtype=acc)),
        when(masked, torch.empty(4099, dtype=torch.bool)),
    )
    states = NO_STATE if alone else state, state if usage else NO_STATE
    gumbel_rows_bwd(grads, source, *states, torch.empty_like(source.logits))


def usage_sums(dtype: torch.dtype, columns: int, masked: bool = False) -> None:
    logits = torch.empty(4098, columns, dtype=dtype)
    chunk = chunk_rows(2049, sum_chunks(logits, 2))
    partial = torch.empty(-(-2049 // chunk), 2, columns, dtype=accumulation_dtype(dtype))
    mask = when(masked, torch.empty(4098, dtype=torch.bool))
    probability_sums(logits, state_of(logits), mask, partial, chunk)


def code_calls() -> Iterator[Call]:
    for dtype, metric, codes, dim in (
        (BF16, "l2", 8192, 64),
        (BF16, "cosine", 1024, 256),
        (BF16, "dot", 512, 100),
        (FP16, "l2", 8192, 64),
        (FP32, "l2", 8192, 64),
        (FP32, "dot", 512, 100),
    ):
        yield call(code_search, dtype, metric, codes, dim, rows=65536)
    for dtype, dim in ((FP32, 64), (BF16, 300), (FP16, 100), (FP64, 64)):
        yield call(looked_up, dtype, dim)
    for metric in METRICS:
        yield binding(code_search, FP16, metric, 1, 1, rows=1)
    yield binding(looked_up, FP16, 1)
    yield binding(looked_up, FP16, 64, half_codes=True)


def code_search(dtype: torch.dtype, metric: str, count: int, dim: int, rows: int) -> None:
    input, codebook = torch.empty(rows, dim, dtype=dtype), torch.empty(count, dim, dtype=dtype)
    best_codes(input, codebook, METRICS.index(metric), indices(rows), torch.empty(rows, dtype=FP64))


def looked_up(dtype: torch.dtype, dim: int, half_codes: bool = False) -> None:
    rows, acc = 4099, accumulation_dtype(dtype)
    input, codebook = torch.empty(rows, dim, dtype=dtype), torch.empty(1024, dim, dtype=dtype if half_codes else acc)
    distance, out = torch.empty(rows, dtype=acc), torch.empty_like(input)
    gather_codes(input, codebook, indices(rows), torch.empty(rows, dtype=FP64), out, distance)
    code_difference(torch.empty((), dtype=acc), input, codebook, indices(rows), out)


def energy_calls() -> Iterator[Call]:
    long, wide, wider = (4096, 1000, 1), (16, 64, 4096), (2, 16, 1 << 20)
    yield call(free_energy, FP16, long, "soft")  # as bfloat16, but for the conversions
    yield call(prediction_energy, FP16, (4096, 8, 512), "soft")
    for mode in MODES:
        yield call(free_energy, BF16, (4096, 1024, 1), mode)
        for dtype, *shapes in ((FP32, long, wide), (BF16, long, wide, wider), (FP64, long, wide, wider)):
            for shape in ((65536, 8, 1), *shapes):
                yield call(free_energy, dtype, shape, mode)
            for shape in ((4096, 8, 512), (65536, 10, 24), (8, 64, 1 << 20)):
                yield call(prediction_energy, dtype, shape, mode)
        for dtype in (FP32, FP64):  # the energies of many candidates, from parts of their features
            yield call(prediction_energy, dtype, (1, 1000, 1 << 16), mode)
        yield binding(free_energy, BF16, (3, 1, 1), mode)
        yield binding(free_energy, BF16, (1, 3, 16), mode, value=True)
        yield binding(free_energy, FP64, (1, 2, 3), mode)
        yield binding(prediction_energy, BF16, (1, 1, 1), mode, value=True)
        yield binding(prediction_energy, FP64, (3, 1, 4), mode, value=True)
    yield binding(prediction_energy, FP64, (3, 2, 1), "soft", frozen=True)


def free_energy(dtype: torch.dtype, shape: tuple[int, int, int], mode: str, value: bool = False) -> None:
    """value: only the forward, without its state."""
    energy, options = torch.empty(shape, dtype=dtype), energies.Options(1.0, MODES[mode])
    full = energies.empty_outputs(energy, options, keep_state=True)
    outputs = energies.Outputs(full.value, *(when(not value and part.numel() > 0, part) for part in full.state))
    free_energy_fwd(energy, outputs, options)
    if not value:
        given = when(mode == "soft", energy)
        free_energy_bwd(full.value, given, outputs.state, torch.empty_like(energy), options)


def prediction_energy(
    dtype: torch.dtype, shape: tuple[int, int, int], mode: str, value: bool = False, frozen: bool = False
) -> None:
    """value: the forward without weights but with energies, and the gradient of the target alone; frozen: not of the
    target."""
    inputs = predictions.Inputs(torch.empty(shape, dtype=dtype), torch.empty(shape[0], shape[2], dtype=dtype))
    options = energies.Options(1.0, MODES[mode])
    energy, weights, kept, _ = predictions.empty_outputs(inputs, predictions.Kept(weights=True, stats=True))
    prediction_energy_fwd(inputs, predictions.Filled(energy, when(not value, weights), when(value, kept)), options)
    wanted = not value, not frozen
    filled = predictions.Gradients(*(when(want, torch.empty_like(of)) for want, of in zip(wanted, inputs, strict=True)))
    prediction_energy_bwd(energy, inputs, weights, filled)
