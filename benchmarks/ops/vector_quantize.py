"""vector_quantize: N rows of D features against K codes -> values, indices, commitment and usage, without gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Row, Run
from benchmarks.providers import BACKENDS, COMPILED, EAGER, OURS

OP = "vector_quantize"
BAR_SHAPE = {"N": 65536, "K": 8192, "D": 64}
REFERENCE_LIMIT = 1 << 28  # products that the reference computes in float64 within seconds


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = False,
    bias: bool = False,
) -> Case:
    """Rows and codes are read once, values and indices written once; one product of all rows with all codes."""
    n, k, d = (shape[key] for key in "NKD")
    bytes_ = (2 * n + k) * d * dtype.itemsize + 8 * (n + k)
    return Case(OP, shape, dtype, bytes_, 2 * n * k * d, regime, 0.0, False)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            make_case(BAR_SHAPE),
            make_case({"N": 16384, "K": 1024, "D": 256}, torch.bfloat16),
            make_case({"N": 16384, "K": 1024, "D": 64}, regime="peaked"),
        ]
    large = {"N": 1 << 20, "K": 8192, "D": 64}
    found = [make_case(shape, dtype) for shape in (BAR_SHAPE, large) for dtype in (torch.float32, torch.bfloat16)]
    return [
        *found,
        make_case({"N": 65536, "K": 65536, "D": 32}, torch.bfloat16),
        make_case({"N": 65536, "K": 1024, "D": 256}, torch.bfloat16),
        make_case(BAR_SHAPE, torch.bfloat16, "peaked"),
    ]


def smoke_cases(device: str) -> list[Case]:
    return [
        make_case({"N": 65, "K": 33, "D": 20}),
        make_case({"N": 65, "K": 33, "D": 20}, torch.bfloat16, "peaked"),
    ]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """random: rows and codes without structure. peaked: as of a codebook in use, rows near codes and twins of codes."""
    generator = torch.Generator(device).manual_seed(0)
    n, k, d = (case.shape[key] for key in "NKD")
    x, codebook = (torch.randn(count, d, generator=generator, device=device) for count in (n, k))
    if case.regime == "peaked":
        codebook[k - k // 2 :] = codebook[: k // 2].clone()
        x = codebook[torch.randint(k, (n,), generator=generator, device=device)] + 0.1 * x
    return {"input": x.to(case.dtype), "codebook": codebook.to(case.dtype)}


def cdist(input: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    indices = torch.cdist(input.float(), codebook.float()).argmin(1)
    return F.embedding(indices, codebook), indices


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(cdist, dynamic=False)


def run_of(function: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Callable[[Case, dict[str, Tensor]], Run]:
    def build(case: Case, inputs: dict[str, Tensor]) -> Run:
        return Run(lambda: tuple(function(inputs["input"], inputs["codebook"])))

    return build


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Distances summed up in float64, not expanded; the lowest index where they are equal."""
    x, codebook = inputs["input"].double(), inputs["codebook"].double()
    indices = [
        torch.cdist(part, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for part in x.split(512)
    ]
    indices = torch.cat(indices)
    return codebook[indices], indices


def errors(truth: Sequence[Tensor], results: Sequence[Tensor]) -> dict[str, float]:
    wrong = (results[1] != truth[1]).double().mean()
    return {"values": harness.relative_error(results[0], truth[0]), "part of wrong codes": float(wrong)}


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    patience = providers.patience(device)
    large = case.shape["N"] * case.shape["K"] * case.shape["D"] > REFERENCE_LIMIT
    found = [
        Provider(EAGER, run_of(cdist)),
        Provider(COMPILED, run_of(lambda *tensors: _compiled()(*tensors)), warmups=1, patience=patience),
    ]
    for backend in BACKENDS:
        why_not = providers.why_not(OP, backend, device)
        if backend == "reference" and large:
            why_not = "it computes every distance in float64"
        build = providers.within(backend, run_of(sk.vector_quantize))
        how = {"patience": patience} if backend == "reference" else {}
        found.append(Provider(f"{OURS} {backend}", build, **how, unavailable=why_not))
    return found


def peak_mb(rows: dict[str, Row]) -> float | None:
    """Peak extra memory, results included, of the fastest row of this package, in MB."""
    row = providers.fastest_ours(rows)
    return None if row is None or row.peak_extra is None else row.peak_extra / 1e6


def bars(device: str) -> list[Bar]:
    faster = providers.time_ratio(EAGER, OURS)
    first = cases(device)[0].name
    found = [Bar("times faster than torch.cdist, argmin and gather", first, faster, 2, True)]
    if device == "cpu":
        found.append(Bar("MB of peak extra memory", first, peak_mb, 64))
    return found + [Bar("error of values and codes", case.name, _error, 0) for case in cases(device)]


def _error(rows: dict[str, Row]) -> float | None:
    row = providers.fastest_ours(rows)
    return None if row is None else row.error


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "K", "D"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=lambda case: harness.rows_twin(make_case, case, 1024),
    oracle=oracle,
    errors=errors,
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_vector_quantize(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
