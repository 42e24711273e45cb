"""The kernels around the search of vector_quantize, for bench_kernels: N rows of D features, K codes. The search itself
is a matmul, which bench_vector_quantize measures."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Case
from sslkernels.ops.rows import accumulation_dtype
from sslkernels.ops.vector_quantize import KERNELS

NAMES = ("gather_codes", "code_difference")
Inputs = dict[str, Tensor]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, codes, dim = (case.shape[key] for key in "NKD")
    acc = accumulation_dtype(case.dtype)
    input, codebook = (torch.randn(n, dim, generator=generator, device=device).to(case.dtype) for n in (rows, codes))
    t = {"input": input, "codebook": codebook, "grad": torch.empty_like(input)}
    t["index"] = torch.randint(codes, (rows,), generator=generator, device=device)
    t["score"] = torch.zeros(rows, dtype=torch.float64, device=device)
    t["value"], t["coefficient"] = (torch.ones(rows, dtype=acc, device=device) for _ in range(2))
    return t


def floor(case: Case) -> dict[str, int]:
    sizes = {"rows": case.shape["N"], "codes": case.shape["K"], "dim": case.shape["D"]}
    sizes |= {"element_bytes": case.dtype.itemsize}
    return sizes if case.op == "gather_codes" else {**sizes, "out_bytes": case.dtype.itemsize}


def run(backend: str, case: Case, t: Inputs) -> None:
    kernels = KERNELS[backend]
    if case.op == "gather_codes":
        kernels.gather(t["input"], t["codebook"], t["index"], t["score"], t["grad"], t["value"])
    else:
        kernels.difference(t["coefficient"], t["input"], t["codebook"], t["index"], t["grad"])


def results(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (t["value"], t["grad"]) if case.op == "gather_codes" else (t["grad"],)


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    difference = t["input"].double() - t["codebook"].double()[t["index"]]
    if case.op == "gather_codes":
        return difference.square().sum(1), t["codebook"].double()[t["index"]]
    return (t["coefficient"].double()[:, None] * difference,)


def cases(device: str) -> list[tuple[str, dict[str, int]]]:
    """(kernel, shape)."""
    if device == "cpu":
        return []
    shapes = ({"N": 1 << 22, "K": 8192, "D": 64}, {"N": 1 << 19, "K": 1024, "D": 300})
    return [(name, shape) for name in NAMES for shape in shapes]
