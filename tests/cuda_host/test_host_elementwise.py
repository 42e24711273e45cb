"""scale_add and column_sums on CUDA, run on the host under sanitizers."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_host import run
from cuda_host.run import ELEMENTS, Call
from torch import Tensor

pytestmark = run.required
LOW = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [*itertools.product(LOW, LOW), (torch.float64, torch.float64)]


def values_of(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scale_add_call(
    source: torch.dtype, out: torch.dtype, count: int, *, add: bool, scale: float | None, offset: int = 0,
    in_place: bool = False,
) -> Call:  # fmt: skip
    """offset: elements before the first of either tensor."""
    wide = source == torch.float64
    arrays = {"out": values_of(count + offset, out, 1)}
    if not in_place:
        arrays["input"] = values_of(count + offset, source, 0)
    if scale is not None:
        arrays["scale"] = torch.tensor([scale], dtype=torch.float64 if wide else torch.float32)
    ints = {
        "input_element": ELEMENTS[source], "out_element": ELEMENTS[out], "count": count, "add": add,
        "wide_scale": wide, "in_place": in_place, "processors": 1,
    }  # fmt: skip
    return Call("scale_add", ints, {}, arrays, {"input": offset, "out": offset})


def column_sums_call(
    dtype: torch.dtype, rows: int, columns: int, *, add: bool, stride: int, offset: int = 0, processors: int = 2
) -> Call:
    values = values_of(offset + max((rows - 1) * stride + columns, 0) * (rows > 0), dtype, 2)
    total = values_of(columns, torch.float64 if dtype == torch.float64 else torch.float32, 3)
    ints = {
        "element": ELEMENTS[dtype], "stride": stride, "rows": rows, "columns": columns, "add": add,
        "processors": processors,
    }  # fmt: skip
    return Call("column_sums", ints, {}, {"values": values, "total": total}, {"values": offset})


SCALE_ADD = {
    **{
        f"{a}-{b}-{add}".replace("torch.", ""): ((a, b, 2500), {"add": add, "scale": 0.375})
        for (a, b), add in itertools.product(PAIRS, (False, True))
    },
    "several_steps": ((torch.bfloat16, torch.bfloat16, 40001), {"add": False, "scale": -2.0}),
    "unaligned": ((torch.float32, torch.bfloat16, 2500), {"add": True, "scale": 3.0, "offset": 1}),
    "no_scale": ((torch.float32, torch.float16, 9), {"add": True, "scale": None}),
    "in_place": ((torch.bfloat16, torch.bfloat16, 2049), {"add": False, "scale": 0.5, "in_place": True}),
    "in_place_one": ((torch.bfloat16, torch.bfloat16, 2049), {"add": False, "scale": 1.0, "in_place": True}),
    "empty": ((torch.float32, torch.float32, 0), {"add": False, "scale": 2.0}),
}
COLUMN_SUMS = {
    **{
        f"{dtype}".replace("torch.", ""): ((dtype, 133, 300), {"add": False, "stride": 320})
        for dtype in (*LOW, torch.float64)
    },
    "add": ((torch.bfloat16, 300, 259), {"add": True, "stride": 320, "processors": 4}),
    "unaligned": ((torch.bfloat16, 70, 77), {"add": True, "stride": 79, "offset": 1}),
    "one_row": ((torch.float16, 1, 5), {"add": False, "stride": 5}),
    "no_rows": ((torch.float32, 0, 5), {"add": False, "stride": 5}),
    "no_rows_add": ((torch.float32, 0, 5), {"add": True, "stride": 5}),
}
CALLS = {
    **{f"scale_add-{name}": scale_add_call(*sizes, **options) for name, (sizes, options) in SCALE_ADD.items()},
    **{f"column_sums-{name}": column_sums_call(*sizes, **options) for name, (sizes, options) in COLUMN_SUMS.items()},
}
results, test_no_kernel_races = run.results_and_races(lambda: CALLS)


@pytest.mark.parametrize("name", SCALE_ADD)
def test_scale_add(name, results):
    (_, out, count), options = SCALE_ADD[name]
    call, result = CALLS[f"scale_add-{name}"], results[f"scale_add-{name}"]
    assert result.error == ""
    offset, scale = options.get("offset", 0), 1.0 if options["scale"] is None else options["scale"]
    before = call.arrays["out"]
    read = before if options.get("in_place") else call.arrays["input"]
    want = scale * read[offset:].double() + (before[offset:].double() if options["add"] else 0)
    exact = torch.finfo(torch.float64 if out == torch.float64 else torch.float32).eps
    rounding = torch.finfo(out).eps / 2 + exact
    error = (result.arrays["out"][offset:].double() - want).abs()
    assert bool((error <= rounding * want.abs() + exact).all())
    assert torch.equal(result.arrays["out"][:offset], before[:offset])
    assert result.launched == ([] if count == 0 else result.launched[:1])


@pytest.mark.parametrize("name", COLUMN_SUMS)
def test_column_sums(name, results):
    (_, rows, columns), options = COLUMN_SUMS[name]
    call, result = CALLS[f"column_sums-{name}"], results[f"column_sums-{name}"]
    assert result.error == ""
    stride, offset = options["stride"], options.get("offset", 0)
    values = call.arrays["values"].as_strided((rows, columns), (stride, 1), offset) if rows else torch.zeros(0, columns)
    before = call.arrays["total"].double() * options["add"]
    want = before + values.double().sum(0)
    eps = torch.finfo(call.arrays["total"].dtype).eps
    # One rounding per level of summation: rows of a warp, warps, blocks of rows.
    bound = (rows / 8 + 16) * eps * (before.abs() + values.double().abs().sum(0))
    assert bool(((result.arrays["total"].double() - want).abs() <= bound).all())


def test_every_kernel_runs(results, request):
    program = run.build(request.node.callspec.params["results"])
    names = tuple(run.kernels(program).values())
    compiled = {name for name in names if name.startswith(("scale_add", "column_sums"))}
    assert len(compiled) == 16
    assert {name for result in results.values() for name in result.launched} == compiled


def test_unsupported_types_are_an_error(tmp_path):
    calls = [
        scale_add_call(torch.float64, torch.float32, 4, add=False, scale=1.0),
        scale_add_call(torch.float32, torch.float64, 4, add=False, scale=1.0),
    ]
    for result in run.run(run.build("address"), calls, tmp_path):
        assert "float64" in result.error


def test_in_place_with_scale_one_writes_nothing(results):
    call, result = CALLS["scale_add-in_place_one"], results["scale_add-in_place_one"]
    assert torch.equal(call.arrays["out"], result.arrays["out"])
