"""linear_sample: hidden states (N, D) and weight (V, D) -> an index drawn from their softmax, and its logprob."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import EAGER, OURS

OP = "linear_sample"
EAGER_GUMBEL = "eager Gumbel-max"
FLOOR = "one matmul (floor)"


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = False,
    bias: bool = False,
) -> Case:
    """Hidden states and weight are read, 12 bytes a row written; one matmul. The noise is integers and not in it."""
    n, d, v = (shape[key] for key in ("N", "D", "V"))
    return Case(OP, shape, dtype, (n + v) * d * dtype.itemsize + 12 * n, 2 * n * d * v, regime, backward=False)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shape = {"N": 512, "D": 768, "V": 50257}
        return [make_case(shape), make_case(shape, regime="peaked"), make_case({**shape, "N": 4})]
    return [
        make_case({"N": n, "D": d, "V": v}, torch.bfloat16, regime)
        for n, d, v in ((1, 4096, 128256), (64, 4096, 128256), (1024, 4096, 128256), (8192, 768, 50265))
        for regime in ("random", "peaked")
    ]


def smoke_cases(device: str) -> list[Case]:
    shape = {"N": 33, "D": 64, "V": 1003}
    return [make_case(shape), make_case(shape, torch.bfloat16, "peaked")]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """random: logits of unit variance. peaked: six times that."""
    generator = torch.Generator(device).manual_seed(1)
    n, d, v = (case.shape[key] for key in ("N", "D", "V"))
    spread = 6.0 if case.regime == "peaked" else 1.0
    weight = torch.randn(v, d, generator=generator, device=device).mul_(spread * d**-0.5)
    hidden = torch.randn(n, d, generator=generator, device=device)
    return {"input": hidden.to(case.dtype), "weight": weight.to(case.dtype)}


def eager(case: Case, t: dict[str, Tensor]) -> Run:
    def call() -> Sequence[Tensor]:
        probability = (t["input"] @ t["weight"].t()).softmax(-1, dtype=torch.float32)
        index = torch.multinomial(probability, 1)
        return index[:, 0], probability.gather(1, index)[:, 0].log()

    return Run(call)


def eager_gumbel(case: Case, t: dict[str, Tensor]) -> Run:
    def call() -> Sequence[Tensor]:
        logits = (t["input"] @ t["weight"].t()).float()
        index = (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)
        return index, logits.log_softmax(-1).gather(1, index[:, None])[:, 0]

    return Run(call)


def matmul(case: Case, t: dict[str, Tensor]) -> Run:
    logits = torch.empty(case.shape["N"], case.shape["V"], dtype=case.dtype, device=t["weight"].device)
    return Run(lambda: (torch.mm(t["input"], t["weight"].t(), out=logits),), owned=(logits,))


def ours(case: Case, t: dict[str, Tensor]) -> Run:
    return Run(lambda: sk.linear_sample(t["input"], t["weight"], seed=0))


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    """Without the reference, whose noise emulates fused operations in float64."""
    found = [Provider(EAGER, eager), Provider(EAGER_GUMBEL, eager_gumbel), Provider(FLOOR, matmul, is_floor=True)]
    for backend in providers.BACKENDS:
        if backend != "reference":
            build, reason = providers.within(backend, ours), providers.why_not(OP, backend, device)
            found.append(Provider(f"{OURS} {backend}", build, unavailable=reason))
    return found


def errors(inputs: dict[str, Tensor], results: Sequence[Tensor]) -> dict[str, float]:
    """Of the log-probability of what was drawn."""
    index, logprob = results
    exact = (inputs["input"].double() @ inputs["weight"].double().t()).log_softmax(-1).gather(1, index[:, None])[:, 0]
    return {"logprob": float((logprob.double() - exact).abs().max() / exact.abs().max())}


def bars(device: str) -> list[Bar]:
    found = []
    for case in cases(device):
        if case.shape["N"] > 4:
            found.append(Bar("median / one matmul", case.name, providers.time_ratio(OURS, FLOOR), 1.25))
            found.append(Bar("times faster than eager torch", case.name, providers.time_ratio(EAGER, OURS), 1.5, True))
        else:
            found.append(Bar("median / eager torch", case.name, providers.time_ratio(OURS, EAGER), 1.1))
        found.append(Bar("MB beyond the results", case.name, providers.memory_mb, 32))
    return found + providers.error_bars(cases(device))


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "D", "V"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=lambda case: harness.rows_twin(make_case, case, 64),
    oracle=lambda case, inputs: inputs,
    errors=errors,
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_linear_sample(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
