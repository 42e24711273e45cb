"""gumbel_softmax: logits (N, V) -> one-hot or soft samples, and the gradient of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.providers import EAGER, OURS

SOFT = "soft"  # regime: samples that are not one-hot
TAU = 1.0


class GumbelSoftmax(Benchmark):
    op = "gumbel_softmax"
    shape_keys = ("N", "V")
    names = leaves = ("logits",)
    settings = frozenset({"regime", "backward"})
    bars_on_error = False
    host = HostCase({"N": 32, "V": 64})

    def cost(self, case: Case) -> tuple[int, int]:
        """Logits are read and samples written; backward reads logits and the samples' gradient and writes one more."""
        logits = case.shape["N"] * case.shape["V"] * case.dtype.itemsize
        return logits * (5 if case.backward else 2), 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "V": 20}
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [HandSum(self.case(shape), 5 * 10 * 20 * 4, 0), HandSum(forward, 2 * 10 * 20 * 2, 0)]

    def cases(self, device: str) -> list[Case]:
        shape = {"N": 4096, "V": 8192}
        found = [self.case(shape), self.case(shape, torch.bfloat16), self.case(shape, regime=SOFT)]
        if device == "cpu":
            return [*found, self.case({"N": 1 << 20, "V": 2})]
        large = [{"N": 1 << 15, "V": 8192}, {"N": 1 << 20, "V": 320}, {"N": 8192, "V": 50257}, {"N": 4, "V": 1 << 20}]
        found += [self.case(shape, torch.bfloat16, regime) for shape in large for regime in ("random", SOFT)]
        return [*found, self.case(large[0], torch.bfloat16, backward=False)]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "V": 131}), self.case({"N": 33, "V": 132}, torch.bfloat16, SOFT)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.shape["N"], case.shape["V"])
        return {n: torch.randn(shape, generator=generator, device=device).to(case.dtype) for n in ("logits", "grad")}

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return t["logits"], case.regime != SOFT

    def grad_outputs(self, case: Case, t: Inputs) -> tuple[Tensor, ...]:
        return (t["grad"],)

    @staticmethod
    def plain(logits: Tensor, hard: bool) -> Tensor:
        return F.gumbel_softmax(logits, TAU, hard)

    @staticmethod
    def fused(logits: Tensor, hard: bool) -> Tensor:
        return sk.gumbel_softmax(logits, TAU, hard, seed=1)

    def has_reference(self, case: Case) -> bool:
        return False

    def oracle(self, case: Case, inputs: Inputs) -> Case:
        return case

    def errors(self, case: Case, results: Sequence[Tensor]) -> dict[str, float]:
        """For any noise hard samples are one-hot, soft samples sum to 1 and gradients to 0. In units of
        the dtype's rounding. The unit tests compare with float64 on the same noise."""
        y, *grads = (result.double() for result in results)
        rounding = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps
        found = {"sum of a sample": float((y.sum(1) - 1).abs().max()) / rounding}
        if case.regime != SOFT:
            one_hot = ((y == 0) | (y == 1)).all(1)
            found["part of samples that are not one-hot"] = float(one_hot.logical_not().double().mean())
        for grad in grads:
            found["sum of a gradient"] = float(grad.sum(1).norm() / grad.norm()) / rounding
        return found

    def limits(self, case: Case, device: str) -> list[Bar]:
        found = []
        if device == "cpu" and case.shape["N"] == 4096:
            ratio = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than eager torch", case.name, ratio, 5, True))
        what = "MB beyond samples and gradients, against the logits"
        logits = case.shape["N"] * case.shape["V"] * case.dtype.itemsize / 1e6
        return [*found, Bar(what, case.name, providers.memory_mb, logits / 2)]


BENCHMARKS = (GumbelSoftmax(),)
test_gumbel_softmax = smoke_test(BENCHMARKS)
