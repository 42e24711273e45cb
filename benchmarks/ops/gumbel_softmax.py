"""gumbel_softmax: logits (N, V) -> one-hot or soft samples, and the gradient of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import COMPILED, EAGER, OURS

OP = "gumbel_softmax"
SOFT = "soft"  # regime: samples that are not one-hot
TAU = 1.0


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """Logits read and samples written; for the gradient logits and that of the samples read, and it is written."""
    logits = shape["N"] * shape["V"] * dtype.itemsize
    return Case(OP, shape, dtype, logits * (5 if backward else 2), 0, regime, 0.0, backward)


def cases(device: str) -> list[Case]:
    shape = {"N": 4096, "V": 8192}
    found = [make_case(shape), make_case(shape, torch.bfloat16), make_case(shape, regime=SOFT)]
    if device == "cpu":
        return [*found, make_case({"N": 1 << 20, "V": 2})]
    large = [{"N": 1 << 15, "V": 8192}, {"N": 1 << 20, "V": 320}, {"N": 8192, "V": 50257}, {"N": 4, "V": 1 << 20}]
    return [
        *found,
        *(make_case(shape, torch.bfloat16, regime) for shape in large for regime in ("random", SOFT)),
        make_case(large[0], torch.bfloat16, backward=False),
    ]


def smoke_cases(device: str) -> list[Case]:
    return [make_case({"N": 33, "V": 131}), make_case({"N": 33, "V": 132}, torch.bfloat16, SOFT)]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.shape["N"], case.shape["V"])
    return {n: torch.randn(shape, generator=generator, device=device).to(case.dtype) for n in ("logits", "grad")}


Sample = Callable[[Tensor, bool], Tensor]


def sample_run(sample: Sample) -> Callable[[Case, dict[str, Tensor]], Run]:
    def build(case: Case, inputs: dict[str, Tensor]) -> Run:
        logits = inputs["logits"].detach().requires_grad_(case.backward)
        hard = case.regime != SOFT

        def call() -> tuple[Tensor, ...]:
            y = sample(logits, hard)
            return (y.detach(), *torch.autograd.grad(y, logits, inputs["grad"])) if case.backward else (y,)

        return Run(call)

    return build


def eager(logits: Tensor, hard: bool) -> Tensor:
    return F.gumbel_softmax(logits, TAU, hard)


@functools.cache
def _compiled(device: str):
    return torch.compile(F.gumbel_softmax, dynamic=True if device == "cpu" else None)


def compiled(logits: Tensor, hard: bool) -> Tensor:
    return _compiled(logits.device.type)(logits, TAU, hard)


def ours(logits: Tensor, hard: bool) -> Tensor:
    return sk.gumbel_softmax(logits, TAU, hard, seed=1)


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    """Without the reference, which emulates fused operations in float64."""
    found = [
        Provider(EAGER, sample_run(eager)),
        Provider(COMPILED, sample_run(compiled), warmups=1, patience=providers.patience(device)),
    ]
    for backend in providers.BACKENDS:
        if backend != "reference":
            build, reason = providers.within(backend, sample_run(ours)), providers.why_not(OP, backend, device)
            found.append(Provider(f"{OURS} {backend}", build, unavailable=reason))
    return found


def twin(case: Case) -> Case:
    shape = {**case.shape, "N": min(case.shape["N"], 256)}
    return make_case(shape, case.dtype, case.regime, backward=case.backward)


def errors(case: Case, results: Sequence[Tensor]) -> dict[str, float]:
    """Of what must be so whatever noise a provider draws: hard samples are one-hot, soft ones and gradients add up to 1
    and 0. In units of the dtype's rounding; against float64 with the same noise the tests hold it."""
    y, *grads = (result.double() for result in results)
    rounding = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps
    found = {"sum of a sample": float((y.sum(1) - 1).abs().max()) / rounding}
    if case.regime != SOFT:
        found["part of samples that are not one-hot"] = float(
            ((y == 0) | (y == 1)).all(1).logical_not().double().mean()
        )
    for grad in grads:
        found["sum of a gradient"] = float(grad.sum(1).norm() / grad.norm()) / rounding
    return found


def bars(device: str) -> list[Bar]:
    found = []
    for case in cases(device):
        if device == "cpu" and case.shape["N"] == 4096:
            ratio = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, ratio, 5, True))
        what = "MB beyond samples and gradients, against the logits"
        logits = case.shape["N"] * case.shape["V"] * case.dtype.itemsize / 1e6
        found.append(Bar(what, case.name, providers.memory_mb, logits / 2))
    return found


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "V"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=twin,
    oracle=lambda case, inputs: case,
    errors=errors,
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_gumbel_softmax(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
