"""Pieces of providers that the benchmark files share: losses with gradients, the backends of this package, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks.harness import Bar, Benchmark, Case, Provider, Row, Run
from sslkernels.core import backends

OURS = "sslkernels"
EAGER = "eager torch"
COMPILED = "torch.compile"
BACKENDS = ("cpu", "cuda", "triton", "reference")

Loss = Callable[[Case, dict[str, Tensor]], Tensor]
Build = Callable[[Case, dict[str, Tensor]], Run]


def loss_run(loss: Loss, leaves: Sequence[str]) -> Build:
    """Builds a run that returns the loss and, where the case has a backward, fresh gradients of `leaves`."""

    def build(case: Case, inputs: dict[str, Tensor]) -> Run:
        present = [name for name in leaves if name in inputs]
        tensors = {**inputs, **{name: inputs[name].detach().requires_grad_(case.backward) for name in present}}

        def call() -> tuple[Tensor, ...]:
            if not case.backward:
                with torch.no_grad():
                    return (loss(case, tensors),)
            value = loss(case, tensors)
            return (value.detach(), *torch.autograd.grad(value, [tensors[name] for name in present]))

        return Run(call)

    return build


def backend_providers(
    public: str, device: torch.device, loss: Loss, leaves: Sequence[str], label: str = ""
) -> list[Provider]:
    """One provider for each backend of the public function."""
    providers = []
    for backend in BACKENDS:
        providers.append(
            Provider(
                f"{OURS} {backend}{label}",
                within(backend, loss_run(loss, leaves)),
                patience=patience(device) if backend == "reference" else math.inf,
                unavailable=why_not(public, backend, device),
            )
        )
    return providers


def patience(device: torch.device) -> float:
    """Of the providers that no bar is about: on a CPU they are timed once where they take more than half a second."""
    return 0.5 if device.type == "cpu" else math.inf


def why_not(public: str, backend: str, device: torch.device) -> str | None:
    if backend == "triton" and device.type == "cpu":
        return "it runs on cuda tensors"
    return backends.why_not(public, backend, device)


def within(backend: str, build: Build) -> Build:
    """The run of `build` with `backend` chosen, backward included."""

    def built(case: Case, inputs: dict[str, Tensor]) -> Run:
        run = build(case, inputs)

        def call() -> Sequence[Tensor]:
            with sk.use_backend(backend):
                return run.call()

        return run._replace(call=call)

    return built


def fastest_ours(rows: dict[str, Row]) -> Row | None:
    """The fastest row of this package, the reference left out."""
    ours = [r for r in rows.values() if r.provider.startswith(OURS) and "reference" not in r.provider]
    timed = [r for r in ours if r.median is not None]
    return min(timed, key=lambda r: r.median) if timed else None


def time_ratio(over: str, under: str) -> Callable[[dict[str, Row]], float | None]:
    """Median of `over` / median of `under`; `OURS` stands for the fastest row of this package."""

    def value(rows: dict[str, Row]) -> float | None:
        pair = [fastest_ours(rows) if name == OURS else rows.get(name) for name in (over, under)]
        if any(row is None or row.median is None for row in pair):
            return None
        return pair[0].median / pair[1].median

    return value


def memory_mb(rows: dict[str, Row]) -> float | None:
    """Peak extra memory beyond the gradients of the fastest row of this package, in MB."""
    row = fastest_ours(rows)
    return None if row is None or row.beyond_results is None else row.beyond_results / 1e6


def over_light(rows: dict[str, Row]) -> float | None:
    """Median of the fastest row of this package / its time at the speed of light."""
    row = fastest_ours(rows)
    return None if row is None else 1 / row.light


def over_fastest_peer(rows: dict[str, Row]) -> float | None:
    peers = [row for row in rows.values() if row.provider.startswith("peer") and row.median is not None]
    row = fastest_ours(rows)
    return None if row is None or not peers else row.median / min(peer.median for peer in peers)


def error_over_eager(rows: dict[str, Row]) -> float | None:
    """The largest amount by which an error of ours exceeds that of eager torch."""
    row, eager = fastest_ours(rows), rows.get(EAGER)
    if row is None or eager is None or not row.errors or not eager.errors:
        return None
    return max(row.errors[name] - eager.errors[name] for name in row.errors)


def error_bars(cases: list[Case]) -> list[Bar]:
    """Accuracy: at most the error of eager torch, plus four units in the last place of float32."""
    limit = 4 * torch.finfo(torch.float32).eps
    return [
        Bar("error against float64 above that of eager torch", case.name, error_over_eager, limit) for case in cases
    ]


def test_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smoke_parameters(benchmark: Benchmark) -> list:
    """(case, provider name) for every smoke case; what cannot run here becomes a skip with its reason."""
    device = test_device()
    parameters = []
    for case in benchmark.smoke_cases(device.type):
        for provider in benchmark.providers(case, device):
            marks = [pytest.mark.skip(reason=provider.unavailable)] if provider.unavailable is not None else []
            if device.type == "cuda" and provider.name.startswith(OURS):
                marks += [pytest.mark.gpu, pytest.mark.sanitize]
            parameters.append(pytest.param(case, provider, marks=marks, id=f"{case.name}-{provider.name}"))
    return parameters


def smoke(fixture, benchmark: Benchmark, case: Case, provider: Provider) -> None:
    """Runs one provider under pytest-benchmark and holds its error against float64 to twice that of the baseline plus
    16 rounding units of float32. Peers only have to run: their errors are in the table."""
    device = test_device()
    inputs = benchmark.inputs(case, device)
    run = provider.build(case, inputs)
    fixture.group = case.name

    def prepare() -> None:
        if run.prepare is not None:
            run.prepare()

    def call() -> Sequence[Tensor]:
        results = run.call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return results

    results = fixture.pedantic(call, setup=prepare, rounds=5, warmup_rounds=1)
    if provider.checked and not provider.is_floor:
        oracle = benchmark.oracle(case, inputs)
        baseline = next(p for p in benchmark.providers(case, device) if p.name == benchmark.baseline)
        allowed = benchmark.errors(oracle, baseline.build(case, inputs).call())
        for name, error in benchmark.errors(oracle, results).items():
            assert error <= 2 * allowed[name] + 16 * torch.finfo(torch.float32).eps, name
