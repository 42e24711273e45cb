"""Runs Triton code as on a GPU up to the launch itself, and prints the names of the compiled kernels as JSON.

Unlike the interpreter this specialises arguments: strides of 1, absent tensors, integers of 32 or 64 bits. The calls
are functions `triton_calls(size, every)` of the test modules, which are discovered: `size` is a dimension to use, and
`every` selects all optional arguments and int32 indices rather than no option and int64. Tensors are on the CPU, the
backend is "triton", and results stay uninitialised.

It is a separate program because kernels cannot be compiled in a process that has TRITON_INTERPRET set.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import sslkernels as sk
from sslkernels.contrastive.query_negatives import NegativeInputs, NegativeOutputs, RowMerge
from sslkernels.contrastive.score_tiles import (
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    GradientOutputs,
    Labels,
    RowSums,
    SideGrad,
    Thresholds,
    Tile,
)
from sslkernels.contrastive.triton import tile_sums
from sslkernels.contrastive.triton.query_negatives import query_negatives
from sslkernels.contrastive.triton.tile_gradients import add_gradients
from sslkernels.contrastive.triton.tile_weighted_sums import add_weighted_sums
from sslkernels.contrastive.triton.word2vec import negative_sampling_fwd
from sslkernels.contrastive.word2vec import Indices, Outputs, Tables
from sslkernels.core import backends
from sslkernels.core.triton.segment_sum import weighted_row_sums
from sslkernels.latent.triton.free_energy import free_energy_bwd, free_energy_fwd
from sslkernels.latent.triton.gaussian import columns_of_tile, gaussian_bwd, gaussian_fwd
from sslkernels.latent.triton.gumbel_rows import TritonGumbelRows
from sslkernels.latent.triton.nearest_code import best_codes
from sslkernels.latent.triton.prediction_energy import prediction_energy_bwd, prediction_energy_fwd
from sslkernels.latent.triton.vector_quantize import code_difference, gather_codes

FIXED_SHIFT_FROM = 2  # pairs
TESTS = Path(__file__).parent
SIZES = (1, 16, 1003)  # Triton specialises integers that are 1 and integers that are divisible by 16


class NoDevice:
    """The part of a driver that the compiler uses."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record_instead_of_launching() -> list[str]:
    compiled = []
    compile_and_launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel.name)
        return kernel

    JITFunction.run = run
    driver.set_active(NoDevice())
    return compiled


def bind_codes(size: int, every: bool) -> None:
    """Equal and different dtypes, each metric."""
    x, codebook = (torch.zeros(n, size, dtype=torch.float16) for n in (3, size))
    codebook = codebook.float() if every else codebook
    index, score, distance = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for metric in range(3):
        best_codes(x, codebook, metric, index, score)
    gather_codes(x, codebook, index, score, x.clone(), distance)
    code_difference(distance, x, codebook, index, x.float() if every else x.clone())


def bind_own(size: int, every: bool) -> None:
    rows, count, dim = 2, size % 100, size
    query, negatives = torch.zeros(rows, dim, dtype=torch.bfloat16), torch.zeros(rows, count, dim, dtype=torch.bfloat16)
    one, values = torch.ones(1), torch.zeros(rows)
    mask = torch.ones(rows, count, dtype=torch.bool) if every else None
    if every:
        inputs = NegativeInputs(query, negatives, mask, values, one, one)
        merge = RowMerge(SOFTMAX, values, values, values, False)
        wide = (torch.zeros(rows, count), values, query.float(), torch.zeros_like(negatives), values, values)
        return query_negatives(inputs, merge, NegativeOutputs(*wide))
    inputs = NegativeInputs(query, negatives, mask, None, one, None)
    outputs = NegativeOutputs(*[torch.zeros(0)] * 6)._replace(value=values)
    query_negatives(inputs, RowMerge(SIGMOID, None, None, None, False), outputs)


def bind_gaussian(columns: int, every: bool) -> None:
    rows, dtype = 2, torch.bfloat16 if every else torch.float32
    mean, z = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, 3, columns, dtype=dtype)
    priors = (mean[:1], mean) if every else (None, None)
    inputs = (mean, mean, *priors, torch.zeros(rows, dtype=torch.int64) if every else None)
    inputs += (torch.zeros((), dtype=torch.int64), 0.1 if every else 0.0, -1.0 if every else -math.inf, math.inf)
    parts, blocks = -(-columns // columns_of_tile(dtype, columns)), torch.zeros(1, 3, columns)
    gaussian_fwd(*inputs, z, torch.zeros(rows, parts), True, blocks if every else None)
    prior_grads = (blocks[:, 0].contiguous(), torch.zeros_like(mean)) if every else (None, None)
    gaussian_bwd(*inputs, z, mean.float(), False, mean, mean, *prior_grads)


def bind_negative_sampling(dim: int, every: bool) -> None:
    index_dtype = torch.int32 if every else torch.int64
    pairs, negatives = 2, dim if every else 1
    index, table = torch.zeros(pairs, dtype=index_dtype), torch.zeros(3, dim, dtype=torch.float16)
    drawn = torch.zeros(pairs, negatives, dtype=index_dtype)
    shapes = ((pairs, 1 + negatives), (pairs, dim)) if every else (0, 0)
    outputs = Outputs(torch.zeros(pairs), *(torch.zeros(shape) for shape in shapes))
    negative_sampling_fwd(Tables(table, table), Indices(index, index, drawn), every, outputs)
    keys, order = torch.zeros(2 * pairs, dtype=torch.int32), torch.arange(2 * pairs)
    source, source_index = (table, index) if every else (torch.zeros(2 * pairs, dim), None)
    starts = torch.zeros(4, dtype=torch.int64)
    per_source = 2 if every else 1
    weighted_row_sums(keys, order, starts, torch.ones(2 * pairs), source, source_index, table, per_source)


def bind_gumbel(columns: int, every: bool) -> None:
    """One row per program and several, with and without optional tensors."""
    dtype = torch.float64 if every else torch.bfloat16
    acc = torch.float64 if every else torch.float32
    kernels = TritonGumbelRows()
    for width in (columns, 9001):
        logits, index = torch.zeros(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        stream = (torch.zeros((), dtype=torch.int64), index if every else None, 2**40 if every else 0)
        tau, state = torch.ones((), dtype=torch.float64), (torch.zeros(2, dtype=acc), torch.ones(2, dtype=acc))
        for output in (0, 1, 2):
            y = logits if output else None
            plain = (index, state) if every else (None, None)
            kernels.forward(logits, stream, tau, output, y, None if output else index, state, *plain)
        kernels.forward(logits, (None, None, 0), tau, 0, None, index, state)
        grad, uses = logits.to(acc), logits[:1].to(acc)
        mask = torch.ones(2, dtype=torch.bool) if every else None
        kernels.backward(grad, None, None, logits, stream, tau, state, None, logits)
        kernels.backward(logits, uses, mask, logits, stream, tau, state, state, logits)
        kernels.backward(None, uses, mask, logits, stream, tau, None, state, logits)
        kernels.probability_sums(logits, state, mask, 2 if every else 1)


def bind_energies(size: int, every: bool) -> None:
    """`size` is the number of candidates, of results, or of features."""
    dtype = torch.float64 if every else torch.bfloat16
    acc = torch.float64 if every else torch.float32
    for shape in ((3, size, 1), (1, 3, size), (size, 2, 3)):
        energy, values = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], shape[2], dtype=acc)
        winner = torch.zeros(values.shape, dtype=torch.int64)
        free_energy_fwd(energy, values, *((values, values) if every else (None, None)), None, 1.0, False)
        free_energy_fwd(energy, values, None, None, winner if every else None, 1.0, True)
        free_energy_bwd(values, energy, values, values, None, energy, 1.0)
        free_energy_bwd(values, None, None, None, winner, energy, 1.0)
    for batch, count, dim in ((3, 2, size), (1, size, 4)):
        prediction, target = torch.zeros(batch, count, dim, dtype=dtype), torch.zeros(batch, dim, dtype=dtype)
        value, weights = torch.zeros(batch, dtype=acc), torch.zeros(batch, count, dtype=acc)
        for minimum in (False, True):
            prediction_energy_fwd(prediction, target, value, weights if every else None, 1.0, minimum)
        prediction_energy_bwd(value, prediction, target, weights, prediction, target if every else None)
        prediction_energy_bwd(value, prediction, target, weights, None, target)


def bind_pairs(columns: int, every: bool) -> None:
    for dim in (64, 400):
        bind_pairs_of(columns, dim, every)


def bind_pairs_of(columns: int, dim: int, every: bool) -> None:
    """Small D in float16, large D in bfloat16, with and without optional tensors."""
    features = [torch.zeros(n, dim, dtype=torch.float16 if dim <= 256 else torch.bfloat16) for n in (2, columns)]
    norms = [torch.ones(n) if every else None for n in (2, columns)]
    labels = Labels(*(torch.zeros(n, dtype=torch.int32) if every else None for _ in range(3) for n in (2, columns)))
    numbers = torch.ones(1), torch.ones(1) if every else None
    tile = Tile(*features, torch.empty(2, columns, dtype=features[0].dtype), *norms, *numbers, SOFTMAX, labels, every)
    zeros = [torch.zeros(n, dtype=torch.float64) for n in (2, columns)]
    rows = RowSums(
        torch.zeros(2), zeros[0], None, *([zeros[0]] * 3 if every else [None] * 3), zeros[0].long() if every else None
    )
    sums = ColumnSums(torch.zeros(columns), zeros[1], None, *([zeros[1]] * 2 if every else [None] * 2))
    thresholds = Thresholds(None, None, torch.zeros(2))
    tile_sums.FIXED_SHIFT_PAIRS = FIXED_SHIFT_FROM
    tile_sums.add_sums(tile, rows, sums, thresholds, norms if every else None)
    tile_sums.add_sums(tile, rows, None, thresholds, norms if every else None)
    tile_sums.add_sums(tile._replace(energy=SIGMOID), RowSums(None, zeros[0], *[None] * 5), None, thresholds, None)
    sides = [SideGrad(*[torch.zeros(n)] * (4 if every else 2)) for n in (2, columns)]
    gradients = [torch.zeros(n, dim) for n in (2, columns)]
    totals = (zeros[0], zeros[0].clone())
    add_gradients(tile, *sides, GradientOutputs(*totals, *gradients))
    add_gradients(tile, sides[0], SideGrad(), GradientOutputs(*totals, None, None))
    sigmoid, weight = tile._replace(energy=SIGMOID), SideGrad(torch.zeros(2))
    cost = RowSums(None, zeros[0].clone(), *[None] * 5)
    for grad_queries in (gradients[0], None):
        add_gradients(sigmoid, weight, SideGrad(), GradientOutputs(*totals, grad_queries, None, cost))
    if dim <= 256:
        frozen = RowSums(torch.zeros(2), zeros[0], *[None] * 5)
        add_weighted_sums(tile._replace(ids_positive=False), frozen, gradients[0], torch.zeros(2))


# Calls whose test module has no `triton_calls` yet.
CALLS = (bind_codes, bind_own, bind_gaussian, bind_negative_sampling, bind_gumbel, bind_energies, bind_pairs)


def discovered_calls() -> Iterator[Callable[[int, bool], None]]:
    for path in sorted(TESTS.rglob("test_*.py")):
        if "\ndef triton_calls(" in path.read_text():
            sys.path.insert(0, str(path.parent))
            yield importlib.import_module(path.stem).triton_calls


if __name__ == "__main__":
    sys.path.append(str(TESTS / "oracles"))
    compiled = record_instead_of_launching()
    backends._why_not_triton = lambda device: None
    with sk.use_backend("triton"):
        for call in (*discovered_calls(), *CALLS):
            for every in (False, True):
                for size in SIZES:
                    call(size, every)
    json.dump(sorted(set(compiled)), sys.stdout)
