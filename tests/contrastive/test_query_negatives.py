"""`query_negatives_` on every backend against autograd in float64."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BACKENDS
from kernel_files import kernels
from query_negatives_oracle import (
    FEATURES,
    NAMES,
    OwnCase,
    assert_results,
    by_index,
    compute,
    gradient_by_index,
    make,
    oracle,
    pairs,
    pairwise_cases,
    wanted_outputs,
)

import sslkernels as sk
from sslkernels.contrastive.query_negatives import (
    HINGE,
    SIGMOID,
    SOFTMAX,
    NegativeInputs,
    RowMerge,
    empty_outputs,
    query_negatives_,
)
from sslkernels.core import native

pytestmark = pytest.mark.pairwise

ENERGIES = (SOFTMAX, SIGMOID, HINGE)
CASES = {str(case): case for case in pairwise_cases()}


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """The backends of this operator, which has more than the functions that use it."""
    reason = query_negatives_.implementations.why_not(request.param, torch.device(device))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with sk.use_backend(request.param):
        yield request.param


def check(case: OwnCase, device: str) -> None:
    inputs = make(case)
    assert_results(inputs, wanted_outputs(inputs, compute(inputs, device)))


def check_by_index(case: OwnCase, device: str, index: torch.dtype = torch.int64) -> None:
    inputs = make(case)
    found = wanted_outputs(inputs, compute(by_index(inputs, index, bank=index == torch.int64), device))
    if "grad_negatives" in found:
        found["grad_negatives"] = gradient_by_index(inputs, found["grad_negatives"])
    assert_results(inputs, found)


def test_cases_cover_every_pair_of_values():
    met = set().union(*(pairs(dataclasses.asdict(case)) for case in CASES.values()))
    for (a, of_a), (b, of_b) in itertools.combinations(FEATURES.items(), 2):
        assert {(a, x, b, y) for x in of_a for y in of_b} <= met


@pytest.mark.parametrize("name", CASES)
def test_against_float64(backend, device, name):
    check(CASES[name], device)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", list(CASES)[1::3])
def test_by_index_against_float64(backend, device, name, index):
    check_by_index(CASES[name], device, index)


@pytest.mark.parametrize("tile", [(2, 512), (4, 32), (8, 16)], ids=str)
@pytest.mark.parametrize("name", list(CASES)[::5])
def test_triton_tiles(device, monkeypatch, name, tile):
    """Rows of several tiles and negatives of several blocks, like long ones."""
    if reason := query_negatives_.implementations.why_not("triton", torch.device(device)):
        pytest.skip(reason)
    from sslkernels.contrastive.triton import query_negatives as launcher
    from sslkernels.core.triton.launch import Config

    def small(count, dim, dtype, by_index, capability):
        block_k, block_d = tile
        whole = {"ONE_TILE": count <= block_k and dim <= block_d, "ONE_BLOCK": dim <= block_d}
        return Config({**whole, "BLOCK_K": block_k, "BLOCK_D": block_d}, {"num_warps": 1})

    monkeypatch.setattr(launcher, "config", small)
    with sk.use_backend("triton"):
        check(CASES[name], device)
        check_by_index(CASES[name], device)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (1, 1, 1)], ids=str)
def test_empty_shapes(backend, device, energy, normalise, shape):
    for reference in ("near", "none", "empty"):
        check(OwnCase(energy=energy, shape=shape, normalise=normalise, reference=reference), device)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scale", [1e3, 1e4, -1e4, 1e-4, 0.0])
@pytest.mark.parametrize("reference", ["near", "above", "below", "none", "final"])
def test_scores_of_any_size(backend, device, scale, reference, normalise):
    energies = ENERGIES if scale != 0 else (SOFTMAX, SIGMOID)
    for energy in energies:
        if scale == 0:
            inputs = make(OwnCase(energy=energy, reference="near", normalise=normalise))
            inputs.logit_scale = torch.zeros_like(inputs.logit_scale)
            got = wanted_outputs(inputs, compute(inputs, device))
            want = oracle(inputs)
            for name in NAMES:
                torch.testing.assert_close(got[name].cpu().double(), want[name], rtol=1e-4, atol=1e-5)
        else:
            check(OwnCase(energy=energy, scale=scale, reference=reference, normalise=normalise), device)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("normalise", [False, True])
def test_nan_stays_in_its_row(backend, device, energy, normalise):
    inputs = make(OwnCase(energy=energy, normalise=normalise, mask="some", smoothing=True))
    inputs.mask[:, 0] = True
    inputs.negatives[inputs.mask.logical_not()] = float("nan")
    inputs.negatives[:, 0].nan_to_num_(0.5, 0.5)
    clean = wanted_outputs(inputs, compute(inputs, device))
    inputs.query[1, 3] = float("nan")
    inputs.negatives[3, 0, 2] = float("nan")
    got = wanted_outputs(inputs, compute(inputs, device))
    for name in NAMES:
        assert torch.equal(got[name][[0, 2, 4]], clean[name][[0, 2, 4]]), name
        if name not in ("scores", "grad_negatives"):
            assert bool(got[name][[1, 3]].isnan().reshape(2, -1).any(1).all()), name
    assert bool(got["grad_negatives"][1][inputs.mask[1]].isnan().any())
    assert bool(got["grad_negatives"][3, 0].isnan().any())
    assert bool((got["grad_negatives"].cpu()[~inputs.mask] == 0).all())


@pytest.mark.parametrize("energy", ENERGIES)
def test_negatives_of_norm_zero(backend, device, energy):
    """Norms of 0 and below 1e-12: no projection, all results finite."""
    inputs = make(OwnCase(energy=energy, normalise=True, smoothing=True))
    inputs.negatives[0, 1] = 0
    inputs.negatives[1, 2] *= 1e-15
    inputs.negatives[2, 3] *= 1e-9
    assert_results(inputs, wanted_outputs(inputs, compute(inputs, device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalise", [False, True])
def test_error_is_at_most_that_of_eager(backend, device, dtype, normalise):
    """In the norm of each result; half precision rounds only where the gradient of the negatives is written."""
    inputs = make(OwnCase(dtype=dtype, shape=(16, 32, 96), normalise=normalise, reference="near"))
    want = oracle(inputs)
    got = wanted_outputs(inputs, compute(inputs, device))
    leaves = [t.detach().requires_grad_() for t in (inputs.query, inputs.negatives)]
    x, n = leaves
    if normalise:
        x = x * inputs.query_inverse_norm.to(dtype).unsqueeze(1)
        n = torch.nn.functional.normalize(n, dim=2)
    scores = torch.einsum("nd,nkd->nk", x, n) * inputs.logit_scale.to(dtype)
    value = torch.cat([inputs.reference.to(dtype).unsqueeze(1), scores], 1).logsumexp(1)
    grads = torch.autograd.grad(value, leaves, inputs.coefficient.to(dtype))
    eager = {"value": value, "grad_query": grads[0], "grad_negatives": grads[1]}
    for name, other in eager.items():
        size = want[name].norm()
        error = (got[name].cpu().double() - want[name]).norm() / size
        eager_error = (other.double() - want[name]).norm() / size
        rounding = torch.finfo(dtype).eps / 2 if name == "grad_negatives" else 0
        assert error <= eager_error + rounding + 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.full_for(backend="triton")
def test_repeats_to_the_bit(backend, device):
    inputs = make(OwnCase(shape=(5, 33, 65), normalise=True, mask="some", dtype=torch.bfloat16))
    first, second = (compute(inputs, device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [OwnCase(mask="some", normalise=True), OwnCase(gradient=False, scores=False)], ids=str)
def test_fake_and_schema(backend, device, case):
    inputs, merge = make(case).records(device)
    wanted = (case.query, case.negatives, case.scores)
    outputs = empty_outputs(inputs, case.gradient, *wanted)
    flat = tuple(query_negatives_.inputs.pack((inputs, merge, outputs)))
    torch.library.opcheck(query_negatives_.raw, flat, test_utils=("test_schema", "test_faketensor"))


def test_unaligned_negatives(backend, device):
    """A view that does not start at a multiple of 16 bytes."""
    for dtype, dim in ((torch.bfloat16, 24), (torch.float32, 17)):
        inputs = make(OwnCase(dtype=dtype, shape=(3, 5, dim), normalise=True))
        storage = torch.empty(inputs.negatives.numel() + 3, dtype=dtype)
        view = storage[3:].view_as(inputs.negatives)
        view.copy_(inputs.negatives)
        inputs.negatives = view
        assert_results(inputs, wanted_outputs(inputs, compute(inputs, device)))


@pytest.mark.full
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_compiled_instruction_set(isa):
    if native.extension is None:
        pytest.skip("no compiled extension")
    code = (
        "import torch, sslkernels as sk\n"
        "from query_negatives_oracle import OwnCase, assert_results, compute, make, wanted_outputs\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "    for energy in range(3):\n"
        "        inputs = make(OwnCase(dtype, energy, (5, 9, 77), normalise=energy != 1, mask='some'))\n"
        "        with sk.use_backend('cpu'): outputs = compute(inputs)\n"
        "        assert_results(inputs, wanted_outputs(inputs, outputs))\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests/oracles")))
    environment = {**os.environ, "SSLKERNELS_CPU_ISA": isa, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


@kernels("info_nce")
@pytest.mark.large
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(backend, device):
    rows, count, dim = 2049, 1024, 1024
    inputs = make(OwnCase(dtype=torch.bfloat16, shape=(1, count, dim), reference="near"))
    repeated = {
        name: value.expand(rows, *value.shape[1:]).contiguous()
        for name in ("query", "negatives", "reference", "coefficient")
        if (value := getattr(inputs, name)) is not None
    }
    got = compute(dataclasses.replace(inputs, **repeated), device)
    last = {name: part[-1:] for name, part in got._asdict().items()}
    assert_results(inputs, last)


def test_scores_of_minus_infinity_have_no_gradient(backend, device):
    """A row without a score to compare with has no softmax, and its weights are 0."""
    query, negatives = torch.randn(2, 3, device=device), torch.randn(2, 4, 3, device=device)
    scale, bias = (torch.tensor([value], device=device) for value in (2.0, float("-inf")))
    inputs = NegativeInputs(query, negatives, None, None, None, None, scale, bias)
    outputs = empty_outputs(inputs, True, True, True, True)
    merge = RowMerge(SOFTMAX, None, torch.ones(2, device=device), None, False)
    query_negatives_(inputs, merge, outputs)
    assert outputs.value.isneginf().all()
    for gradient in outputs[2:]:
        assert torch.equal(gradient, torch.zeros_like(gradient))
