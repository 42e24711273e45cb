"""The kernels of the random streams: N rows of V normal numbers, or of V indices from a table."""

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
from sslkernels.random.alias_table import alias_draw

WORDS = 200_000


def random_stream_floor(rows: int, columns: int, element_bytes: int) -> Floor:
    """Written once. A normal takes about 23 floating-point operations and half a Philox call, which is integer work."""
    return Floor(rows * columns * element_bytes, 0)


def alias_draw_floor(rows: int, columns: int, element_bytes: int) -> Floor:
    """Written once; each of the WORDS buckets that may be drawn is read once."""
    return Floor(rows * columns * element_bytes + 8 * min(rows * columns, WORDS), 0)


FLOOR_SUMS = (
    FloorSum(random_stream_floor, (7, 9, 2), 7 * 9 * 2, 0),
    FloorSum(alias_draw_floor, (7, 9, 8), 7 * 9 * (8 + 8), 0),
)
COMPILED = (
    Compiled("random_stream", loads="nothing is read"),
    Compiled("alias_draw", loads="a bucket at random has 8 bytes"),
)


def inputs(case: Case, device: torch.device) -> Inputs:
    return {"seed": torch.tensor(1, device=device)}


def call(backend: str, case: Case, t: Inputs) -> None:
    with sk.use_backend(chosen(backend, t["seed"].device)):
        t["out"] = sk.random_normal((case.shape["N"], case.shape["V"]), t["seed"], dtype=case.dtype)


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = dict(t)
    call(REFERENCE, case, exact)
    return (exact["out"].double(),)


def alias_inputs(case: Case, device: torch.device) -> Inputs:
    """Word frequencies of a text (Zipf) to the power 3/4."""
    weights = torch.arange(1, WORDS + 1, dtype=torch.float64).pow(-0.75)
    return {"seed": torch.tensor(1, device=device), "table": sk.AliasTable(weights).table.to(device)}


def alias_call(backend: str, case: Case, t: Inputs) -> None:
    with sk.use_backend(chosen(backend, t["seed"].device)):
        t["out"] = alias_draw(t["seed"], None, t["table"], case.shape["N"], case.shape["V"])


def alias_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = dict(t)
    alias_call(REFERENCE, case, exact)
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
        instructions=80,
        predicted=("0.16-0.32", "0.16-0.32"),
    ),
    "alias_draw": Kernel(
        rows_and_columns(alias_draw_floor),
        alias_inputs,
        alias_call,
        lambda case: ("out",),
        alias_oracle,
        grid({"N": 65536, "V": 5}, {"N": 1 << 20, "V": 8}, dtypes=(torch.int64,), backward=False),
        smoke={"shape": {"N": 33, "V": 1003}, "dtype": torch.int64, "backward": False},
        share=None,
    ),
}
BENCHMARKS = (KernelBenchmark("random", KERNELS),)
test_random_kernels = smoke_test(BENCHMARKS)
