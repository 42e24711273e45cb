"""prediction_energy: predictions (B, K, D) against targets (B, D) -> loss and the gradients of both.

The floor is memory. Forward reads the predictions and the targets once; backward reads again what has a derivative, all
of them for the soft minimum and one prediction a target for the hard one, and writes both gradients. `PASSES` does that
and nothing else with torch: on a CPU the first touch of a gradient's pages costs more than writing them, which no count
of bytes shows.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import COMPILED, EAGER, OURS

OP = "prediction_energy"
LEAVES = ["prediction", "target"]
PASSES = "torch passes over the same bytes"
SOFT = "soft"  # the regime of cases whose minimum is soft; else it is the hard one


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    batch, count, dim = (shape[key] for key in "BKD")
    rows = count + 1
    if backward:
        rows += (count + 1 if regime == SOFT else 2) + count + 1
    return Case(OP, shape, dtype, batch * rows * dim * dtype.itemsize, 0, regime, 0.0, backward)


def cases(device: str) -> list[Case]:
    shape = {"B": 4096, "K": 8, "D": 512}
    regimes = [(dtype, regime) for dtype in (torch.float32, torch.bfloat16) for regime in ("random", SOFT)]
    found = [make_case(shape, dtype, regime) for dtype, regime in regimes]
    found.append(make_case({"B": 16, "K": 8, "D": 262_144}))
    if device == "cpu":
        return found
    shapes = [(65536, 8, 512), (1 << 20, 8, 16), (64, 64, 196_608), (4, 8, 1 << 24)]
    return [*found, *(make_case(dict(zip("BKD", s, strict=True)), d, r) for s in shapes for d, r in regimes)]


def smoke_cases(device: str) -> list[Case]:
    shape = {"B": 13, "K": 5, "D": 24}
    return [make_case(shape), make_case(shape, torch.bfloat16, SOFT)]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Energies a few units apart, so that the soft minimum has several candidates."""
    generator = torch.Generator(device).manual_seed(1)
    batch, count, dim = (case.shape[key] for key in "BKD")
    target = torch.randn(batch, dim, generator=generator, device=device)
    noise = torch.randn(batch, count, dim, generator=generator, device=device)
    prediction = noise.mul_(dim**-0.25).add_(target.unsqueeze(1))
    return {"prediction": prediction.to(case.dtype), "target": target.to(case.dtype)}


def dense(prediction: Tensor, target: Tensor, soft: bool) -> Tensor:
    energies = ((prediction - target.unsqueeze(1)) ** 2).flatten(2).sum(-1)
    if not soft:
        return energies.amin(1).mean()
    return (math.log(energies.shape[1]) - torch.logsumexp(-energies, 1)).mean()


def eager(case: Case, t: dict[str, Tensor]) -> Tensor:
    return dense(*(t[name] for name in LEAVES), case.regime == SOFT)


@functools.cache
def _compiled(device: str):
    return torch.compile(dense, dynamic=True if device == "cpu" else None)


def compiled(case: Case, t: dict[str, Tensor]) -> Tensor:
    return _compiled(t["target"].device.type)(*(t[name] for name in LEAVES), case.regime == SOFT)


def ours(case: Case, t: dict[str, Tensor]) -> Tensor:
    return sk.prediction_energy(*(t[name] for name in LEAVES), mode="soft" if case.regime == SOFT else "min")


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = [inputs[name].double().requires_grad_() for name in LEAVES]
    loss = dense(*leaves, case.regime == SOFT)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _passes(case: Case, t: dict[str, Tensor]) -> Run:
    """Sums of the words that are read, and gradients that are filled."""
    words = [t[name].view(torch.float32) for name in LEAVES]
    again = words if case.regime == SOFT else [words[0][:, 0], words[1]]

    def call() -> tuple[Tensor, ...]:
        for part in [*words, *(again if case.backward else [])]:
            part.sum()
        return tuple(torch.full_like(t[name], 1.0) for name in LEAVES) if case.backward else ()

    return Run(call)


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    return [
        Provider(EAGER, providers.loss_run(eager, LEAVES)),
        Provider(COMPILED, providers.loss_run(compiled, LEAVES), warmups=1, patience=providers.patience(device)),
        Provider(PASSES, _passes, is_floor=True),
        *providers.backend_providers(OP, device, ours, LEAVES),
    ]


def bars(device: str) -> list[Bar]:
    found = []
    for case in cases(device):
        found.append(Bar("MB beyond the gradients", case.name, providers.memory_mb, 4.0))
        if device == "cpu":
            found.append(Bar(f"median / {PASSES}", case.name, providers.time_ratio(OURS, PASSES), 1.0))
            faster = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, faster, 5, True))
        else:
            found.append(Bar("median / time at the speed of light", case.name, providers.over_light, 1.3))
    return found + providers.error_bars(cases(device))


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("B", "K", "D"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=lambda case: make_case({**case.shape, "B": min(case.shape["B"], 256)}, case.dtype, case.regime),
    oracle=oracle,
    errors=harness.named_errors(["loss", "grad prediction", "grad target"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_prediction_energy(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
