"""linear_sample: hidden states (N, D) and weight (V, D) -> an index drawn from their softmax, and its logprob."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import EAGER, OURS

EAGER_GUMBEL = "eager Gumbel-max"
FLOOR = "one matmul (floor)"


def gumbel_max(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.t()).float()
    index = (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)
    return index, logits.log_softmax(-1).gather(1, index[:, None])[:, 0]


def matmul(case: Case, t: Inputs) -> Run:
    logits = torch.empty(case.shape["N"], case.shape["V"], dtype=case.dtype, device=t["weight"].device)
    return Run(lambda: (torch.mm(t["input"], t["weight"].t(), out=logits),), owned=(logits,))


class LinearSample(Benchmark):
    op = "linear_sample"
    shape_keys = ("N", "D", "V")
    names = ("input", "weight")
    settings = frozenset({"regime"})
    differentiable = False
    compiles = False
    twin_rows = 64
    host = HostCase({"N": 32, "D": 64, "V": 1000})

    def cost(self, case: Case) -> tuple[int, int]:
        """Hidden states and weight are read, 12 bytes a row written; one matmul. The noise, integer work, is left
        out."""
        n, d, v = (case.shape[key] for key in ("N", "D", "V"))
        return (n + v) * d * case.dtype.itemsize + 12 * n, 2 * n * d * v

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"N": 10, "D": 8, "V": 100}), (10 + 100) * 8 * 4 + 10 * 12, 2 * 10 * 8 * 100)]

    def cases(self, device: str) -> list[Case]:
        if device == "cpu":
            shape = {"N": 512, "D": 768, "V": 50257}
            return [self.case(shape), self.case(shape, regime="peaked"), self.case({**shape, "N": 4})]
        return [
            self.case({"N": n, "D": d, "V": v}, torch.bfloat16, regime)
            for n, d, v in ((1, 4096, 128256), (64, 4096, 128256), (1024, 4096, 128256), (8192, 768, 50265))
            for regime in ("random", "peaked")
        ]

    def default_cases(self, device: str) -> list[Case]:
        """Many rows, and the few of a step of generation."""
        cases = self.cases(device)
        return [cases[0], cases[-1]] if device == "cpu" else cases[:1]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 33, "D": 64, "V": 1003}
        return [self.case(shape), self.case(shape, torch.bfloat16, "peaked")]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """random: logits of unit variance. peaked: six times that."""
        generator = torch.Generator(device).manual_seed(1)
        n, d, v = (case.shape[key] for key in ("N", "D", "V"))
        spread = 6.0 if case.regime == "peaked" else 1.0
        weight = torch.randn(v, d, generator=generator, device=device).mul_(spread * d**-0.5)
        hidden = torch.randn(n, d, generator=generator, device=device)
        return {"input": hidden.to(case.dtype), "weight": weight.to(case.dtype)}

    @staticmethod
    def plain(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        probability = (hidden @ weight.t()).softmax(-1, dtype=torch.float32)
        index = torch.multinomial(probability, 1)
        return index[:, 0], probability.gather(1, index)[:, 0].log()

    @staticmethod
    def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return sk.linear_sample(hidden, weight, seed=0)

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        return [Provider(EAGER_GUMBEL, self.run(gumbel_max)), Provider(FLOOR, matmul, is_floor=True)]

    def has_reference(self, case: Case) -> bool:
        return False

    def oracle(self, case: Case, inputs: Inputs) -> Inputs:
        return inputs

    def errors(self, inputs: Inputs, results: Sequence[Tensor]) -> dict[str, float]:
        """The error of the drawn index's log-probability."""
        index, logprob = results
        logits = inputs["input"].double() @ inputs["weight"].double().t()
        exact = logits.log_softmax(-1).gather(1, index[:, None])[:, 0]
        return {"logprob": float((logprob.double() - exact).abs().max() / exact.abs().max())}

    def limits(self, case: Case, device: str) -> list[Bar]:
        if case.shape["N"] > 4:
            faster = providers.time_ratio(EAGER, OURS)
            found = [
                Bar("median / one matmul", case.name, providers.time_ratio(OURS, FLOOR), 1.25),
                Bar("times faster than eager torch", case.name, faster, 1.5, True),
            ]
        else:
            found = [Bar("median / eager torch", case.name, providers.time_ratio(OURS, EAGER), 1.1)]
        return [*found, Bar("MB beyond the results", case.name, providers.memory_mb, 32)]


BENCHMARKS = (LinearSample(),)
test_linear_sample = smoke_test(BENCHMARKS)
