"""gaussian_rsample: mean and logvar (N, D) -> K samples, their divergence from a standard normal, and gradients;
gaussian_kl: the divergence alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Build, Case, Inputs, Run
from benchmarks.providers import EAGER, OURS

SEED = 1
FASTER = {1: 8, 8: 10}  # K -> bar on a CPU in float32: times faster than eager torch


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=-1)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    n, d, k = case.shape["N"], case.shape["D"], case.shape.get("K", 1)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    z = normal(n, d) if k == 1 else normal(n, k, d)
    inputs = {"mean": normal(n, d), "logvar": 0.1 * normal(n, d), "grad_z": z}
    return {name: tensor.to(case.dtype) for name, tensor in inputs.items()}


class GaussianRsample(Benchmark):
    op = "gaussian_rsample"
    shape_keys = ("N", "K", "D")
    names = leaves = ("mean", "logvar")
    results = ("kl", "mean.grad")
    dynamic = {"cpu": None, "cuda": None}  # noqa: RUF012
    twin_rows = 2048
    host = HostCase({"N": 32, "K": 1, "D": 16}, 2.0)
    inputs = staticmethod(make_inputs)

    def cost(self, case: Case) -> tuple[int, int]:
        """Forward reads mean and logvar and writes z and one divergence a row. Backward reads mean, logvar and the
        gradient of z, and writes two gradients."""
        elements, samples = case.shape["N"] * case.shape["D"], case.shape["K"]
        moved = elements * (2 + samples + (samples + 4 if case.backward else 0))
        return moved * case.dtype.itemsize + 4 * case.shape["N"], 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "K": 3, "D": 4}
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [
            HandSum(self.case(shape), 4 * 10 * 4 * (2 + 3 + 3 + 4) + 4 * 10, 0),
            HandSum(forward, 2 * 10 * 4 * (2 + 3) + 4 * 10, 0),
        ]

    def cases(self, device: str) -> list[Case]:
        one, eight = {"N": 1 << 16, "K": 1, "D": 256}, {"N": 1 << 13, "K": 8, "D": 256}
        if device == "cpu":
            return [self.case(one), self.case(eight), self.case(one, torch.bfloat16)]
        one, eight = {"N": 1 << 20, "K": 1, "D": 256}, {"N": 1 << 17, "K": 8, "D": 256}
        return [
            *(self.case(one, dtype, backward=b) for dtype in (torch.bfloat16, torch.float32) for b in (True, False)),
            self.case(eight, torch.bfloat16),
            self.case({**one, "N": 1 << 22, "D": 64}, torch.bfloat16),
            self.case({**one, "N": 1 << 13, "D": 32768}, torch.bfloat16),
        ]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "K": 1, "D": 37}), self.case({"N": 17, "K": 3, "D": 24}, torch.bfloat16)]

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return (*super().arguments(case, t), case.shape["K"])

    @staticmethod
    def plain(mean: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """As most VAEs write it."""
        std = torch.exp(0.5 * logvar)
        kl = divergence(mean, logvar)
        if samples == 1:
            return mean + std * torch.randn_like(std), kl
        noise = torch.randn(mean.shape[0], samples, mean.shape[1], dtype=mean.dtype, device=mean.device)
        return mean.unsqueeze(1) + std.unsqueeze(1) * noise, kl

    @staticmethod
    def fused(mean: Tensor, logvar: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        return sk.gaussian_rsample(mean, logvar, None if samples == 1 else samples, seed=SEED)

    def run(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Build:
        """Results: first those that do not depend on the noise, then the others."""

        def build(case: Case, inputs: Inputs) -> Run:
            tensors, leaves = providers.with_leaves(case, inputs, self.leaves)
            arguments = self.arguments(case, tensors)

            def call() -> tuple[Tensor, ...]:
                if not case.backward:
                    with torch.no_grad():
                        z, kl = function(*arguments)
                    return kl, z
                z, kl = function(*arguments)
                mean_kl = kl.mean()
                grads = torch.autograd.grad([z, mean_kl], leaves, [inputs["grad_z"], torch.ones_like(mean_kl)])
                return kl.detach(), *grads, z.detach()

            return Run(call)

        return build

    def has_reference(self, case: Case) -> bool:
        return case.shape["N"] * case.shape["K"] * case.shape["D"] < 1 << 20

    def oracle(self, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
        mean, logvar = (inputs[name].double().requires_grad_() for name in self.leaves)
        kl = 0.5 * (mean.square() + logvar.expm1() - logvar).sum(-1)
        if not case.backward:
            return (kl.detach(),)
        grad_z = inputs["grad_z"].double()
        (grad_mean,) = torch.autograd.grad(kl.mean(), mean)
        return kl.detach(), grad_mean + (grad_z if grad_z.dim() == 2 else grad_z.sum(1))

    def limits(self, case: Case, device: str) -> list[Bar]:
        if not case.backward:
            return []
        found = []
        if device == "cpu" and case.dtype == torch.float32:
            ratio = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, ratio, FASTER[case.shape["K"]], True))
        mean_mb = case.shape["N"] * case.shape["D"] * case.dtype.itemsize / 1e6
        return [*found, Bar("MB beyond the results, against mean", case.name, providers.memory_mb, 0.25 * mean_mb)]


class GaussianKL(Benchmark):
    op = "gaussian_kl"
    public = "gaussian_rsample"
    shape_keys = ("N", "D")
    names = leaves = ("mean", "logvar")
    results = ("kl", "mean.grad", "logvar.grad")
    host = HostCase({"N": 32, "D": 16})
    inputs = staticmethod(make_inputs)

    def cost(self, case: Case) -> tuple[int, int]:
        elements = case.shape["N"] * case.shape["D"]
        return elements * case.dtype.itemsize * (6 if case.backward else 2), 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "D": 4}
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [HandSum(self.case(shape), 10 * 4 * (2 + 2 + 2) * 4, 0), HandSum(forward, 10 * 4 * 2 * 2, 0)]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "D": 37})]

    @staticmethod
    def plain(mean: Tensor, logvar: Tensor) -> Tensor:
        return divergence(mean, logvar).mean()

    @staticmethod
    def fused(mean: Tensor, logvar: Tensor) -> Tensor:
        return sk.gaussian_kl(mean, logvar, reduction="mean")


BENCHMARKS = (GaussianRsample(), GaussianKL())
test_gaussian = smoke_test(BENCHMARKS)
