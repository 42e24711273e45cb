"""prediction_energy: predictions (B, K, D) against targets (B, D) -> loss and the gradients of both.

The floor is memory traffic. Forward reads the predictions and the targets once. Backward reads again whatever has a
derivative: everything for the soft minimum, one prediction per target for the hard one; it writes both gradients.
`PASSES` does only that, with torch: on a CPU the first touch of a gradient's pages costs more than writing them, which
no count of bytes shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import EAGER, OURS

PASSES = "torch passes over the same bytes"
SOFT = "soft"  # regime of the soft minimum; any other is the hard one


class PredictionEnergy(Benchmark):
    op = "prediction_energy"
    shape_keys = ("B", "K", "D")
    names = leaves = ("prediction", "target")
    results = ("loss", "grad prediction", "grad target")
    settings = frozenset({"regime", "backward"})
    host = HostCase({"B": 32, "K": 8, "D": 64})

    def cost(self, case: Case) -> tuple[int, int]:
        batch, count, dim = (case.shape[key] for key in "BKD")
        rows = count + 1
        if case.backward:
            rows += (count + 1 if case.regime == SOFT else 2) + count + 1
        return batch * rows * dim * case.dtype.itemsize, 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"B": 10, "K": 3, "D": 8}
        return [
            HandSum(self.case(shape), 10 * (4 + 2 + 4) * 8 * 4, 0),
            HandSum(self.case(shape, torch.bfloat16, SOFT), 10 * 3 * 4 * 8 * 2, 0),
            HandSum(self.case(shape, backward=False), 10 * 4 * 8 * 4, 0),
        ]

    def cases(self, device: str) -> list[Case]:
        shape = {"B": 4096, "K": 8, "D": 512}
        regimes = [(dtype, regime) for dtype in (torch.float32, torch.bfloat16) for regime in ("random", SOFT)]
        found = [self.case(shape, dtype, regime) for dtype, regime in regimes]
        found.append(self.case({"B": 16, "K": 8, "D": 262_144}))
        if device == "cpu":
            return found
        shapes = [(65536, 8, 512), (1 << 20, 8, 16), (64, 64, 196_608), (4, 8, 1 << 24)]
        return [*found, *(self.case(dict(zip("BKD", s, strict=True)), d, r) for s in shapes for d, r in regimes)]

    def default_cases(self, device: str) -> list[Case]:
        return [self.case({"B": 4096, "K": 8, "D": 512}, regime=SOFT)]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"B": 13, "K": 5, "D": 24}
        return [self.case(shape), self.case(shape, torch.bfloat16, SOFT)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """Energies a few units apart, so that the soft minimum has several candidates."""
        generator = torch.Generator(device).manual_seed(1)
        batch, count, dim = (case.shape[key] for key in "BKD")
        target = torch.randn(batch, dim, generator=generator, device=device)
        noise = torch.randn(batch, count, dim, generator=generator, device=device)
        prediction = noise.mul_(dim**-0.25).add_(target.unsqueeze(1))
        return {"prediction": prediction.to(case.dtype), "target": target.to(case.dtype)}

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return (*super().arguments(case, t), case.regime == SOFT)

    @staticmethod
    def plain(prediction: Tensor, target: Tensor, soft: bool) -> Tensor:
        energies = ((prediction - target.unsqueeze(1)) ** 2).flatten(2).sum(-1)
        if not soft:
            return energies.amin(1).mean()
        return (math.log(energies.shape[1]) - torch.logsumexp(-energies, 1)).mean()

    @staticmethod
    def fused(prediction: Tensor, target: Tensor, soft: bool) -> Tensor:
        return sk.prediction_energy(prediction, target, mode="soft" if soft else "min")

    def passes(self, case: Case, t: Inputs) -> Run:
        """Sums over the words that are read, and fills of the gradients."""
        words = [t[name].view(torch.float32) for name in self.leaves]
        again = words if case.regime == SOFT else [words[0][:, 0], words[1]]

        def call() -> tuple[Tensor, ...]:
            for part in [*words, *(again if case.backward else [])]:
                part.sum()
            return tuple(torch.full_like(t[name], 1.0) for name in self.leaves) if case.backward else ()

        return Run(call)

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        return [Provider(PASSES, self.passes, is_floor=True)]

    def limits(self, case: Case, device: str) -> list[Bar]:
        memory = Bar("MB beyond the gradients", case.name, providers.memory_mb, 4.0)
        if device == "cuda":
            return [memory, Bar("median / time at the speed of light", case.name, providers.over_light, 1.3)]
        faster = providers.time_ratio(EAGER, OURS)
        return [
            memory,
            Bar(f"median / {PASSES}", case.name, providers.time_ratio(OURS, PASSES), 1.0),
            Bar("times faster than eager torch", case.name, faster, 5, True),
        ]


BENCHMARKS = (PredictionEnergy(),)
test_prediction_energy = smoke_test(BENCHMARKS)
