"""cross_entropy: logits (N, V) -> loss and the gradient of the logits."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, peers, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider
from benchmarks.providers import COMPILED, EAGER, OURS

OP = "cross_entropy"
LEAVES = ["logits"]


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """The logits are read once and their gradient is written once; the rest is below a thousandth of that."""
    logits = shape["N"] * shape["V"] * dtype.itemsize
    read = round(logits * (1 - ignored))
    return Case(OP, shape, dtype, read + (logits if backward else 0), 0, regime, ignored, backward)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [make_case({"N": 4096, "V": 50257})]
    shapes = [(8192, 128256), (16384, 30522), (8192, 50265), (8192, 50368), (8192, 250002), (8192, 256000)]
    found = [make_case({"N": n, "V": v}, torch.bfloat16) for n, v in shapes]
    for n, v in shapes[:3]:
        shape = {"N": n, "V": v}
        found.append(make_case(shape, torch.float32))
        found.append(make_case(shape, torch.bfloat16, "peaked"))
        found += [make_case(shape, torch.bfloat16, ignored=part) for part in (0.7, 0.85)]
    return found


def smoke_cases(device: str) -> list[Case]:
    shape = {"N": 33, "V": 1003}
    return [make_case(shape), make_case(shape, torch.bfloat16, "peaked", 0.7)]


def make_targets(case: Case, device: torch.device) -> Tensor:
    """int64 targets, the given part of them (to a whole row) ignored, at random places."""
    generator = torch.Generator(device).manual_seed(0)
    rows = case.shape["N"]
    target = torch.randint(case.shape["V"], (rows,), generator=generator, device=device)
    target[torch.randperm(rows, generator=generator, device=device)[: round(rows * case.ignored)]] = -100
    return target


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """random: normal logits. peaked: twice that, and the target 4 to 24 above, as a trained model has them."""
    generator = torch.Generator(device).manual_seed(1)
    rows, vocab = case.shape["N"], case.shape["V"]
    target = make_targets(case, device)
    logits = torch.randn(rows, vocab, generator=generator, device=device)
    if case.regime == "peaked":
        lead = 4 + 20 * torch.rand(rows, 1, generator=generator, device=device)
        logits.mul_(2).scatter_add_(1, target.clamp_min(0)[:, None], lead)
    return {"logits": logits.to(case.dtype), "target": target}


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logits = inputs["logits"].double().requires_grad_()
    loss = F.cross_entropy(logits, inputs["target"])
    return (loss.detach(), *torch.autograd.grad(loss, logits))


def twin(case: Case) -> Case:
    return harness.rows_twin(make_case, case, 256)


def eager(case: Case, t: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(t["logits"], t["target"])


@functools.cache
def _compiled(device: str):
    return torch.compile(F.cross_entropy, dynamic=True if device == "cpu" else None)  # one compilation for all shapes


def compiled(case: Case, t: dict[str, Tensor]) -> Tensor:
    return _compiled(t["target"].device.type)(t["logits"], t["target"])


def ours(case: Case, t: dict[str, Tensor]) -> Tensor:
    return sk.cross_entropy(t["logits"], t["target"])


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    return [
        Provider(EAGER, providers.loss_run(eager, LEAVES)),
        Provider(COMPILED, providers.loss_run(compiled, LEAVES), warmups=1, patience=providers.patience(device)),
        *providers.backend_providers(OP, device, ours, LEAVES),
        *peers.cross_entropy(device),
    ]


def bars(device: str) -> list[Bar]:
    found = providers.error_bars(cases(device))
    if device == "cpu":
        name = cases(device)[0].name
        found.insert(0, Bar("times faster than eager torch", name, providers.time_ratio(EAGER, OURS), 2.5, True))
    else:
        for case in cases(device):
            found.append(Bar("median / time at the copy bandwidth", case.name, providers.over_light, 1.15))
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
    oracle=oracle,
    errors=harness.named_errors(["loss", "grad input"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_cross_entropy(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
