"""Kernels that several families share: sums of columns and of weighted rows, and scaling in place."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.benchmark import smoke_test
from benchmarks.harness import Case, Inputs
from benchmarks.kernels.kernel import (
    ADJACENT,
    Compiled,
    Floor,
    FloorSum,
    Kernel,
    KernelBenchmark,
    accumulation_dtype,
    grid,
    native_op,
    normal,
    rows_and_columns,
)
from sslkernels.core import segment_sum

ENTRIES_PER_ROW = 2


def column_sums_floor(rows: int, columns: int, element_bytes: int) -> Floor:
    return Floor(rows * columns * element_bytes + columns * 4, rows * columns)


def scale_add_floor(count: int, input_bytes: int, out_bytes: int, add: bool) -> Floor:
    return Floor(count * (input_bytes + out_bytes * (2 if add else 1)), count * (2 if add else 1))


def weighted_row_sums_floor(
    entries: int, rows: int, source_rows: int, dim: int, source_bytes: int, out_bytes: int
) -> Floor:
    """Reads an order and a coefficient per entry, the source rows that may occur and the starts; writes every row."""
    moved = entries * (8 + 4) + min(entries, source_rows) * dim * source_bytes + rows * (8 + dim * out_bytes)
    return Floor(moved, 2 * entries * dim)


FLOOR_SUMS = (
    FloorSum(scale_add_floor, (100, 4, 2, True), 100 * (4 + 2 + 2), 200),
    FloorSum(column_sums_floor, (7, 9, 2), 7 * 9 * 2 + 9 * 4, 7 * 9),
    FloorSum(weighted_row_sums_floor, (21, 9, 100, 10, 4, 2), 21 * (12 + 10 * 4) + 9 * (8 + 10 * 2), 420),
)
COMPILED = (
    Compiled("column_sums", stores="one number per column"),
    Compiled("column_sums_finish", loads=ADJACENT, stores=ADJACENT),
)


def column_inputs(case: Case, device: torch.device) -> Inputs:
    total = torch.empty(case.shape["V"], dtype=accumulation_dtype(case.dtype), device=device)
    return {"values": normal(case, device), "total": total}


def scale_inputs(case: Case, device: torch.device) -> Inputs:
    values, acc = normal(case, device), accumulation_dtype(case.dtype)
    scale = torch.full((1,), 0.5, dtype=acc, device=device)
    return {"wide": values.to(acc), "scale": scale, "grad": torch.empty_like(values)}


def row_inputs(case: Case, device: torch.device) -> Inputs:
    """N entries of V columns, summed into N / 2 rows."""
    entries, dim = case.shape["N"], case.shape["V"]
    rows = entries // ENTRIES_PER_ROW
    generator = torch.Generator(device).manual_seed(2)
    keys = torch.randint(rows, (entries,), generator=generator, device=device)
    _, order, starts = segment_sum.sort_rows(keys, rows)
    acc = accumulation_dtype(case.dtype)
    return {
        "keys": keys,
        "order": order,
        "starts": starts,
        "coefficient": torch.full((entries,), 1 / entries, dtype=acc, device=device),
        "source": normal(case, device),
        "out": torch.empty(rows, dim, dtype=case.dtype, device=device),
    }


def row_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    terms = t["coefficient"].double()[:, None] * t["source"].double()
    return (torch.zeros(t["out"].shape, dtype=torch.float64, device=terms.device).index_add_(0, t["keys"], terms),)


LOGITS = grid({"N": 16384, "V": 30522}, {"N": 8192, "V": 50265}, dtypes=(torch.bfloat16,))
KERNELS = {
    "column_sums": Kernel(
        rows_and_columns(column_sums_floor),
        column_inputs,
        lambda backend, case, t: native_op("column_sums")(t["values"], t["total"], False),
        lambda case: ("total",),
        lambda case, t: (t["values"].double().sum(0),),
        LOGITS,
        plain=lambda case, t: torch.sum(t["values"], 0, dtype=t["total"].dtype, out=t["total"]),
        triton=False,
        runs_on_cpu=False,
    ),
    "scale_add": Kernel(
        lambda case: scale_add_floor(
            case.shape["N"] * case.shape["V"], accumulation_dtype(case.dtype).itemsize, case.dtype.itemsize, False
        ),
        scale_inputs,
        lambda backend, case, t: native_op("scale_add")(t["wide"], t["scale"], t["grad"], False),
        lambda case: ("grad",),
        lambda case, t: (t["wide"].double() * t["scale"].double(),),
        LOGITS,
        plain=lambda case, t: t["grad"].copy_(t["wide"] * t["scale"]),
        triton=False,
    ),
    "weighted_row_sums": Kernel(
        lambda case: weighted_row_sums_floor(
            case.shape["N"], case.shape["N"] // ENTRIES_PER_ROW, case.shape["N"], case.shape["V"],
            case.dtype.itemsize, case.dtype.itemsize,
        ),
        row_inputs,
        lambda backend, case, t: native_op("weighted_row_sums")(
            t["starts"], t["order"], t["coefficient"], t["source"], None, t["out"], 1
        ),
        lambda case: ("out",),
        row_oracle,
        grid({"N": 1 << 20, "V": 128}, {"N": 1 << 20, "V": 300}),
        plain=lambda case, t: segment_sum.reference(t["keys"], t["coefficient"], t["source"], None, t["out"]),
        triton=False,
    ),
}  # fmt: skip
BENCHMARKS = (KernelBenchmark("core", KERNELS),)
test_core_kernels = smoke_test(BENCHMARKS)
