"""glove_loss: N pairs of words with their counts, from two tables (V, D) and two biases -> loss and dense gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.providers import EAGER, OURS


class GloveLoss(Benchmark):
    op = "glove_loss"
    shape_keys = ("N", "V", "D")
    leaves = ("center_weight", "context_weight", "center_bias", "context_bias")
    names = ("center", "context", "count", *leaves)
    results = ("loss", *(f"{name}.grad" for name in leaves))
    settings = frozenset({"regime", "backward"})
    twin_rows = 2048
    host = HostCase({"N": 32, "V": 1000, "D": 32})

    def cost(self, case: Case) -> tuple[int, int]:
        """Each row of tables and biases that may occur is read once, each index and count too, and the gradients are
        written once. The number per pair that is kept for backward and repeated reads of a row are left out."""
        n, v, d = (case.shape[key] for key in "NVD")
        elements = 2 * min(n, v) * (d + 1) + (2 * v * (d + 1) if case.backward else 0)
        return elements * case.dtype.itemsize + n * (2 * 8 + 4), 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "V": 20, "D": 4}
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [HandSum(self.case(shape), (2 * 10 + 2 * 20) * 5 * 4 + 200, 0), HandSum(forward, 20 * 5 * 2 + 200, 0)]

    def cases(self, device: str) -> list[Case]:
        shape = {"N": 1_000_000, "V": 200_000, "D": 100}
        found = [self.case(shape), self.case(shape, regime="peaked")]
        if device == "cpu":
            return [self.case({**shape, "N": 250_000}), *found]
        return [*found, self.case(shape, torch.bfloat16), self.case({"N": 1 << 22, "V": 400_000, "D": 300})]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 65, "V": 101, "D": 20}
        return [self.case(shape), self.case(shape, torch.bfloat16, "peaked")]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """random: every word equally often. peaked: word frequencies of a text (Zipf)."""
        generator = torch.Generator(device).manual_seed(0)
        n, v, d = (case.shape[key] for key in "NVD")
        inputs = {}
        for name in ("center", "context"):
            draw = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
            draw = v * draw if case.regime == "random" else (v + 1) ** draw - 1
            inputs[name] = draw.long().clamp_max(v - 1)
        inputs["count"] = torch.rand(n, generator=generator, device=device) ** 3 * 300 + 0.1
        for name in self.leaves:
            shape = (v, d) if name.endswith("weight") else (v,)
            inputs[name] = (torch.randn(shape, generator=generator, device=device) * d**-0.25).to(case.dtype)
        return inputs

    @staticmethod
    def plain(center: Tensor, context: Tensor, count: Tensor, u: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Tensor:
        score = (F.embedding(center, u) * F.embedding(context, v)).sum(1) + b[center] + c[context]
        return ((count / 100).pow(0.75).clamp(max=1) * (score - count.log()).square()).mean()

    fused = staticmethod(sk.glove_loss)

    def limits(self, case: Case, device: str) -> list[Bar]:
        if not case.backward:
            return []
        found = []
        if device == "cpu" and case.dtype == torch.float32:
            found.append(Bar("times faster than eager torch", case.name, providers.time_ratio(EAGER, OURS), 3, True))
        rows_mb = case.shape["N"] * case.shape["D"] * case.dtype.itemsize / 1e6
        return [
            *found,
            Bar("MB beyond the gradients, against an (N, D) tensor", case.name, providers.memory_mb, rows_mb),
        ]


BENCHMARKS = (GloveLoss(),)
test_glove_loss = smoke_test(BENCHMARKS)
