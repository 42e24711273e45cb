"""AliasTable: N x K indices from a fixed distribution over V words, as word2vec draws its negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.providers import EAGER, OURS

BINS = 64


class AliasDraws(Benchmark):
    op = "AliasTable"
    shape_keys = ("N", "K", "V")
    settings = frozenset()
    differentiable = False
    compiles = False
    bars_on_error = False
    twin_rows = None
    dtype = torch.int64
    host = HostCase({"N": 32, "K": 5, "V": 1000})

    def case(self, shape: dict[str, int], *settings, **named) -> Case:
        """Always int64, whatever dtype the command line asks for."""
        return super().case(shape)

    def cost(self, case: Case) -> tuple[int, int]:
        """Each index is written once, and each bucket that may be drawn is read once."""
        count = case.shape["N"] * case.shape["K"]
        return 8 * count + 8 * min(count, case.shape["V"]), 0

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"N": 10, "K": 5, "V": 20}), 8 * 50 + 8 * 20, 0)]

    def cases(self, device: str) -> list[Case]:
        return [self.case({"N": 65536, "K": 5, "V": 200_000})]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"N": 333, "K": 5, "V": 1000})]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """The frequencies of the words of a text (Zipf) to the power 3/4."""
        weights = torch.arange(1, case.shape["V"] + 1, dtype=torch.float32, device=device).pow(-0.75)
        self.table = sk.AliasTable(weights)
        return {"weights": weights}

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return t["weights"], (case.shape["N"], case.shape["K"])

    @staticmethod
    def plain(weights: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.multinomial(weights, shape[0] * shape[1], replacement=True).reshape(shape)

    def fused(self, weights: Tensor, shape: tuple[int, int]) -> Tensor:
        return self.table.draw(shape, seed=0)

    def has_reference(self, case: Case) -> bool:
        return False

    def oracle(self, case: Case, inputs: Inputs) -> Tensor:
        return inputs["weights"].double() / inputs["weights"].double().sum()

    def errors(self, share: Tensor, results: Sequence[Tensor]) -> dict[str, float]:
        """How far the count of a bin of the distribution is beyond six standard deviations of the binomial."""
        (index,) = results
        bins = (share.cumsum(0) * BINS).long().clamp_max(BINS - 1)
        p = torch.zeros(BINS, dtype=torch.float64, device=share.device).index_add_(0, bins, share)
        counts, n = torch.bincount(bins[index.flatten()], minlength=BINS), index.numel()
        return {"counts": ((counts - n * p).abs() - 6 * (n * p * (1 - p)).sqrt()).max().clamp(min=0).item()}

    def limits(self, case: Case, device: str) -> list[Bar]:
        if device != "cpu":
            return []
        return [Bar("times faster than torch.multinomial", case.name, providers.time_ratio(EAGER, OURS), 5, True)]


BENCHMARKS = (AliasDraws(),)
test_alias_table = smoke_test(BENCHMARKS)
