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
from sslkernels.core import backends
from sslkernels.latent.triton.free_energy import free_energy_bwd, free_energy_fwd
from sslkernels.latent.triton.gaussian import columns_of_tile, gaussian_bwd, gaussian_fwd
from sslkernels.latent.triton.gumbel_rows import TritonGumbelRows
from sslkernels.latent.triton.nearest_code import best_codes
from sslkernels.latent.triton.prediction_energy import prediction_energy_bwd, prediction_energy_fwd
from sslkernels.latent.triton.vector_quantize import code_difference, gather_codes

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


# Calls whose test module has no `triton_calls` yet.
CALLS = (bind_codes, bind_gaussian, bind_gumbel, bind_energies)


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
