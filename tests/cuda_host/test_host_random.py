"""The CUDA kernels of the random streams and of AliasTable, run on the host under sanitizers: bit-identical to the
reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from cuda_host import run
from philox_oracle import KNOWN, as_int64
from torch import Tensor

from sslkernels.random.alias_table import _reference, alias_table, masses
from sslkernels.random.streams import STREAMS, stream_values

pytestmark = run.required

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of Element in csrc/core/element.h


@dataclass
class Numbers:
    """One call. output_offset: elements before the first row."""

    stream: str
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    seed: int = -(2**40)
    sample: int = 2**35 + 2
    output_offset: int = 0
    row_ids: list[int] | None = None

    def stored(self, values: Tensor) -> Tensor:
        return torch.cat([torch.ones(self.output_offset, dtype=values.dtype), values.flatten()])

    def call(self) -> run.Call:
        dtype = torch.int32 if self.stream == "bits" else self.dtype
        out = self.stored(torch.full((self.rows, self.columns), 7, dtype=dtype))
        arrays = {"seed": torch.tensor([self.seed]), "out": out}
        if self.row_ids is not None:
            arrays["row_ids"] = torch.tensor(self.row_ids)
        ints = {name: getattr(self, name) for name in ("rows", "columns", "sample")}
        ints |= {"stream": STREAMS.index(self.stream), "element": DTYPES.index(self.dtype)}
        return run.Call("random_stream", ints, {}, arrays, {"out": self.output_offset})

    def expected(self) -> dict[str, Tensor]:
        row_ids = None if self.row_ids is None else torch.tensor(self.row_ids)
        dtype = torch.int32 if self.stream == "bits" else self.dtype
        seed = torch.tensor(self.seed)
        values = stream_values(self.stream, seed, row_ids, self.rows, self.columns, self.sample, dtype)
        return self.call().arrays | {"out": self.stored(values)}


def cases() -> dict[str, Numbers]:
    found = {}
    for i, (counter, key, _) in enumerate(KNOWN):
        row_ids = [as_int64(*counter[2:])]
        found[f"known_answer-{i}"] = Numbers(
            "bits", 1, 4, seed=as_int64(*key), sample=as_int64(*counter[:2]), row_ids=row_ids
        )
    variants = itertools.cycle(
        itertools.product([0, 1, 2], DTYPES, [(1, 1), (3, 4), (300, 2), (5, 7), (1, 301), (2, 64), (3, 12)])
    )
    for stream in STREAMS:
        for offset, dtype, shape in itertools.islice(variants, 9 if stream == "bits" else 28):
            found[f"{stream}-{shape[0]}x{shape[1]}-{dtype}-{offset}"] = Numbers(
                stream, *shape, dtype, output_offset=offset
            )
        found[f"{stream}-row_ids"] = Numbers(stream, 5, 5, row_ids=[3, 0, 2**33 + 1, -5, 2**63 - 1])
        found[f"{stream}-0x4"] = Numbers(stream, 0, 4)
        found[f"{stream}-4x0"] = Numbers(stream, 4, 0)
    return found


@dataclass
class Draws:
    """One call of alias_draw. output_offset: elements before the first row."""

    rows: int
    columns: int
    size: int = 37
    seed: int = -(2**40)
    output_offset: int = 0
    row_ids: list[int] | None = None

    def table(self) -> Tensor:
        return alias_table(masses(torch.arange(self.size, dtype=torch.float64).cos().abs()))

    def stored(self, values: Tensor) -> Tensor:
        return torch.cat([torch.ones(self.output_offset, dtype=values.dtype), values.flatten()])

    def call(self) -> run.Call:
        out = self.stored(torch.full((self.rows, self.columns), -7))
        arrays = {"seed": torch.tensor([self.seed]), "table": self.table(), "out": out}
        if self.row_ids is not None:
            arrays["row_ids"] = torch.tensor(self.row_ids)
        ints = {name: getattr(self, name) for name in ("rows", "columns", "size")}
        return run.Call("alias_draw", ints, {}, arrays, {"out": self.output_offset})

    def expected(self) -> dict[str, Tensor]:
        row_ids = None if self.row_ids is None else torch.tensor(self.row_ids)
        values = _reference(torch.tensor(self.seed), row_ids, self.table(), self.rows, self.columns)
        return self.call().arrays | {"out": self.stored(values)}


def alias_cases() -> dict[str, Draws]:
    shapes = [(1, 1), (3, 4), (300, 2), (5, 7), (1, 301), (2, 64)]
    found = {f"alias-{rows}x{columns}": Draws(rows, columns, output_offset=rows % 2) for rows, columns in shapes}
    return found | {
        "alias-row_ids": Draws(5, 5, row_ids=[3, 0, 2**33 + 1, -5, 2**63 - 1]),
        "alias-one_index": Draws(4, 8, size=1),
        "alias-many_indices": Draws(4, 80, size=2**17 + 1),
        "alias-0x4": Draws(0, 4),
        "alias-4x0": Draws(4, 0),
    }


CASES = {**cases(), **alias_cases()}


results, test_no_kernel_races = run.results_and_races(lambda: {name: case.call() for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, results):
    result, expected = results[name], CASES[name].expected()
    assert result.error == ""
    assert result.arrays.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(result.arrays[key], value), key


def test_known_answers_of_philox(results):
    for i, (_, _, words) in enumerate(KNOWN):
        assert tuple(word % 2**32 for word in results[f"known_answer-{i}"].arrays["out"].tolist()) == words


def test_every_kernel_runs(results, request):
    launched = {name for result in results.values() for name in result.launched}
    program = run.build(request.node.callspec.params["results"])
    names = ("random_stream", "alias_draw")
    compiled = {name for name in run.kernels(program).values() if name.startswith(names)}
    assert len(compiled) == 1 + 4 * len(DTYPES) + 1
    assert launched == compiled
