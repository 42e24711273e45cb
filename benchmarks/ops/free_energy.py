"""free_energy: energies (N, K) of K candidates -> their free energy, its mean as the loss, and the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Case, Inputs


class FreeEnergy(Benchmark):
    op = "free_energy"
    shape_keys = ("N", "K")
    names = leaves = ("energy",)
    results = ("loss", "grad energy")
    host = HostCase({"N": 32, "K": 1000}, 1.3)

    def cost(self, case: Case) -> tuple[int, int]:
        """The energies are read; backward reads them again and writes their gradient."""
        return case.shape["N"] * case.shape["K"] * case.dtype.itemsize * (3 if case.backward else 1), 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "K": 20}
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [HandSum(self.case(shape), 3 * 10 * 20 * 4, 0), HandSum(forward, 10 * 20 * 2, 0)]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "K": 131}), self.case({"N": 33, "K": 132}, torch.bfloat16)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(1)
        energy = torch.randn(case.shape["N"], case.shape["K"], generator=generator, device=device)
        return {"energy": energy.to(case.dtype)}

    @staticmethod
    def plain(energy: Tensor) -> Tensor:
        return (math.log(energy.shape[1]) - torch.logsumexp(-energy, 1)).mean()

    @staticmethod
    def fused(energy: Tensor) -> Tensor:
        return sk.free_energy(energy).mean()


BENCHMARKS = (FreeEnergy(),)
test_free_energy = smoke_test(BENCHMARKS)
