"""info_nce with per-query negatives: (N, D), (N, D), (N, K, D) -> loss and all gradients; and negatives by index, drawn
from the keys: (N, D), (M, D), (N, K) -> loss and the gradients of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs
from benchmarks.providers import EAGER, OURS

TEMPERATURE = 0.1


class InfoNCE(Benchmark):
    op = "info_nce"
    shape_keys = ("N", "K", "D")
    names = leaves = ("query", "positive_key", "negative_keys")
    results = ("loss", "grad query", "grad positive_key", "grad negative_keys")
    settings = frozenset()
    host = HostCase({"N": 32, "K": 8, "D": 64})

    def cost(self, case: Case) -> tuple[int, int]:
        """All features are read once, all gradients written once."""
        rows, count, width = (case.shape[key] for key in ("N", "K", "D"))
        return 2 * rows * (count + 2) * width * case.dtype.itemsize, 0

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"N": 10, "K": 3, "D": 4}), 2 * 10 * (1 + 1 + 3) * 4 * 4, 0)]

    def cases(self, device: str) -> list[Case]:
        if device == "cpu":
            shape = {"N": 4096, "K": 32, "D": 256}
            return [self.case(shape), self.case(shape, torch.bfloat16)]
        shapes = [(8192, 32, 1024), (65536, 8, 512), (4096, 256, 768)]
        return [self.case({"N": n, "K": k, "D": d}, torch.bfloat16) for n, k, d in shapes]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 13, "K": 5, "D": 24}
        return [self.case(shape), self.case(shape, torch.bfloat16)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(1)
        rows, count, width = (case.shape[key] for key in ("N", "K", "D"))
        query, noise = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
        negatives = torch.randn(rows, count, width, generator=generator, device=device)
        values = {"query": query, "positive_key": query + noise, "negative_keys": negatives}
        return {name: value.to(case.dtype) for name, value in values.items()}

    @staticmethod
    def plain(query: Tensor, positive_key: Tensor, negative_keys: Tensor) -> Tensor:
        query, positive_key, negative_keys = (F.normalize(t, dim=-1) for t in (query, positive_key, negative_keys))
        negative = torch.einsum("nd,nkd->nk", query, negative_keys)
        scores = torch.cat([(query * positive_key).sum(1, keepdim=True), negative], 1)
        return F.cross_entropy(scores / TEMPERATURE, torch.zeros(len(query), dtype=torch.long, device=query.device))

    @staticmethod
    def fused(query: Tensor, positive_key: Tensor, negative_keys: Tensor) -> Tensor:
        return sk.info_nce(query, positive_key, negative_keys, temperature=TEMPERATURE, negative_mode="paired")

    def limits(self, case: Case, device: str) -> list[Bar]:
        if device == "cpu":
            faster = providers.time_ratio(EAGER, OURS)
            return [Bar("times faster than eager torch", case.name, faster, 2, True)]
        return [Bar("median / time at the speed of light", case.name, providers.over_light, 1.3)]


class NegativesByIndex(Benchmark):
    op = "negatives_by_index"
    public = "contrastive_energy"
    shape_keys = ("N", "K", "M", "D")
    leaves = ("query", "key")
    names = ("query", "key", "index")
    results = ("loss", "grad query", "grad key")
    settings = frozenset()

    def cost(self, case: Case) -> tuple[int, int]:
        """All features and indices are read once, all gradients written once. Repeated reads of a row are left out."""
        rows, count, keys, width = (case.shape[key] for key in self.shape_keys)
        return 2 * (rows + keys) * width * case.dtype.itemsize + 8 * rows * count, 0

    def hand_sums(self) -> list[HandSum]:
        case = self.case({"N": 10, "K": 3, "M": 12, "D": 4})
        return [HandSum(case, 2 * (10 * 4 + 12 * 4) * 4 + 10 * 3 * 8, 0)]

    def cases(self, device: str) -> list[Case]:
        shape = {"N": 4096, "K": 100, "M": 8192, "D": 256}
        return [self.case(shape)] if device == "cpu" else [self.case(shape), self.case(shape, torch.bfloat16)]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 13, "K": 5, "M": 17, "D": 24}
        return [self.case(shape), self.case(shape, torch.bfloat16)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """The first N keys are the positives."""
        generator = torch.Generator(device).manual_seed(1)
        rows, count, keys, width = (case.shape[key] for key in self.shape_keys)
        query, key = (torch.randn(n, width, generator=generator, device=device) for n in (rows, keys))
        index = torch.randint(keys, (rows, count), generator=generator, device=device)
        return {"query": query.to(case.dtype), "key": key.to(case.dtype), "index": index}

    @staticmethod
    def plain(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
        negative = torch.einsum("nd,nkd->nk", query, key[index])
        scores = torch.cat([(query * key[: len(query)]).sum(1, keepdim=True), negative], 1)
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
        return F.cross_entropy(TEMPERATURE * scores, target)

    @staticmethod
    def fused(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
        return sk.contrastive_energy(query, key, negatives=index, in_batch=False, logit_scale=TEMPERATURE)

    def limits(self, case: Case, device: str) -> list[Bar]:
        faster = providers.time_ratio(EAGER, OURS)
        gathered = 4 * case.shape["N"] * case.shape["K"] * case.shape["D"] / 1e6
        return [
            Bar("times faster than eager torch", case.name, faster, 4, True),
            # Eager torch holds the gathered rows and their gradient.
            Bar("MB beyond the gradients", case.name, providers.memory_mb, 0.05 * 2 * gathered),
        ]


BENCHMARKS = (InfoNCE(), NegativesByIndex())
test_info_nce = smoke_test(BENCHMARKS)
