"""query_negatives on CUDA, run on the host under sanitizers, against autograd in float64.

The shared memory that the launcher is told of decides whether a row is cached whole or processed in tiles.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from cuda_host import run
from query_negatives_oracle import (
    NAMES,
    Inputs,
    OwnCase,
    assert_results,
    by_index,
    gradient_by_index,
    make,
    pairwise_cases,
)
from torch import Tensor

from sslkernels import use_backend
from sslkernels.contrastive.query_negatives import HINGE, SIGMOID, SOFTMAX, empty_outputs, query_negatives_

pytestmark = run.required
LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HostCase:
    """tile: negatives that fit in shared memory, 0 for all; offsets: elements before the first of each tensor; index:
    its dtype, None for negatives in memory of their own. An int64 index is with a bank, an int32 one without."""

    case: OwnCase
    tile: int = 0
    offsets: tuple[int, int, int] = (0, 0, 0)  # query, negatives, grad_negatives or bank
    index: torch.dtype | None = None

    def __str__(self) -> str:
        index = "" if self.index is None else f"-{str(self.index).removeprefix('torch.')}"
        return f"{self.case}-tile{self.tile}-at{self.offsets}{index}"

    @property
    def bank(self) -> bool:
        return self.index == torch.int64

    def inputs(self) -> Inputs:
        inputs = make(self.case)
        return inputs if self.index is None else by_index(inputs, self.index, self.bank)


def host_cases() -> list[HostCase]:
    layouts = [(0, (0, 0, 0)), (2, (0, 0, 0)), (0, (1, 3, 3)), (3, (2, 1, 0)), (1, (0, 0, 0)), (0, (0, 1, 2))]
    shapes = ((2, 1, 128), (3, 5, 1), (2, 33, 3), (3, 7, 17), (2, 4, 300), (2, 9, 64))
    found = [
        HostCase(dataclasses.replace(case, shape=shapes[j % len(shapes)]), *layouts[j % len(layouts)])
        for j, case in enumerate(pairwise_cases())
    ]
    for dtype in LOW:
        for shape in ((2, 3, 1024), (1, 70, 40), (1, 300, 8), (2, 5, 77)):
            for tile in (0, 2):
                found.append(HostCase(OwnCase(dtype, shape=shape, normalise=True, mask="some", smoothing=True), tile))
        for energy in (SOFTMAX, SIGMOID, HINGE):
            found.append(HostCase(OwnCase(dtype, energy, (3, 7, 24), mask="all", reference="empty"), 2, (1, 1, 1)))
        found.append(HostCase(OwnCase(dtype, shape=(2, 7, 72), reference="final", scale=1e4), 2))
        found.append(HostCase(OwnCase(dtype, shape=(2, 7, 72), normalise=True, scale=1e4), 2))
        found.append(HostCase(OwnCase(dtype, shape=(2, 9, 64), gradient=False), 2))
    for shape in ((0, 3, 8), (2, 0, 8), (1, 1, 1)):
        found += [HostCase(OwnCase(shape=shape), index=index) for index in (None, torch.int64, torch.int32)]
    return [*found, *host_cases_by_index()]


def host_cases_by_index() -> list[HostCase]:
    """Aligned and not, in the table and in the bank, whole and in tiles, with each type, energy and option."""
    layouts = [(0, (0, 0, 0)), (2, (0, 0, 0)), (0, (1, 3, 2)), (3, (2, 1, 0)), (1, (0, 0, 0)), (0, (0, 0, 1))]
    shapes = ((2, 1, 128), (3, 7, 17), (2, 9, 64), (2, 33, 3), (2, 4, 300))
    return [
        HostCase(
            dataclasses.replace(case, shape=shapes[j % len(shapes)]),
            *layouts[j % len(layouts)],
            torch.int64 if j % 4 else torch.int32,
        )
        for j, case in enumerate(pairwise_cases())
    ]


CASES = {str(case): case for case in host_cases()}


def shared_bytes(host: HostCase) -> int:
    """Per block with `tile` negatives: Layout in csrc/contrastive/query_negatives.cu."""
    case = host.case
    _, _, dim = case.shape
    size, acc = 16 // case.dtype.itemsize, 8 if case.dtype == torch.float64 else 4
    beside = host.offsets[2] * (host.index is None or host.bank)
    aligned = not any(part % size for part in (dim, host.offsets[1], beside))
    groups = -(-(dim if aligned else dim + size - 1) // size)
    cached = case.gradient and (case.query or (case.negatives and host.index is None))
    fixed = 2 * 33 * 4 * acc + (dim // size + 3) * (size + 1) * acc
    return fixed + 32 + host.tile * (8 + 5 * acc + 1 + cached * 16 * groups)


def call_of(host: HostCase, name: str = "query_negatives") -> run.Call:
    case, inputs = host.case, host.inputs()

    def shifted(tensor: Tensor, offset: int) -> Tensor:
        return torch.cat([tensor.new_full((offset,), 7), tensor.reshape(-1)])

    flags = (case.gradient, case.query, case.negatives, case.scores)
    outputs = dict(zip(NAMES, empty_outputs(inputs.records()[0], *flags), strict=True))
    arrays = {key: output.fill_(7) for key, output in outputs.items() if output.numel() > 0}
    if "grad_negatives" in arrays and host.index is None:
        arrays["grad_negatives"] = shifted(arrays["grad_negatives"], host.offsets[2])
    if inputs.bank is not None:
        arrays["bank"] = shifted(inputs.bank, host.offsets[2])
    arrays["query"] = shifted(inputs.query, host.offsets[0])
    arrays["negatives"] = shifted(inputs.negatives, host.offsets[1])
    others = (
        "query_inverse_norm",
        "logit_scale",
        "logit_bias",
        "reference",
        "coefficient",
        "smoothing",
        "mask",
        "index",
    )
    arrays |= {key: getattr(inputs, key) for key in others if getattr(inputs, key) is not None}
    rows, count, dim = case.shape
    ints = {
        "element": run.ELEMENTS[case.dtype], "rows": rows, "count": count, "dim": dim, "energy": case.energy,
        "final": inputs.final, "gradient": case.gradient, "wide_index": host.index == torch.int64,
        "table_rows": inputs.negatives.shape[0], "bank_rows": 0 if inputs.bank is None else inputs.bank.shape[0],
    }  # fmt: skip
    if host.tile:
        ints["shared_per_block"] = shared_bytes(host)
        ints["shared_per_processor"] = 3 * (ints["shared_per_block"] + 1024)
    third = "grad_negatives" if host.index is None else "bank"
    offsets = dict(zip(("query", "negatives", third), host.offsets, strict=True))
    return run.Call(name, ints, {}, arrays, offsets)


results, test_no_kernel_races = run.results_and_races(lambda: {name: call_of(host) for name, host in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, results):
    host, result = CASES[name], results[name]
    call = call_of(host)
    assert result.error == ""
    got = {key: value for key, value in result.arrays.items() if key in NAMES}
    if "grad_negatives" in got and host.index is not None:
        got["grad_negatives"] = gradient_by_index(make(host.case), got["grad_negatives"])
    elif "grad_negatives" in got:
        before, after = got["grad_negatives"].split([host.offsets[2], got["grad_negatives"].numel() - host.offsets[2]])
        assert bool((before == 7).all())
        got["grad_negatives"] = after.view(host.case.shape)
    assert_results(make(host.case), got)
    for key in {"query", "negatives", "index", "bank"} & call.arrays.keys():
        assert torch.equal(result.arrays[key].nan_to_num(5), call.arrays[key].nan_to_num(5)), "an input changed"


@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
@pytest.mark.parametrize(("dim", "bank"), [(64, True), (17, False)])
def test_an_index_out_of_range_is_nan_in_its_row(energy, dim, bank, tmp_path):
    """As in the reference, which gathers a row of NaN; nothing outside the tables is read."""
    wrong = {0: -2, 2: 36, 3: torch.iinfo(torch.int64).max, 5: torch.iinfo(torch.int64).min}
    host = HostCase(OwnCase(energy=energy, shape=(6, 6, dim), normalise=bank, bias=True), 0, (0, 0, 0), torch.int64)
    inputs = by_index(make(host.case), bank=bank)
    for row, index in wrong.items():
        inputs.index[row, row] = index
    call = call_of(host)
    call.arrays |= {"negatives": inputs.negatives, "bank": torch.zeros(0) if inputs.bank is None else inputs.bank}
    call.arrays["index"] = inputs.index
    call.ints |= {"table_rows": inputs.negatives.shape[0], "bank_rows": 36 - inputs.negatives.shape[0]}
    (result,) = run.run(run.build("address"), [call], tmp_path)
    assert result.error == ""
    operands, merge = inputs.records()
    want = empty_outputs(operands, True, True, True, True)
    with use_backend("reference"):
        query_negatives_(operands, merge, want)
    for key, value in want._asdict().items():
        torch.testing.assert_close(result.arrays[key], value, equal_nan=True)
        assert value.view(6, -1).isnan().any(1).tolist() == [row in wrong for row in range(6)]


def test_every_kernel_runs(results, request):
    names = run.kernels(run.build(request.node.callspec.params["results"])).values()
    compiled = {name for name in names if name.startswith("query_negatives")}
    assert len(compiled) == 7
    assert {name for result in results.values() for name in result.launched} == compiled


def planned(call: run.Call, folder) -> list[int]:
    call.arrays["plan"] = torch.zeros(6, dtype=torch.int64)
    (result,) = run.run(run.build("address"), [call], folder)
    assert result.error == ""
    return result.arrays["plan"].tolist()


def test_shared_memory_decides_the_tile(tmp_path):
    """The tests of tiles rely on shared_bytes()."""
    for host in [host for host in CASES.values() if host.case.query and 0 < host.tile < host.case.shape[1]][::5]:
        assert planned(call_of(host, "plan_query_negatives"), tmp_path)[0] == host.tile


def test_a_negative_that_is_too_long_is_an_error(tmp_path):
    host = HostCase(OwnCase(shape=(1, 2, 300)))
    call = call_of(host)
    call.ints["shared_per_block"] = call.ints["shared_per_processor"] = 2048
    (result,) = run.run(run.build("address"), [call], tmp_path)
    assert "no place for negatives of 300 columns" in result.error


A100 = {"processors": 108, "shared_per_block": 166912, "shared_per_processor": 167936, "major": 8}
H100 = {"processors": 132, "shared_per_block": 232448, "shared_per_processor": 233472, "major": 9}


@pytest.mark.parametrize(
    ("device", "count", "dim", "whole", "team", "threads", "blocks"),
    [
        (H100, 32, 1024, True, 32, 256, 3),
        (H100, 8, 512, True, 32, 128, 4),
        (H100, 5, 128, True, 16, 32, 4),
        (H100, 64, 1024, True, 32, 1024, 1),  # a block uses more than a third of the shared memory: one read
        (H100, 256, 768, False, 32, 320, 3),
        (H100, 512, 32, True, 4, 256, 4),
        (A100, 32, 1024, True, 32, 512, 2),
        (A100, 256, 768, False, 32, 416, 2),
    ],
)
def test_plans_on_real_devices(device, count, dim, whole, team, threads, blocks, tmp_path):
    """bfloat16 rows with gradients."""
    call = run.Call(
        "plan_query_negatives",
        {
            "element": 2, "rows": 4096, "count": count, "dim": dim, "energy": SOFTMAX, "final": 0, "gradient": 1,
            "wide_index": 0, "table_rows": 0, "bank_rows": 0,
            **device,
        },
    )  # fmt: skip
    call.arrays = {}
    tile, planned_team, pitch, cached, planned_threads, shared = planned(call, tmp_path)
    assert cached
    assert (tile == count) == whole
    assert (planned_team, pitch, planned_threads) == (team, dim // 8, threads)
    assert blocks * (shared + 1024) <= device["shared_per_processor"]
