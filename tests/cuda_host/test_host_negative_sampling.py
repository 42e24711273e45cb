"""The CUDA kernels of negative_sampling_loss, run on the host under sanitizers, against float64."""

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

from sslkernels.core import segment_sum
from sslkernels.core.dtypes import accumulation_dtype

pytestmark = run.required
CHUNK = 64  # kChunk in csrc/core/segment_sums.cu


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def roundings(dtype: torch.dtype) -> float:
    """Relative to the norm: rounding of sums over a few dozen terms in the accumulation dtype, and of the result."""
    return 8 * torch.finfo(accumulation_dtype(dtype)).eps + torch.finfo(dtype).eps


@dataclass(frozen=True)
class Pairs:
    """One call of negative_sampling_fwd. wrong: pairs that get an index out of range, by the name of the index."""

    dtype: torch.dtype = torch.float32
    count: int = 11
    negatives: int = 5
    dim: int = 32
    words: int = 13
    index: torch.dtype = torch.int64
    exclude_positive: bool = False
    gradient: bool = True
    wrong: bool = False
    none: bool = False  # some negatives are -1

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.count + 100 * self.dim)
        shapes = {"center": (self.count,), "context": (self.count,), "negatives": (self.count, self.negatives)}
        indices = {n: torch.randint(0, self.words, s, generator=g).to(self.index) for n, s in shapes.items()}
        if self.none:
            indices["negatives"][torch.rand(self.count, self.negatives, generator=g) < 0.4] = -1
        tables = {
            name: (torch.randn(rows, self.dim, generator=g, dtype=torch.float64) * self.dim**-0.25).to(self.dtype)
            for name, rows in (("center_weight", self.words), ("context_weight", self.words))
        }
        if self.wrong:
            indices["center"][0] = self.words
            indices["center"][1] = torch.iinfo(self.index).max
            indices["context"][3] = -1
            indices["negatives"][5, -1] = self.words
            indices["negatives"][7, 0] = torch.iinfo(self.index).min
        return indices | tables

    def call(self) -> Call:
        acc = accumulation_dtype(self.dtype)
        arrays = self.inputs() | {"loss": torch.full((self.count,), 7.0, dtype=acc)}
        if self.gradient:
            arrays["slopes"] = torch.full((self.count, 1 + self.negatives), 7.0, dtype=acc)
            arrays["direction"] = torch.full((self.count, self.dim), 7.0, dtype=acc)
        ints = {
            "element": ELEMENTS[self.dtype], "center_rows": self.words, "context_rows": self.words, "dim": self.dim,
            "wide_index": self.index == torch.int64, "count": self.count, "negative_count": self.negatives,
            "exclude_positive": self.exclude_positive,
        }  # fmt: skip
        return Call("negative_sampling_fwd", ints, {}, arrays)

    def expected(self) -> dict[str, Tensor]:
        """In float64, by autograd; NaN for pairs with an index out of range."""
        t = {
            name: value.double() if value.is_floating_point() else value.long() for name, value in self.inputs().items()
        }
        candidates = torch.cat([t["context"][:, None], t["negatives"]], 1)
        none = candidates == -1
        none[:, 0] = False
        wrong = (
            (((candidates < 0) & ~none) | (candidates >= self.words)).any(1)
            | (t["center"] < 0)
            | (t["center"] >= self.words)
        )
        u = t["center_weight"][t["center"].clamp(0, self.words - 1)].requires_grad_()
        v = t["context_weight"][candidates.clamp(0, self.words - 1)]
        scores = torch.einsum("nd,nkd->nk", u, v)
        scores.retain_grad()
        terms = -torch.nn.functional.logsigmoid(torch.cat([scores[:, :1], -scores[:, 1:]], 1))
        terms = terms * ~none
        if self.exclude_positive:
            terms = torch.cat([terms[:, :1], terms[:, 1:] * (candidates[:, 1:] != candidates[:, :1])], 1)
        loss = terms.sum(1)
        loss.sum().backward()
        results = {"loss": loss.detach(), "slopes": scores.grad, "direction": u.grad}
        return {
            name: value.masked_fill(wrong.view(-1, *[1] * (value.dim() - 1)), torch.nan)
            for name, value in results.items()
        }


@dataclass(frozen=True)
class Sums:
    """One call of weighted_row_sums. kind: the distribution of the entries over the rows."""

    dtype: torch.dtype = torch.float32
    kind: str = "uniform"
    entries: int = 150
    rows: int = 40
    dim: int = 32
    per_source: int = 6
    indexed: bool = True
    index: torch.dtype = torch.int64
    wrong: bool = False

    def problem(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """keys, coefficient, source, source_index."""
        g = torch.Generator().manual_seed(self.entries + 100 * self.dim + 7 * self.rows)
        acc = accumulation_dtype(self.dtype)
        draw = torch.rand(self.entries, generator=g)
        keys = {
            "uniform": (draw * self.rows).long(),
            "zipf": (self.rows**draw).long() - 1,
            "one_row": torch.full((self.entries,), self.rows // 2),
            "ends": torch.where(draw < 0.5, 0, self.rows - 1),
        }[self.kind]
        of_source = self.entries // self.per_source
        source_rows = 9 if self.indexed else of_source
        coefficient = torch.randn(self.entries, generator=g, dtype=torch.float64).to(acc)
        dtype = self.dtype if self.indexed else acc
        source = torch.randn(source_rows, self.dim, generator=g, dtype=torch.float64).to(dtype)
        source_index = torch.randint(0, source_rows, (of_source,), generator=g).to(self.index) if self.indexed else None
        if self.wrong:
            keys[3], keys[10], keys[-1] = -1, self.rows, 2**40
            source_index[5], source_index[7] = source_rows, -1
        return keys, coefficient, source, source_index

    def call(self) -> Call:
        keys, coefficient, source, source_index = self.problem()
        _, order, starts = segment_sum.sort_rows(keys, self.rows)
        out = torch.full((self.rows, self.dim), 7.0, dtype=self.dtype)
        arrays = {"starts": starts, "order": order, "coefficient": coefficient, "source": source, "out": out}
        if source_index is not None:
            arrays["source_index"] = source_index
        ints = {
            "source_element": ELEMENTS[source.dtype], "out_element": ELEMENTS[self.dtype],
            "wide_index": self.index == torch.int64, "entries_of_source": self.per_source,
            "source_rows": source.shape[0], "entries": self.entries, "rows": self.rows, "dim": self.dim,
        }  # fmt: skip
        return Call("weighted_row_sums", ints, {}, arrays)

    def expected(self) -> Tensor:
        keys, coefficient, source, source_index = self.problem()
        row = torch.arange(self.entries) // self.per_source
        row = row if source_index is None else source_index[row].long()
        terms = coefficient.double()[:, None] * source.double()[row.clamp(0, source.shape[0] - 1)]
        terms = terms.masked_fill(((row < 0) | (row >= source.shape[0]))[:, None], torch.nan)
        valid = (keys >= 0) & (keys < self.rows)
        return torch.zeros(self.rows, self.dim, dtype=torch.float64).index_add_(0, keys[valid], terms[valid])


def pairs_cases() -> dict[str, Pairs]:
    found = {}
    for dtype, dim in itertools.product(DTYPES, (1, 32, 77, 300)):
        found[f"{short(dtype)}-{dim}"] = Pairs(dtype, dim=dim, exclude_positive=dim == 77, index=torch.int32)
    return found | {
        "no_gradient": Pairs(gradient=False),
        "no_negatives": Pairs(negatives=0),
        "no_pairs": Pairs(count=0),
        "batches_of_candidates": Pairs(count=5, negatives=70, dim=200, words=40, exclude_positive=True),
        "batches_of_candidates_half": Pairs(torch.float16, count=5, negatives=33, dim=40),
        "exclude_positive": Pairs(words=3, exclude_positive=True, none=True),
        "none": Pairs(negatives=40, dim=77, index=torch.int32, none=True),
        "wrong": Pairs(wrong=True),
        "wrong_int32": Pairs(torch.bfloat16, wrong=True, index=torch.int32, dim=37, negatives=40),
    }


def sums_cases() -> dict[str, Sums]:
    found = {}
    for dtype, indexed, dim in itertools.product(DTYPES, (True, False), (32, 45)):
        found[f"{short(dtype)}-{'index' if indexed else 'direct'}-{dim}"] = Sums(dtype, indexed=indexed, dim=dim)
    for kind in ("zipf", "one_row", "ends"):
        found[kind] = Sums(kind=kind, entries=600, rows=70, dim=140, index=torch.int32)
        found[f"{kind}_half"] = Sums(torch.float16, kind=kind, entries=600, rows=70, dim=40)
    return found | {
        "whole_chunks": Sums(entries=CHUNK * 3 - 1, rows=1, per_source=1, dim=8),
        "a_row_fills_chunks": Sums(entries=CHUNK * 4, rows=CHUNK, kind="one_row", per_source=1, dim=8),
        "many_chunks_of_one_row": Sums(entries=CHUNK * 21, rows=3, kind="one_row", dim=4),
        "empty_rows": Sums(entries=6, rows=300, dim=5),
        "no_entries": Sums(entries=0, rows=10, per_source=1),
        "one_column": Sums(dim=1),
        "no_columns": Sums(dim=0),
        "wrong": Sums(wrong=True),
        "wrong_half": Sums(torch.float16, kind="zipf", entries=300, wrong=True, dim=9),
    }


PAIRS, SUMS = pairs_cases(), sums_cases()
results, test_no_kernel_races = run.results_and_races(
    lambda: {
        **{f"pairs-{name}": case.call() for name, case in PAIRS.items()},
        **{f"sums-{name}": case.call() for name, case in SUMS.items()},
    }
)


@pytest.mark.parametrize("name", PAIRS)
def test_loss_slopes_and_direction(name, results):
    case, result = PAIRS[name], results[f"pairs-{name}"]
    assert result.error == ""
    for key, truth in case.expected().items():
        if key in result.arrays:
            assert oracle.error(result.arrays[key], truth) <= roundings(accumulation_dtype(case.dtype)), key
    for key, value in case.inputs().items():
        assert torch.equal(result.arrays[key], value)


@pytest.mark.parametrize("name", SUMS)
def test_row_sums(name, results):
    case, result = SUMS[name], results[f"sums-{name}"]
    assert result.error == ""
    truth = case.expected()
    assert oracle.error(result.arrays["out"], truth) <= roundings(case.dtype)
    assert torch.equal(result.arrays["out"] == 0, truth == 0)


def test_every_kernel_runs(results, request):
    program = run.build(request.node.callspec.params["results"])
    names = ("negative_sampling", "weighted_row_sums")
    compiled = {name for name in run.kernels(program).values() if name.startswith(names)}
    assert len(compiled) == 14
    assert {name for result in results.values() for name in result.launched} == compiled


def test_rows_too_long_are_an_error(tmp_path):
    call = Pairs(count=1).call()
    call.ints["dim"] = 2**30 + 1
    (result,) = run.run(run.build("address"), [call], tmp_path)
    assert "2^30" in result.error
