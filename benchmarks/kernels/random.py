"""The kernel of the random streams: N rows of V normal numbers."""

from __future__ import annotations

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks.benchmark import smoke_test
from benchmarks.harness import Case, Inputs
from benchmarks.kernels.kernel import (
    REFERENCE,
    Compiled,
    Floor,
    FloorSum,
    Kernel,
    KernelBenchmark,
    chosen,
    grid,
    rows_and_columns,
)


def random_stream_floor(rows: int, columns: int, element_bytes: int) -> Floor:
    """Written once. A normal takes about 23 floating-point operations and half a Philox call, which is integer work."""
    return Floor(rows * columns * element_bytes, 0)


FLOOR_SUMS = (FloorSum(random_stream_floor, (7, 9, 2), 7 * 9 * 2, 0),)
COMPILED = (Compiled("random_stream", loads="nothing is read"),)


def inputs(case: Case, device: torch.device) -> Inputs:
    return {"seed": torch.tensor(1, device=device)}


def call(backend: str, case: Case, t: Inputs) -> None:
    with sk.use_backend(chosen(backend, t["seed"].device)):
        t["out"] = sk.random_normal((case.shape["N"], case.shape["V"]), t["seed"], dtype=case.dtype)


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = dict(t)
    call(REFERENCE, case, exact)
    return (exact["out"].double(),)


KERNELS = {
    "random_stream": Kernel(
        rows_and_columns(random_stream_floor),
        inputs,
        call,
        lambda case: ("out",),
        oracle,
        grid({"N": 1 << 14, "V": 4096}, backward=False),
        smoke={"shape": {"N": 33, "V": 1003}, "backward": False},
        share=None,
    )
}
BENCHMARKS = (KernelBenchmark("random", KERNELS),)
test_random_kernels = smoke_test(BENCHMARKS)
