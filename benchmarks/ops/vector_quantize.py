"""vector_quantize: N rows of D features against K codes -> values, indices, commitment and usage, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Row
from benchmarks.providers import EAGER, OURS

BAR_SHAPE = {"N": 65536, "K": 8192, "D": 64}
QUICK_SHAPE = {**BAR_SHAPE, "N": 32768}
SMALL_SHAPES = ({"N": 1024, "K": 128, "D": 16}, {"N": 4096, "K": 512, "D": 64})
ADDMM = "addmm, argmin, gather"
REFERENCE_LIMIT = 1 << 28  # products that the reference computes in float64 within seconds


def peak_mb(rows: dict[str, Row]) -> float | None:
    """Peak extra memory, results included, of the fastest row of this package, in MB."""
    row = providers.fastest_ours(rows)
    return None if row is None or row.peak_extra is None else row.peak_extra / 1e6


def error(rows: dict[str, Row]) -> float | None:
    row = providers.fastest_ours(rows)
    return None if row is None else row.error


def by_addmm(input: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest lines that people write."""
    squares = codebook.square().sum(1)
    indices = torch.addmm(squares, input, codebook.t(), alpha=-2).argmin(1)
    return F.embedding(indices, codebook), indices


class VectorQuantize(Benchmark):
    op = "vector_quantize"
    shape_keys = ("N", "K", "D")
    names = ("input", "codebook")
    settings = frozenset({"regime"})
    differentiable = False
    dynamic = {"cpu": False, "cuda": False}  # noqa: RUF012
    bars_on_error = False
    twin_rows = 1024
    host = HostCase({"N": 32, "K": 64, "D": 16}, 3.0)

    def cost(self, case: Case) -> tuple[int, int]:
        """Rows and codes are read once, values and indices written once; one product of all rows with all codes."""
        n, k, d = (case.shape[key] for key in "NKD")
        return (2 * n + k) * d * case.dtype.itemsize + 8 * (n + k), 2 * n * k * d

    def hand_sums(self) -> list[HandSum]:
        case = self.case({"N": 10, "K": 20, "D": 8})
        return [HandSum(case, 4 * (2 * 10 + 20) * 8 + 8 * (10 + 20), 2 * 10 * 20 * 8)]

    def cases(self, device: str) -> list[Case]:
        half = torch.bfloat16
        if device == "cpu":
            peaked = self.case({"N": 16384, "K": 1024, "D": 64}, regime="peaked")
            small = [self.case(shape) for shape in SMALL_SHAPES]
            wide = self.case({"N": 16384, "K": 1024, "D": 256}, half)
            return [self.case(BAR_SHAPE), self.case(QUICK_SHAPE), wide, peaked, *small]
        large = {"N": 1 << 20, "K": 8192, "D": 64}
        found = [self.case(shape, dtype) for shape in (BAR_SHAPE, large) for dtype in (torch.float32, half)]
        found += [self.case({"N": 65536, "K": k, "D": d}, half) for k, d in ((65536, 32), (1024, 256))]
        return [*found, self.case(BAR_SHAPE, half, "peaked")]

    def default_cases(self, device: str) -> list[Case]:
        if device == "cuda":
            return [self.case(BAR_SHAPE)]
        return [self.case(QUICK_SHAPE), self.case(SMALL_SHAPES[0])]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 65, "K": 33, "D": 20}
        return [self.case(shape), self.case(shape, torch.bfloat16, "peaked")]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """random: rows and codes without structure. peaked: a trained codebook; rows are close to codes, and half of
        the codes are duplicates."""
        generator = torch.Generator(device).manual_seed(0)
        n, k, d = (case.shape[key] for key in "NKD")
        x, codebook = (torch.randn(count, d, generator=generator, device=device) for count in (n, k))
        if case.regime == "peaked":
            codebook[k - k // 2 :] = codebook[: k // 2].clone()
            x = codebook[torch.randint(k, (n,), generator=generator, device=device)] + 0.1 * x
        return {"input": x.to(case.dtype), "codebook": codebook.to(case.dtype)}

    @staticmethod
    def plain(input: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.cdist(input.float(), codebook.float()).argmin(1)
        return F.embedding(indices, codebook), indices

    fused = staticmethod(sk.vector_quantize)

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        return [Provider(ADDMM, self.run(by_addmm), checked=False)]  # its products round, so that codes are wrong

    def why_not(self, backend: str, case: Case, device: torch.device) -> str | None:
        if backend == "reference" and case.shape["N"] * case.shape["K"] * case.shape["D"] > REFERENCE_LIMIT:
            return "it computes every distance in float64"
        return super().why_not(backend, case, device)

    def oracle(self, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Distances summed in float64, not expanded into products; ties go to the lowest index."""
        x, codebook = inputs["input"].double(), inputs["codebook"].double()
        exact = "donot_use_mm_for_euclid_dist"
        indices = torch.cat([torch.cdist(part, codebook, compute_mode=exact).argmin(1) for part in x.split(512)])
        return codebook[indices], indices

    def errors(self, truth: Sequence[Tensor], results: Sequence[Tensor]) -> dict[str, float]:
        wrong = (results[1] != truth[1]).double().mean()
        return {"values": harness.relative_error(results[0], truth[0]), "part of wrong codes": float(wrong)}

    def limits(self, case: Case, device: str) -> list[Bar]:
        found = [Bar("error of values and codes", case.name, error, 0)]
        if case.shape in SMALL_SHAPES:
            found.append(Bar(f"median / {ADDMM}", case.name, providers.time_ratio(OURS, ADDMM), 1.0))
        if case == self.case(BAR_SHAPE):
            faster = providers.time_ratio(EAGER, OURS)
            found.append(Bar("times faster than torch.cdist, argmin and gather", case.name, faster, 2, True))
            if device == "cpu":
                found.append(Bar("MB of peak extra memory", case.name, peak_mb, 64))
        return found


BENCHMARKS = (VectorQuantize(),)
test_vector_quantize = smoke_test(BENCHMARKS)
