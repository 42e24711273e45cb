"""info_nce with negatives of each query's own: (N, D), (N, D), (N, K, D) -> loss and all gradients."""

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

OP = "info_nce"
LEAVES = ["query", "positive_key", "negative_keys"]
TEMPERATURE = 0.1


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """All features are read once, all gradients written once."""
    rows, count, width = shape["N"], shape["K"], shape["D"]
    return Case(OP, shape, dtype, 2 * rows * (count + 2) * width * dtype.itemsize, 0, regime, 0.0, True, False)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shape = {"N": 4096, "K": 32, "D": 256}
        return [make_case(shape), make_case(shape, torch.bfloat16)]
    shapes = [(8192, 32, 1024), (65536, 8, 512), (4096, 256, 768)]
    return [make_case({"N": n, "K": k, "D": d}, torch.bfloat16) for n, k, d in shapes]


def smoke_cases(device: str) -> list[Case]:
    shape = {"N": 13, "K": 5, "D": 24}
    return [make_case(shape), make_case(shape, torch.bfloat16)]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    rows, count, width = (case.shape[key] for key in ("N", "K", "D"))
    query, noise = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    negatives = torch.randn(rows, count, width, generator=generator, device=device)
    values = {"query": query, "positive_key": query + noise, "negative_keys": negatives}
    return {name: value.to(case.dtype) for name, value in values.items()}


def dense(query: Tensor, positive_key: Tensor, negative_keys: Tensor) -> Tensor:
    query, positive_key, negative_keys = (F.normalize(t, dim=-1) for t in (query, positive_key, negative_keys))
    own = torch.einsum("nd,nkd->nk", query, negative_keys)
    scores = torch.cat([(query * positive_key).sum(1, keepdim=True), own], 1)
    return F.cross_entropy(scores / TEMPERATURE, torch.zeros(len(query), dtype=torch.long, device=query.device))


def eager(case: Case, t: dict[str, Tensor]) -> Tensor:
    return dense(*(t[name] for name in LEAVES))


@functools.cache
def _compiled(device: str):
    return torch.compile(dense, dynamic=True if device == "cpu" else None)


def compiled(case: Case, t: dict[str, Tensor]) -> Tensor:
    return _compiled(t["query"].device.type)(*(t[name] for name in LEAVES))


def ours(case: Case, t: dict[str, Tensor]) -> Tensor:
    return sk.info_nce(*(t[name] for name in LEAVES), temperature=TEMPERATURE, negative_mode="paired")


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = [inputs[name].double().requires_grad_() for name in LEAVES]
    loss = dense(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    return [
        Provider(EAGER, providers.loss_run(eager, LEAVES)),
        Provider(COMPILED, providers.loss_run(compiled, LEAVES), warmups=1, patience=providers.patience(device)),
        *providers.backend_providers(OP, device, ours, LEAVES),
    ]


def bars(device: str) -> list[Bar]:
    found = []
    for case in cases(device):
        if device == "cpu":
            faster = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, faster, 2, True))
        else:
            found.append(Bar("median / time at the speed of light", case.name, providers.over_light, 1.3))
    return found + providers.error_bars(cases(device))


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "K", "D"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=lambda case: make_case({**case.shape, "N": min(case.shape["N"], 256)}, case.dtype),
    oracle=oracle,
    errors=harness.named_errors(["loss", "grad query", "grad positive_key", "grad negative_keys"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_own_negatives(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
