"""negative_sampling_loss: N pairs with K negatives each, from two tables (V, D) -> loss and dense gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider
from benchmarks.providers import COMPILED, EAGER, OURS

OP = "negative_sampling_loss"
LEAVES = ["center_weight", "context_weight"]


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """Each row of the tables that may occur is read once, each index too, and the gradients are written once. What a
    pair keeps for backward, and reading its rows as often as they occur, is not in it."""
    n, k, v, d = (shape[key] for key in "NKVD")
    read = min(n, v) + min(n * (1 + k), v)
    written = 2 * v if backward else 0
    return Case(OP, shape, dtype, (read + written) * d * dtype.itemsize + 8 * n * (2 + k), 0, regime, 0.0, backward)


def cases(device: str) -> list[Case]:
    shape = {"N": 65536, "K": 5, "V": 200_000, "D": 128}
    found = [make_case(shape), make_case(shape, regime="peaked"), make_case(shape, torch.bfloat16)]
    if device == "cpu":
        return found
    large = {"N": 1 << 20, "K": 5, "V": 1_000_000, "D": 128}
    return [
        *found,
        *(
            make_case(large, dtype, regime)
            for dtype in (torch.float32, torch.bfloat16)
            for regime in ("random", "peaked")
        ),
        make_case(large, torch.bfloat16, backward=False),
        make_case({"N": 262144, "K": 20, "V": 400_000, "D": 300}, torch.bfloat16),
    ]


def smoke_cases(device: str) -> list[Case]:
    return [
        make_case({"N": 65, "K": 3, "V": 101, "D": 20}),
        make_case({"N": 65, "K": 3, "V": 101, "D": 20}, torch.bfloat16, "peaked"),
    ]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """random: every word as often. peaked: as in a text (Zipf), negatives by the 3/4 power of it, as word2vec draws."""
    generator = torch.Generator(device).manual_seed(0)
    n, k, v, d = (case.shape[key] for key in "NKVD")
    shapes = {"center": (n,), "context": (n,), "negatives": (n, k)}
    inputs = {}
    for name, shape in shapes.items():
        if case.regime == "random":
            inputs[name] = torch.randint(v, shape, generator=generator, device=device)
            continue
        power = 0.75 if name == "negatives" else 1.0
        frequency = torch.arange(1, v + 1, dtype=torch.float64, device=device).pow(-power).cumsum(0)
        draw = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) * frequency[-1]
        inputs[name] = torch.searchsorted(frequency, draw).clamp_max(v - 1)
    for name in LEAVES:
        inputs[name] = (torch.randn(v, d, generator=generator, device=device) * d**-0.25).to(case.dtype)
    return inputs


def eager_loss(center: Tensor, context: Tensor, negatives: Tensor, u: Tensor, v: Tensor) -> Tensor:
    rows = F.embedding(center, u)
    positive = (rows * F.embedding(context, v)).sum(1)
    negative = torch.bmm(F.embedding(negatives, v), rows.unsqueeze(2)).squeeze(2)
    return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(1)).mean()


def eager(case: Case, t: dict[str, Tensor]) -> Tensor:
    return eager_loss(t["center"], t["context"], t["negatives"], *(t[name] for name in LEAVES))


@functools.cache
def _compiled(device: str):
    return torch.compile(eager_loss, dynamic=True if device == "cpu" else None)  # one compilation for all shapes


def compiled(case: Case, t: dict[str, Tensor]) -> Tensor:
    return _compiled(t["center"].device.type)(t["center"], t["context"], t["negatives"], *(t[name] for name in LEAVES))


def ours(case: Case, t: dict[str, Tensor]) -> Tensor:
    return sk.negative_sampling_loss(t["center"], t["context"], t["negatives"], *(t[name] for name in LEAVES))


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = {name: inputs[name].double().requires_grad_() for name in LEAVES}
    loss = eager(case, {**inputs, **leaves})
    return (loss.detach(), *torch.autograd.grad(loss, list(leaves.values())))


def twin(case: Case) -> Case:
    return harness.rows_twin(make_case, case, 2048)


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    return [
        Provider(EAGER, providers.loss_run(eager, LEAVES)),
        Provider(COMPILED, providers.loss_run(compiled, LEAVES), warmups=1, patience=providers.patience(device)),
        *providers.backend_providers(OP, device, ours, LEAVES),
    ]


def negatives_mb(case: Case) -> float:
    """MB of the rows of the negatives, (N, K, D)."""
    return case.shape["N"] * case.shape["K"] * case.shape["D"] * case.dtype.itemsize / 1e6


def bars(device: str) -> list[Bar]:
    found = []
    for case in (c for c in cases(device) if c.backward):
        if device == "cpu" and case.regime == "random" and case.dtype == torch.float32:
            ratio = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, ratio, 3, True))
        what = "MB beyond the gradients, against those of an (N, K, D) tensor"
        found.append(Bar(what, case.name, providers.memory_mb, negatives_mb(case)))
    return found + providers.error_bars(cases(device))


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "K", "V", "D"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=twin,
    oracle=oracle,
    errors=harness.named_errors(["loss", "center_weight.grad", "context_weight.grad"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_negative_sampling(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
