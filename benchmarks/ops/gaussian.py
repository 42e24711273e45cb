"""gaussian_rsample: mean and logvar (N, D) -> K samples, their divergence from a standard normal, and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import COMPILED, EAGER, OURS

OP = "gaussian_rsample"
SEED = 1
FASTER = {1: 8, 8: 10}  # than eager torch in float32 on a CPU, by K


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """mean and logvar are read and z is written; then the gradient of z, mean and logvar are read, and two gradients
    written. The divergence is a number a row."""
    elements, samples = shape["N"] * shape["D"], shape["K"]
    moved = elements * (2 + samples + (samples + 4 if backward else 0))
    return Case(OP, shape, dtype, moved * dtype.itemsize + 4 * shape["N"], 0, backward=backward)


def cases(device: str) -> list[Case]:
    one, eight = {"N": 1 << 16, "K": 1, "D": 256}, {"N": 1 << 13, "K": 8, "D": 256}
    if device == "cpu":
        return [make_case(one), make_case(eight), make_case(one, torch.bfloat16)]
    one, eight = {"N": 1 << 20, "K": 1, "D": 256}, {"N": 1 << 17, "K": 8, "D": 256}
    return [
        *(make_case(one, dtype, backward=b) for dtype in (torch.bfloat16, torch.float32) for b in (True, False)),
        make_case(eight, torch.bfloat16),
        make_case({**one, "N": 1 << 22, "D": 64}, torch.bfloat16),
        make_case({**one, "N": 1 << 13, "D": 32768}, torch.bfloat16),
    ]


def smoke_cases(device: str) -> list[Case]:
    return [
        make_case({"N": 33, "K": 1, "D": 37}),
        make_case({"N": 17, "K": 3, "D": 24}, torch.bfloat16),
    ]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    n, k, d = case.shape.values()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    z = normal(n, d) if k == 1 else normal(n, k, d)
    inputs = {"mean": normal(n, d), "logvar": 0.1 * normal(n, d), "grad_z": z}
    return {name: tensor.to(case.dtype) for name, tensor in inputs.items()}


def eager_sample(mean: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """As it is written in most VAEs."""
    std = torch.exp(0.5 * logvar)
    divergence = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=-1)
    if samples == 1:
        return mean + std * torch.randn_like(std), divergence
    noise = torch.randn(mean.shape[0], samples, mean.shape[1], dtype=mean.dtype, device=mean.device)
    return mean.unsqueeze(1) + std.unsqueeze(1) * noise, divergence


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(eager_sample)


def compiled_sample(mean: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    return _compiled()(mean, logvar, samples)


def fused_sample(mean: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    return sk.gaussian_rsample(mean, logvar, None if samples == 1 else samples, seed=SEED)


def sample_run(sample: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Case, dict[str, Tensor]], Run]:
    """Results: what does not depend on the noise, then what does."""

    def build(case: Case, inputs: dict[str, Tensor]) -> Run:
        leaves = [inputs[name].detach().requires_grad_(case.backward) for name in ("mean", "logvar")]

        def call() -> tuple[Tensor, ...]:
            if not case.backward:
                with torch.no_grad():
                    z, kl = sample(*leaves, case.shape["K"])
                return kl, z
            z, kl = sample(*leaves, case.shape["K"])
            mean_kl = kl.mean()
            grads = torch.autograd.grad([z, mean_kl], leaves, [inputs["grad_z"], torch.ones_like(mean_kl)])
            return kl.detach(), *grads, z.detach()

        return Run(call)

    return build


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    mean, logvar = (inputs[name].double().requires_grad_() for name in ("mean", "logvar"))
    kl = 0.5 * (mean.square() + logvar.expm1() - logvar).sum(-1)
    if not case.backward:
        return (kl.detach(),)
    grad_z = inputs["grad_z"].double()
    (of_kl,) = torch.autograd.grad(kl.mean(), mean)
    return kl.detach(), of_kl + (grad_z if grad_z.dim() == 2 else grad_z.sum(1))


def twin(case: Case) -> Case:
    return harness.rows_twin(make_case, case, 2048)


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    found = [
        Provider(EAGER, sample_run(eager_sample)),
        Provider(COMPILED, sample_run(compiled_sample), warmups=1, patience=providers.patience(device)),
    ]
    for backend in providers.BACKENDS:
        if backend != "reference" or case.shape["N"] * case.shape["K"] * case.shape["D"] < 1 << 20:
            build = providers.within(backend, sample_run(fused_sample))
            reason = providers.why_not(OP, backend, device)
            found.append(Provider(f"{OURS} {backend}", build, unavailable=reason))
    return found


def tensor_mb(case: Case) -> float:
    return case.shape["N"] * case.shape["D"] * case.dtype.itemsize / 1e6


def bars(device: str) -> list[Bar]:
    found = []
    for case in (c for c in cases(device) if c.backward):
        if device == "cpu" and case.dtype == torch.float32:
            ratio = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, ratio, FASTER[case.shape["K"]], True))
        found.append(Bar("MB beyond the results, against mean", case.name, providers.memory_mb, 0.25 * tensor_mb(case)))
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
    twin=twin,
    oracle=oracle,
    errors=harness.named_errors(["kl", "mean.grad"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_gaussian(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
