"""Contrastive losses: features (N, D) -> loss and the gradients of features (and of scale and bias)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import peers, providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import COMPILED, EAGER, OURS

BAR_SHAPE = {"N": 4096, "D": 256}
LARGE_SHAPE = {"N": 16384, "D": 256}
QUICK_SHAPE = {"N": 2048, "D": 256}
# (N, D) of ordinary batches, where eager torch and torch.compile are hard to beat.
ORDINARY = ((64, 128), (256, 128), (1024, 128))
ORDINARY_CLIP = (*ORDINARY, (512, 128), (2048, 128), (256, 512), (1024, 512))
WORDS = ("no", "one", "two", "three", "four")
MEBI = 1 << 20


def clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    scores = scale * (x @ y.t())
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    scores = scale * (x @ y.t()) + bias
    sign = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(sign * scores).sum() / len(x)


def nt_xent(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = F.normalize(torch.cat([x, y]), dim=1)
    scores = scale * (z @ z.t())
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(z), device=z.device).roll(len(x)))


def frozen_keys(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(scale * (x @ y.t()), torch.arange(len(x), device=x.device))


class ContrastiveLoss(Benchmark):
    shape_keys = ("N", "D")
    names = ("x", "y", "scale", "bias")
    settings = frozenset()
    public = "contrastive_energy"
    twin_rows = 512

    def __init__(
        self,
        op: str,
        plain: Callable[..., Tensor],
        fused: Callable[..., Tensor],
        *,
        leaves: tuple[str, ...],
        matmuls: int,
        floor_limit: float,
        faster: float,
        host_limit: float | None = None,
    ) -> None:
        """matmuls: how many of the score matrix's size forward and backward need; floor_limit: largest time over the
        bare matmuls on a CPU; faster: smallest speed-up over eager torch there."""
        self.op, self.plain, self.fused, self.leaves = op, plain, fused, leaves
        self.matmuls, self.floor_limit, self.faster = matmuls, floor_limit, faster
        self.results = ("loss", *(f"grad {name}" for name in leaves))
        self.host = HostCase({"N": 64, "D": 32}, host_limit)
        self.views = 2 if op == "nt_xent" else 1
        self.floor = f"{WORDS[matmuls]} matmuls (floor)"

    def cost(self, case: Case) -> tuple[int, int]:
        """Features are read, their gradients written; the matmuls compute the whole score matrix."""
        rows, width = case.shape["N"], case.shape["D"]
        features = 2 + sum(name in self.leaves for name in ("x", "y"))
        return features * rows * width * case.dtype.itemsize, 2 * (self.views * rows) ** 2 * width * self.matmuls

    def hand_sums(self) -> list[HandSum]:
        """A product of the scores takes 2 * 10 * 10 * 8 flops; nt_xent has four times as many scores. The keys of
        contrastive_energy are frozen and get no gradient."""
        matmuls = {"clip_loss": 4, "siglip_loss": 3, "nt_xent": 2 * 4, "contrastive_energy": 2}
        features = 3 if self.op == "contrastive_energy" else 4
        return [HandSum(self.case({"N": 10, "D": 8}), features * 10 * 8 * 4, matmuls[self.op] * 1600)]

    def cases(self, device: str) -> list[Case]:
        if device == "cuda":
            sizes = [(n, d) for d in (128, 256, 512, 768, 1024) for n in (4096, 16384, 65536)]
            return [self.case({"N": n, "D": d}, torch.bfloat16) for n, d in sizes]
        ordinary = [
            self.case({"N": n, "D": d}) for n, d in sorted(ORDINARY_CLIP if self.op == "clip_loss" else ORDINARY)
        ]
        if self.op == "nt_xent":
            return [*ordinary, self.case(QUICK_SHAPE)]
        if self.op == "clip_loss":
            return [*ordinary, self.case(BAR_SHAPE), self.case(BAR_SHAPE, torch.bfloat16), self.case(LARGE_SHAPE)]
        return [*ordinary, self.case(QUICK_SHAPE), self.case(BAR_SHAPE)]

    def default_cases(self, device: str) -> list[Case]:
        """A large batch, and an ordinary one where eager torch is hard to beat."""
        if device == "cuda":
            return [case for case in self.cases(device) if case.shape == {"N": 16384, "D": 512}]
        large = BAR_SHAPE if self.op == "clip_loss" else QUICK_SHAPE
        return [self.case(large), self.case({"N": 256, "D": 128})]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 67, "D": 24}
        return [self.case(shape), self.case(shape, torch.bfloat16)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """Normalised pairs with a cosine of about 0.5; scale and bias have their values at the start of training."""
        generator = torch.Generator(device).manual_seed(1)
        rows, width = case.shape["N"], case.shape["D"]
        x, noise = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
        return {
            "x": F.normalize(x, dim=1).to(case.dtype),
            "y": F.normalize(x + noise, dim=1).to(case.dtype),
            "scale": torch.tensor(10.0, device=device),
            "bias": torch.tensor(-10.0, device=device),
        }

    def bare_matmuls(self, case: Case, inputs: Inputs) -> Run:
        """Only the products, for the whole matrix at once, into preallocated memory."""
        x, y = inputs["x"], inputs["y"]
        if self.views == 2:
            x = y = torch.cat([x, y])
        scores = torch.empty(len(x), len(y), dtype=case.dtype, device=x.device)
        outputs = [torch.empty_like(x), torch.empty_like(y)]
        # How often the scores are computed. NT-Xent: half of the matrix, twice, and one gradient.
        forwards = {4: 2, 3: 1, 2: 1}[self.matmuls]

        def call() -> tuple[Tensor, ...]:
            for _ in range(forwards):
                torch.mm(x, y.t(), out=scores)
            torch.mm(scores, y, out=outputs[0])
            if self.matmuls > 2:
                torch.mm(scores.t(), x, out=outputs[1])
            return tuple(outputs)

        return Run(call, owned=(scores, *outputs))

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        first, *rest = super().providers(case, device)
        large = case.shape["N"] > BAR_SHAPE["N"]
        return [dataclasses.replace(first, patience=providers.patience(device) if large else math.inf), *rest]

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        return [Provider(self.floor, self.bare_matmuls, is_floor=True)]

    def peers(self, case: Case, device: torch.device) -> list[Provider]:
        return peers.contrastive(self.op, device)

    def limits(self, case: Case, device: str) -> list[Bar]:
        over_floor = providers.time_ratio(OURS, self.floor)
        floor_text = f"median / {self.floor.removesuffix(' (floor)')}"
        if device == "cuda":
            return [
                Bar(floor_text, case.name, over_floor, 1.5),
                Bar("MB beyond the gradients", case.name, providers.memory_mb, 1100 * MEBI / 1e6),
                Bar("median / fastest peer", case.name, providers.over_fastest_peer, 1.0),
            ]
        if case.shape == LARGE_SHAPE:
            limit = 0.1 * 4 * LARGE_SHAPE["N"] ** 2 / 1e6
            return [Bar("MB beyond the gradients", case.name, providers.memory_mb, limit)]
        speedup = providers.time_ratio(EAGER, OURS)
        size = (case.shape["N"], case.shape["D"])
        if size in ORDINARY_CLIP:
            small, medium = case.shape["N"] < 256, case.shape["N"] >= 512
            over_eager, over_compiled = (providers.time_ratio(OURS, name) for name in (EAGER, COMPILED))
            bars = [Bar("median / eager torch", case.name, over_eager, 2.0 if small else 1.0)]
            return [*bars, Bar("median / torch.compile", case.name, over_compiled, 1.0)] if medium else bars
        if case.dtype == torch.bfloat16:
            return [Bar("times faster than eager torch", case.name, speedup, 2, True)]
        return [
            Bar(floor_text, case.name, over_floor, self.floor_limit),
            Bar("times faster than eager torch", case.name, speedup, self.faster, True),
        ]


BENCHMARKS = (
    ContrastiveLoss(
        "clip_loss",
        clip,
        lambda x, y, scale, bias: sk.clip_loss(x, y, scale),
        leaves=("x", "y", "scale"), matmuls=4, floor_limit=1.25, faster=1.5, host_limit=3.0,
    ),
    ContrastiveLoss(
        "siglip_loss",
        siglip,
        sk.siglip_loss,
        leaves=("x", "y", "scale", "bias"), matmuls=3, floor_limit=1.3, faster=1.7,
    ),
    ContrastiveLoss(
        "nt_xent",
        nt_xent,
        lambda x, y, scale, bias: sk.nt_xent(x, y, temperature=1 / scale),
        leaves=("x", "y"), matmuls=2, floor_limit=1.4, faster=1.5,
    ),
    ContrastiveLoss(
        "contrastive_energy",
        frozen_keys,
        lambda x, y, scale, bias: sk.contrastive_energy(x, y, logit_scale=scale),
        leaves=("x", "scale"), matmuls=2, floor_limit=1.3, faster=1.5,
    ),
)  # fmt: skip
test_contrastive = smoke_test(BENCHMARKS)
