"""Calls the Triton launchers as on a GPU up to the launch itself, and prints the kernels that they compiled as JSON.

The interpreter never specialises arguments; this does: strides of 1, absent tensors, integers of either width. A
program of its own, for the same reason as `benchmarks.triton_resources`.
"""

import json
import math
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sslkernels.contrastive.score_tiles import SIGMOID, SOFTMAX, ColumnSums, Labels, RowSums, Side, Thresholds, Tile
from sslkernels.contrastive.triton import tile_sums
from sslkernels.contrastive.triton.query_negatives import own_negatives
from sslkernels.contrastive.triton.tile_gradients import add_gradients
from sslkernels.contrastive.triton.tile_weighted_sums import add_weighted_sums
from sslkernels.contrastive.triton.word2vec import negative_sampling_fwd
from sslkernels.core.triton.scale import scale_
from sslkernels.core.triton.segment_sum import weighted_row_sums
from sslkernels.latent import free_energy, gaussian_operators, prediction_energy
from sslkernels.latent.gaussian_operators import ELEMENTS, ROWS, KernelOutputs, OutputGrads
from sslkernels.latent.gumbel_rows import NoisyLogits, RowGrads, RowOutputs, State, TritonGumbelRows
from sslkernels.latent.triton.free_energy import free_energy_bwd, free_energy_fwd
from sslkernels.latent.triton.gaussian import columns_of_tile, gaussian_bwd, gaussian_fwd
from sslkernels.latent.triton.nearest_code import best_codes
from sslkernels.latent.triton.prediction_energy import prediction_energy_bwd, prediction_energy_fwd
from sslkernels.latent.triton.vector_quantize import code_difference, gather_codes
from sslkernels.random.triton.streams import random_stream
from sslkernels.vocabulary.softmax_rows import RowOptions, TritonRows, empty_outputs
from sslkernels.vocabulary.triton.linear_cross_entropy import stream_forward
from sslkernels.vocabulary.triton.linear_sample import linear_sample
from sslkernels.vocabulary.triton.mask_tokens import mask_tokens

PLAIN = RowOptions(-100, 0.0, 0.0, 0.0)
EVERY = RowOptions(1, 0.1, 1e-3, 30.0, 0.7)


FIXED_SHIFT_FROM = 2  # pairs


class NoDevice:
    """What the compiler asks of a driver."""

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


def bind_rows(vocab: int, options: RowOptions, index_dtype: torch.dtype) -> None:
    every = options is EVERY
    logits = torch.zeros(2, vocab, dtype=torch.bfloat16)
    target = torch.zeros(2, dtype=index_dtype)
    bias, weight = (torch.zeros(vocab), torch.ones(vocab)) if every else (None, None)
    coefficient = torch.ones(()).expand(2)
    outputs = TritonRows().forward(logits, target, bias, weight, options, stats=every)
    TritonRows().forward(logits, target, bias, weight, options, stats=every, coefficient=coefficient, grad=logits)
    TritonRows().backward(logits, target, bias, weight, options, outputs.state, coefficient, logits)


def bind_stream(vocab: int, dim: int, options: RowOptions, index_dtype: torch.dtype) -> None:
    every = options is EVERY
    input, linear_weight = torch.zeros(2, dim, dtype=torch.float16), torch.zeros(vocab, dim, dtype=torch.float16)
    target = torch.zeros(2, dtype=index_dtype)
    bias, weight = (torch.zeros(vocab), torch.ones(vocab)) if every else (None, None)
    row_index = torch.zeros(2, dtype=index_dtype) if every else None
    outputs = empty_outputs(input, 2 if row_index is None else row_index.shape[0], every)
    stream_forward(input, linear_weight, target, bias, weight, outputs, options, every, row_index=row_index)


def bind_sample(vocab: int, dim: int, every: bool) -> None:
    x, weight = torch.zeros(2, dim, dtype=torch.float16), torch.zeros(vocab, dim, dtype=torch.float16)
    bias, ids = torch.zeros(vocab) if every else None, torch.arange(2)
    linear_sample(x, weight, bias, torch.zeros((), dtype=torch.int64), ids, torch.float16, 0.7)


def bind_codes(codes: int, dim: int, every: bool) -> None:
    """Each metric, with input and codebook of one dtype or of two."""
    x, codebook = torch.zeros(3, dim, dtype=torch.float16), torch.zeros(codes, dim, dtype=torch.float16)
    codebook = codebook.float() if every else codebook
    index, score, distance = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for metric in range(3):
        best_codes(x, codebook, metric, index, score)
    gather_codes(x, codebook, index, score, x.clone(), distance)
    code_difference(distance, x, codebook, index, x.float() if every else x.clone())


def bind_random(columns: int, id_dtype: torch.dtype, every: bool) -> None:
    seed = torch.zeros((), dtype=torch.int64)
    ids = torch.zeros(2, columns, dtype=id_dtype)
    special = torch.zeros(2, columns, dtype=torch.bool) if every else None
    words = torch.zeros(2, columns, dtype=id_dtype) if every else None
    row_ids = torch.zeros(2, dtype=torch.int64) if every else None
    random_stream("normal", seed, row_ids, 2, columns, 2**40 if every else 0, torch.bfloat16)
    thresholds = (2**32, 2**31, 5, 2**32, 2**32)
    for chained in (False, True):
        args = (ids, seed, special, words if chained else None, row_ids, ids, ids, *thresholds)
        mask_tokens(*args, 3, 100, (0, 4, 7, 8), -100, chained=chained)


def bind_own(size: int, every: bool) -> None:
    rows, count, dim = 2, size % 100, size
    query, negatives = torch.zeros(rows, dim, dtype=torch.bfloat16), torch.zeros(rows, count, dim, dtype=torch.bfloat16)
    one, values = torch.ones(1), torch.zeros(rows)
    mask = torch.ones(rows, count, dtype=torch.bool) if every else None
    outputs = (torch.zeros(rows, count), values, query.float(), torch.zeros_like(negatives), values, values)
    empty = torch.zeros(0)
    some = (values, one, one, 0, values, values, values) if every else (None, one, None, 1, None, None, None)
    outputs = outputs if every else (empty, values, *[empty] * 4)
    own_negatives(query, negatives, mask, *some, False, outputs)


def bind_gaussian(columns: int, every: bool) -> None:
    rows, dtype = 2, torch.bfloat16 if every else torch.float32
    mean, z = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, 3, columns, dtype=dtype)
    priors = (mean[:1], mean) if every else (None, None)
    row_ids = torch.zeros(rows, dtype=torch.int64) if every else None
    inputs = gaussian_operators.Inputs(mean, mean, *priors, row_ids, torch.zeros((), dtype=torch.int64))
    bounds = (0.1, -1.0) if every else (0.0, -math.inf)
    options = gaussian_operators.Options(3, False, ROWS, *bounds, math.inf)
    parts, blocks = -(-columns // columns_of_tile(dtype, columns)), torch.zeros(1, 3, columns)
    gaussian_fwd(inputs, options, KernelOutputs(z, torch.zeros(rows, parts), blocks if every else None), True)
    prior_grads = (blocks[:, 0].contiguous(), torch.zeros_like(mean)) if every else (None, None)
    filled = gaussian_operators.Gradients(mean, mean, *prior_grads)
    gaussian_bwd(inputs, options._replace(kl=ELEMENTS), OutputGrads(z, mean.float()), filled, False)


def bind_negative_sampling(dim: int, index_dtype: torch.dtype, every: bool) -> None:
    pairs, negatives = 2, dim if every else 1
    index, table = torch.zeros(pairs, dtype=index_dtype), torch.zeros(3, dim, dtype=torch.float16)
    drawn = torch.zeros(pairs, negatives, dtype=index_dtype)
    slopes, direction = (torch.zeros(pairs, 1 + negatives), torch.zeros(pairs, dim)) if every else (None, None)
    negative_sampling_fwd(index, index, drawn, table, table, torch.zeros(pairs), slopes, direction, every)
    keys, order = torch.zeros(2 * pairs, dtype=torch.int32), torch.arange(2 * pairs)
    source, source_index = (table, index) if every else (torch.zeros(2 * pairs, dim), None)
    starts = torch.zeros(4, dtype=torch.int64)
    per_source = 2 if every else 1
    weighted_row_sums(keys, order, starts, torch.ones(2 * pairs), source, source_index, table, per_source)


def bind_gumbel(columns: int, every: bool) -> None:
    """One row a program and several, with and without what may be absent."""
    dtype = torch.float64 if every else torch.bfloat16
    acc = torch.float64 if every else torch.float32
    kernels = TritonGumbelRows()
    for width in (columns, 9001):
        logits, index = torch.zeros(2, width, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        seed, tau = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.float64)
        source = NoisyLogits(logits, seed, index if every else None, tau)
        state = State(torch.zeros(2, dtype=acc), torch.ones(2, dtype=acc))
        stats = {"best": index, "softmax_state": state} if every else {}
        for output in (0, 1, 2):
            filled = RowOutputs(logits if output else None, None if output else index, state, **stats)
            kernels.forward(source, output, filled)
        kernels.forward(NoisyLogits(logits, None, None, tau), 0, RowOutputs(None, index, state))
        usage, mask = logits[:1].to(acc), torch.ones(2, dtype=torch.bool) if every else None
        kernels.backward(RowGrads(logits.to(acc), None, None), source, state, None, logits)
        kernels.backward(RowGrads(logits, usage, mask), source, state, state, logits)
        kernels.backward(RowGrads(None, usage, mask), source, None, state, logits)
        kernels.probability_sums(logits, state, mask, 2 if every else 1)


def bind_energies(size: int, every: bool) -> None:
    """One dimension of `size`: the candidates, the results, the features."""
    dtype = torch.float64 if every else torch.bfloat16
    acc = torch.float64 if every else torch.float32
    soft, hard = free_energy.Options(1.0, False), free_energy.Options(1.0, True)
    for shape in ((3, size, 1), (1, 3, size), (size, 2, 3)):
        energy, values = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], shape[2], dtype=acc)
        winner, sums = torch.zeros(values.shape, dtype=torch.int64), (values, values) if every else (None, None)
        free_energy_fwd(energy, free_energy.Outputs(values, *sums, None), soft)
        free_energy_fwd(energy, free_energy.Outputs(values, None, None, winner if every else None), hard)
        free_energy_bwd(values, energy, free_energy.State(values, values, None), energy, soft)
        free_energy_bwd(values, None, free_energy.State(None, None, winner), energy, hard)
    for batch, count, dim in ((3, 2, size), (1, size, 4)):
        prediction, target = torch.zeros(batch, count, dim, dtype=dtype), torch.zeros(batch, dim, dtype=dtype)
        value, weights = torch.zeros(batch, dtype=acc), torch.zeros(batch, count, dtype=acc)
        inputs = prediction_energy.Inputs(prediction, target)
        for options in (soft, hard):
            prediction_energy_fwd(inputs, prediction_energy.Outputs(value, weights if every else None), options)
        both = prediction_energy.Gradients(prediction, target if every else None)
        for gradients in (both, prediction_energy.Gradients(None, target)):
            prediction_energy_bwd(value, inputs, weights, gradients)


def bind_pairs(columns: int, dim: int, every: bool) -> None:
    """Small D in float16, large D in bfloat16, with and without what may be absent."""
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
    sides = [Side(*[torch.zeros(n)] * (4 if every else 2)) for n in (2, columns)]
    gradients = [torch.zeros(n, dim) for n in (2, columns)]
    add_gradients(tile, *sides, zeros[0], zeros[0].clone(), *gradients)
    add_gradients(tile, sides[0], Side(), zeros[0], zeros[0].clone(), None, None)
    sigmoid, weight = tile._replace(energy=SIGMOID), Side(torch.zeros(2))
    for grad_queries in (gradients[0], None):
        add_gradients(sigmoid, weight, Side(), zeros[0], zeros[0].clone(), grad_queries, None, zeros[0].clone())
    if dim <= 256:
        frozen = RowSums(torch.zeros(2), zeros[0], *[None] * 5)
        add_weighted_sums(tile._replace(ids_positive=False), frozen, gradients[0], torch.zeros(2))


if __name__ == "__main__":
    compiled = record_instead_of_launching()
    for options, index_dtype in ((PLAIN, torch.int64), (EVERY, torch.int32)):
        for size in (1, 16, 1003):
            bind_rows(size, options, index_dtype)
            bind_stream(size, size, options, index_dtype)
            bind_random(size, index_dtype, options is EVERY)
            bind_sample(size, size, options is EVERY)
            bind_codes(size, size, options is EVERY)
            bind_gaussian(size, options is EVERY)
            bind_negative_sampling(size, index_dtype, options is EVERY)
            bind_pairs(size, 64, options is EVERY)
            bind_pairs(size, 400, options is EVERY)
            scale_(torch.ones(size), torch.ones(()))
            bind_own(size, options is EVERY)
            bind_energies(size, options is EVERY)
            bind_gumbel(size, options is EVERY)
    json.dump(sorted(set(compiled)), sys.stdout)
