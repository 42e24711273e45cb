"""random_normal: normal numbers (N, D) from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import EAGER, OURS

OP = "random_normal"
SEED = 1


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = False,
    bias: bool = False,
) -> Case:
    """Each number is written once, and nothing is read."""
    return Case(OP, shape, dtype, shape["N"] * shape["D"] * dtype.itemsize, backward=False)


def cases(device: str) -> list[Case]:
    shape = {"N": 1 << 14, "D": 4096} if device == "cpu" else {"N": 1 << 16, "D": 4096}
    return [make_case(shape), make_case(shape, torch.bfloat16)]


def smoke_cases(device: str) -> list[Case]:
    return [make_case({"N": 33, "D": 131}), make_case({"N": 33, "D": 132}, torch.bfloat16)]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    return {"seed": torch.tensor(SEED, device=device)}


def eager(case: Case, inputs: dict[str, Tensor]) -> Run:
    shape, device = (case.shape["N"], case.shape["D"]), inputs["seed"].device
    return Run(lambda: (torch.randn(shape, dtype=case.dtype, device=device),))


def ours(case: Case, inputs: dict[str, Tensor]) -> Run:
    shape = (case.shape["N"], case.shape["D"])
    return Run(lambda: (sk.random_normal(shape, inputs["seed"], dtype=case.dtype),))


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    """Without the reference, which emulates fused operations in float64."""
    found = [Provider(EAGER, eager)]
    for backend in providers.BACKENDS:
        if backend != "reference":
            build, reason = providers.within(backend, ours), providers.why_not(OP, backend, device)
            found.append(Provider(f"{OURS} {backend}", build, unavailable=reason))
    return found


def errors(inputs: dict[str, Tensor], results: Sequence[Tensor]) -> dict[str, float]:
    """How far the mean and the mean square are beyond six standard deviations of what they should be."""
    (values,) = results
    n = values.numel()
    mean, square = float(values.double().mean()), float(values.double().square().mean())
    rounding = torch.finfo(values.dtype).eps
    return {
        "mean": max(0.0, abs(mean) - 6 / math.sqrt(n) - rounding),
        "mean square": max(0.0, abs(square - 1) - 6 * math.sqrt(2 / n) - rounding),
    }


def bars(device: str) -> list[Bar]:
    if device != "cpu":
        return []
    ratio = providers.time_ratio(EAGER, OURS)
    return [Bar("times faster than torch.randn", case.name, ratio, 6, True) for case in cases(device)]


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "D"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=lambda case: case,
    oracle=lambda case, inputs: inputs,
    errors=errors,
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_random_normal(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
