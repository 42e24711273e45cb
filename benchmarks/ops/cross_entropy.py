"""cross_entropy: logits (N, V) -> loss and the gradient of the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import peers, providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider
from benchmarks.providers import EAGER, OURS


def make_targets(case: Case, device: torch.device) -> Tensor:
    """int64 targets; `case.ignored` of them, rounded to a whole row, are ignored, at random places."""
    generator = torch.Generator(device).manual_seed(0)
    rows = case.shape["N"]
    target = torch.randint(case.shape["V"], (rows,), generator=generator, device=device)
    target[torch.randperm(rows, generator=generator, device=device)[: round(rows * case.ignored)]] = -100
    return target


def make_logits(case: Case, device: torch.device) -> Inputs:
    """random: normal logits. peaked: twice that, with the target 4 to 24 above, as in a trained model."""
    generator = torch.Generator(device).manual_seed(1)
    rows, vocab = case.shape["N"], case.shape["V"]
    target = make_targets(case, device)
    logits = torch.randn(rows, vocab, generator=generator, device=device)
    if case.regime == "peaked":
        lead = 4 + 20 * torch.rand(rows, 1, generator=generator, device=device)
        logits.mul_(2).scatter_add_(1, target.clamp_min(0)[:, None], lead)
    return {"logits": logits.to(case.dtype), "target": target}


class CrossEntropy(Benchmark):
    op = "cross_entropy"
    shape_keys = ("N", "V")
    names = ("logits", "target")
    leaves = ("logits",)
    results = ("loss", "grad input")
    settings = frozenset({"regime", "ignored", "backward"})
    host = HostCase({"N": 32, "V": 1000}, 2.5)
    plain = staticmethod(F.cross_entropy)
    fused = staticmethod(sk.cross_entropy)
    inputs = staticmethod(make_logits)

    def cost(self, case: Case) -> tuple[int, int]:
        """The logits are read once and their gradient is written once; everything else is below a thousandth of it."""
        logits = case.shape["N"] * case.shape["V"] * case.dtype.itemsize
        return round(logits * (1 - case.ignored)) + (logits if case.backward else 0), 0

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 100, "V": 1000}
        return [
            HandSum(self.case(shape), 2 * 4 * 100 * 1000, 0),
            HandSum(self.case(shape, ignored=0.7), 4 * (30 + 100) * 1000, 0),
        ]

    def cases(self, device: str) -> list[Case]:
        if device == "cpu":
            return [self.case({"N": 4096, "V": 50257})]
        shapes = [(8192, 128256), (16384, 30522), (8192, 50265), (8192, 50368), (8192, 250002), (8192, 256000)]
        found = [self.case({"N": n, "V": v}, torch.bfloat16) for n, v in shapes]
        for n, v in shapes[:3]:
            shape = {"N": n, "V": v}
            found.append(self.case(shape, torch.float32))
            found.append(self.case(shape, torch.bfloat16, "peaked"))
            found += [self.case(shape, torch.bfloat16, ignored=part) for part in (0.7, 0.85)]
        return found

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 33, "V": 1003}
        return [self.case(shape), self.case(shape, torch.bfloat16, "peaked", 0.7)]

    def peers(self, case: Case, device: torch.device) -> list[Provider]:
        return peers.cross_entropy(device)

    def limits(self, case: Case, device: str) -> list[Bar]:
        if device == "cpu":
            faster = providers.time_ratio(EAGER, OURS)
            return [Bar("times faster than eager torch", case.name, faster, 2.5, True)]
        return [Bar("median / time at the copy bandwidth", case.name, providers.over_light, 1.15)]


BENCHMARKS = (CrossEntropy(),)
test_cross_entropy = smoke_test(BENCHMARKS)
