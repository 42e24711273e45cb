"""random_normal and the other streams: random numbers (N, D) from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.providers import EAGER, OURS

SEED = 1
Shape = tuple[int, int]


class RandomStream(Benchmark):
    """plain, fused: (shape, seed) -> numbers. Streams other than normal only have a host-time case."""

    shape_keys = ("N", "D")
    settings = frozenset()
    differentiable = False
    compiles = False
    bars_on_error = False
    twin_rows = None
    host = HostCase({"N": 32, "D": 64})

    def __init__(self, stream: str, plain: Callable[..., Tensor], fused: Callable[..., Tensor]) -> None:
        self.op, self.plain, self.fused = f"random_{stream}", plain, fused
        self.dtype = torch.int32 if stream == "bits" else torch.float32

    def cost(self, case: Case) -> tuple[int, int]:
        """Each number is written once, and nothing is read."""
        return case.shape["N"] * case.shape["D"] * case.dtype.itemsize, 0

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"N": 10, "D": 4}), 10 * 4 * 4, 0)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        return {"seed": torch.tensor(SEED, device=device)}

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return (case.shape["N"], case.shape["D"]), t["seed"]

    def has_reference(self, case: Case) -> bool:
        return False


class RandomNormal(RandomStream):
    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return (*super().arguments(case, t), case.dtype)

    def cases(self, device: str) -> list[Case]:
        shape = {"N": 1 << 14, "D": 4096} if device == "cpu" else {"N": 1 << 16, "D": 4096}
        return [self.case(shape), self.case(shape, torch.bfloat16)]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 33, "D": 131}), self.case({"N": 33, "D": 132}, torch.bfloat16)]

    def oracle(self, case: Case, inputs: Inputs) -> None:
        return None

    def errors(self, oracle: None, results: Sequence[Tensor]) -> dict[str, float]:
        """How far mean and mean square are beyond six standard deviations of their expected values."""
        (values,) = results
        n = values.numel()
        mean, square = float(values.double().mean()), float(values.double().square().mean())
        rounding = torch.finfo(values.dtype).eps
        return {
            "mean": max(0.0, abs(mean) - 6 / math.sqrt(n) - rounding),
            "mean square": max(0.0, abs(square - 1) - 6 * math.sqrt(2 / n) - rounding),
        }

    def limits(self, case: Case, device: str) -> list[Bar]:
        if device != "cpu":
            return []
        return [Bar("times faster than torch.randn", case.name, providers.time_ratio(EAGER, OURS), 6, True)]


def normal(shape: Shape, seed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=seed.device)


def fused_normal(shape: Shape, seed: Tensor, dtype: torch.dtype) -> Tensor:
    return sk.random_normal(shape, seed, dtype=dtype)


def uniform(shape: Shape, seed: Tensor) -> Tensor:
    return torch.rand(shape, device=seed.device)


def exponential(shape: Shape, seed: Tensor) -> Tensor:
    return torch.empty(shape, device=seed.device).exponential_()


def gumbel(shape: Shape, seed: Tensor) -> Tensor:
    return exponential(shape, seed).log_().neg_()


def bits(shape: Shape, seed: Tensor) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=seed.device)


BENCHMARKS = (
    RandomNormal("normal", normal, fused_normal),
    RandomStream("uniform", uniform, sk.random_uniform),
    RandomStream("exponential", exponential, sk.random_exponential),
    RandomStream("gumbel", gumbel, sk.random_gumbel),
    RandomStream("bits", bits, sk.random_bits),
)
test_random_normal = smoke_test(BENCHMARKS)
