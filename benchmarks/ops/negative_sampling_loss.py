"""negative_sampling_loss: N pairs with K negatives each, from two tables (V, D) -> loss and dense gradients, or a
step of SGD with sparse ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Build, Case, Inputs, Run
from benchmarks.providers import EAGER, OURS


class NegativeSamplingLoss(Benchmark):
    op = "negative_sampling_loss"
    shape_keys = ("N", "K", "V", "D")
    leaves = ("center_weight", "context_weight")
    names = ("center", "context", "negatives", *leaves)
    results = ("loss", "center_weight.grad", "context_weight.grad")
    settings = frozenset({"regime", "backward"})
    twin_rows = 2048
    host = HostCase({"N": 32, "K": 5, "V": 1000, "D": 32})

    def cost(self, case: Case) -> tuple[int, int]:
        """Each row of the tables that may occur is read once, each index too, and the gradients are written once. The
        state kept for backward and repeated reads of a row are left out."""
        n, k, v, d = (case.shape[key] for key in "NKVD")
        read = min(n, v) + min(n * (1 + k), v)
        written = 2 * v if case.backward else 0
        return (read + written) * d * case.dtype.itemsize + 8 * n * (2 + k), 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "K": 2, "V": 20, "D": 4}
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [
            HandSum(self.case(shape), (10 + 20 + 2 * 20) * 4 * 4 + 8 * 40, 0),
            HandSum(forward, 30 * 4 * 2 + 8 * 40, 0),
        ]

    def cases(self, device: str) -> list[Case]:
        shape = {"N": 65536, "K": 5, "V": 200_000, "D": 128}
        found = [self.case(shape), self.case(shape, regime="peaked"), self.case(shape, torch.bfloat16)]
        if device == "cpu":
            return found
        large = {"N": 1 << 20, "K": 5, "V": 1_000_000, "D": 128}
        for dtype in (torch.float32, torch.bfloat16):
            found += [self.case(large, dtype, regime) for regime in ("random", "peaked")]
        found.append(self.case(large, torch.bfloat16, backward=False))
        return [*found, self.case({"N": 262144, "K": 20, "V": 400_000, "D": 300}, torch.bfloat16)]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 65, "K": 3, "V": 101, "D": 20}
        return [self.case(shape), self.case(shape, torch.bfloat16, "peaked")]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """random: every word equally often. peaked: word frequencies of a text (Zipf), negatives by its 3/4 power, as
        word2vec draws them."""
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
        for name in self.leaves:
            inputs[name] = (torch.randn(v, d, generator=generator, device=device) * d**-0.25).to(case.dtype)
        return inputs

    @staticmethod
    def plain(center: Tensor, context: Tensor, negatives: Tensor, u: Tensor, v: Tensor) -> Tensor:
        rows = F.embedding(center, u)
        positive = (rows * F.embedding(context, v)).sum(1)
        negative = torch.bmm(F.embedding(negatives, v), rows.unsqueeze(2)).squeeze(2)
        return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(1)).mean()

    fused = staticmethod(sk.negative_sampling_loss)

    def limits(self, case: Case, device: str) -> list[Bar]:
        if not case.backward:
            return []
        found = []
        if device == "cpu" and case.regime == "random" and case.dtype == torch.float32:
            ratio = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, ratio, 3, True))
        negatives_mb = case.shape["N"] * case.shape["K"] * case.shape["D"] * case.dtype.itemsize / 1e6
        what = "MB beyond the gradients, against an (N, K, D) tensor"
        return [*found, Bar(what, case.name, providers.memory_mb, negatives_mb)]


class SparseStep(NegativeSamplingLoss):
    """Forward, backward with sparse gradients of both tables, and a step of SGD in place."""

    op = "negative_sampling_step"
    public = "negative_sampling_loss"
    results = ("loss", "center_weight", "context_weight")
    settings = frozenset({"regime"})
    compiles = False  # torch.compile takes no sparse gradients
    host = None

    def cost(self, case: Case) -> tuple[int, int]:
        """Each row of the tables that may occur is read once and written once, each index read once."""
        n, k, v, d = (case.shape[key] for key in "NKVD")
        return 2 * (min(n, v) + min(n * (1 + k), v)) * d * case.dtype.itemsize + 8 * n * (2 + k), 0

    def hand_sums(self) -> list[HandSum]:
        case = self.case({"N": 10, "K": 2, "V": 20, "D": 4})
        return [HandSum(case, 2 * (10 + 20) * 4 * 4 + 8 * 40, 0)]

    def cases(self, device: str) -> list[Case]:
        shape = {"N": 8192, "K": 5, "V": 500_000, "D": 128}
        return [self.case(shape), self.case(shape, regime="peaked")]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 65, "K": 3, "V": 101, "D": 20})]

    def run(self, function: Callable[..., Tensor]) -> Build:
        def build(case: Case, inputs: Inputs) -> Run:
            tables = [inputs[name].clone().requires_grad_() for name in self.leaves]
            optimizer = torch.optim.SGD(tables, lr=float(case.shape["N"]))
            indices = [inputs[name] for name in ("center", "context", "negatives")]

            def step() -> tuple[Tensor, ...]:
                optimizer.zero_grad()
                loss = function(*indices, *tables)
                loss.backward()
                optimizer.step()
                return (loss.detach(), *(table.detach() for table in tables))

            def restore() -> None:
                for name, table in zip(self.leaves, tables, strict=True):
                    table.detach().copy_(inputs[name])

            return Run(step, restore, tuple(table.detach() for table in tables))

        return build

    @staticmethod
    def plain(center: Tensor, context: Tensor, negatives: Tensor, u: Tensor, v: Tensor) -> Tensor:
        rows = F.embedding(center, u, sparse=True)
        positive = (rows * F.embedding(context, v, sparse=True)).sum(1)
        negative = torch.bmm(F.embedding(negatives, v, sparse=True), rows.unsqueeze(2)).squeeze(2)
        return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(1)).mean()

    fused = staticmethod(functools.partial(sk.negative_sampling_loss, sparse=True))

    def limits(self, case: Case, device: str) -> list[Bar]:
        return [
            Bar("times faster than nn.Embedding(sparse=True)", case.name, providers.time_ratio(EAGER, OURS), 1, True)
        ]


BENCHMARKS = (NegativeSamplingLoss(), SparseStep())
test_negative_sampling_loss = smoke_test(BENCHMARKS)
