"""The CUDA kernels of glove_loss, run on the host under sanitizers, against float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import oracle
import pytest
import torch
from cases import DTYPES
from cuda_host import run
from cuda_host.run import ELEMENTS, Call
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype

pytestmark = run.required


@dataclass(frozen=True)
class Pairs:
    """One call of glove_fwd. wrong: some pairs have an index out of range."""

    dtype: torch.dtype = torch.float32
    count: int = 11
    dim: int = 32
    index: torch.dtype = torch.int64
    gradient: bool = True
    wrong: bool = False

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.count + 100 * self.dim)
        rows, acc = {"center": 13, "context": 9}, accumulation_dtype(self.dtype)
        found = {name: torch.randint(0, n, (self.count,), generator=g).to(self.index) for name, n in rows.items()}
        for name, n in rows.items():
            table = torch.randn(n, self.dim, generator=g, dtype=torch.float64) * max(self.dim, 1) ** -0.25
            found[f"{name}_weight"] = table.to(self.dtype)
            found[f"{name}_bias"] = torch.randn(n, generator=g, dtype=torch.float64).to(self.dtype)
        found["target"] = torch.randn(self.count, generator=g, dtype=torch.float64).to(acc)
        found["weight"] = torch.rand(self.count, generator=g, dtype=torch.float64).to(acc)
        if self.wrong:
            found["center"][0], found["center"][3] = 13, torch.iinfo(self.index).max
            found["context"][4], found["context"][9] = -1, torch.iinfo(self.index).min
        return found

    def call(self) -> Call:
        outputs = ("loss", "slope") if self.gradient else ("loss",)
        arrays = self.inputs() | {
            name: torch.full((self.count,), 7.0, dtype=accumulation_dtype(self.dtype)) for name in outputs
        }
        ints = {
            "element": ELEMENTS[self.dtype], "center_rows": 13, "context_rows": 9, "dim": self.dim,
            "wide_index": self.index == torch.int64, "count": self.count,
        }  # fmt: skip
        return Call("glove_fwd", ints, {}, arrays)

    def expected(self) -> dict[str, Tensor]:
        t = {name: v.double() if v.is_floating_point() else v.long() for name, v in self.inputs().items()}
        wrong = (t["center"] < 0) | (t["center"] >= 13) | (t["context"] < 0) | (t["context"] >= 9)
        i, j = t["center"].clamp(0, 12), t["context"].clamp(0, 8)
        score = (t["center_weight"][i] * t["context_weight"][j]).sum(1) + t["center_bias"][i] + t["context_bias"][j]
        error = (score - t["target"]).masked_fill(wrong, torch.nan)
        return {"loss": t["weight"] * error.square(), "slope": 2 * t["weight"] * error}


def pairs_cases() -> dict[str, Pairs]:
    found = {}
    for dtype, dim in itertools.product(DTYPES, (1, 32, 77, 300)):
        found[f"{str(dtype).removeprefix('torch.')}-{dim}"] = Pairs(dtype, dim=dim, index=torch.int32)
    return found | {
        "no_gradient": Pairs(gradient=False),
        "no_pairs": Pairs(count=0),
        "one_pair": Pairs(count=1),
        "several_blocks": Pairs(count=70, dim=8),
        "no_columns": Pairs(dim=0),
        "wrong": Pairs(wrong=True),
        "wrong_int32": Pairs(torch.bfloat16, wrong=True, index=torch.int32, dim=37),
    }


PAIRS = pairs_cases()
results, test_no_kernel_races = run.results_and_races(lambda: {name: case.call() for name, case in PAIRS.items()})


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_slope(name, results):
    case, result = PAIRS[name], results[name]
    assert result.error == ""
    for key, truth in case.expected().items():
        if key in result.arrays:
            limit = 16 * torch.finfo(accumulation_dtype(case.dtype)).eps
            assert oracle.error(result.arrays[key], truth) <= limit, key
    for key, value in case.inputs().items():
        assert torch.equal(result.arrays[key], value)


def test_every_kernel_runs(results, request):
    program = run.build(request.node.callspec.params["results"])
    compiled = {name for name in run.kernels(program).values() if name.startswith("glove")}
    assert len(compiled) == 4
    assert {name for result in results.values() for name in result.launched} == compiled


def test_rows_too_long_are_an_error(tmp_path):
    call = Pairs(count=1).call()
    call.ints["dim"] = 2**30 + 1
    (result,) = run.run(run.build("address"), [call], tmp_path)
    assert "2^30" in result.error
