"""The CUDA kernel of linear_sample, run on the host under sanitizers: the same draws as the reference, tile after tile,
and log-probabilities against float64.

The device limits that the launcher gets decide how many threads share a row.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from cuda_host import run
from torch import Tensor

import sslkernels as sk
from sslkernels.random import transforms

pytestmark = run.required

DTYPES = (torch.float32, torch.float64)  # dtypes of products on a GPU
SEED = -(2**40) + 3
DEVICES = {"": {}, "spread": {"processors": 64}, "old": {"processors": 64, "major": 8}}


@dataclass(frozen=True)
class Case:
    """tile: columns per tile; offset: elements before the products; pad: elements between their rows; kind: of logits,
    "normal", "masked" (many -inf), "bad" (rows of NaN, +inf, -inf), "equal" (bit-equal sums), "far"."""

    dtype: torch.dtype
    rows: int
    vocab: int
    tile: int = 1 << 20
    device: str = ""
    offset: int = 0
    pad: int = 0
    bias: bool = False
    temperature: float = 1.0
    kind: str = "normal"
    mixed: bool = False
    draw: int = 0

    def products(self) -> Tensor:
        g = torch.Generator().manual_seed(self.rows * 1009 + self.vocab)
        values = 3 * torch.randn(self.rows, self.vocab, generator=g, dtype=torch.float64)
        if self.kind == "masked":
            values[torch.rand(values.shape, generator=g) < 0.9] = -torch.inf
            values[:, self.vocab // 2] = 0.5
        if self.kind == "bad":
            values[0, self.vocab // 3] = torch.nan
            values[1, self.vocab - 1] = torch.inf
            values[2] = -torch.inf
            values[3, ::2] = -torch.inf
            values[4] = torch.nan
        if self.kind == "equal":  # noise is below half the spacing of numbers from here on
            first = torch.randint(self.vocab, (self.rows, 1), generator=g)
            values = torch.where(torch.arange(self.vocab) >= first, 2.0**60, values)
        if self.kind == "far":
            values += 3000 * (torch.arange(self.rows)[:, None] - 1)
        return values.to(self.dtype)

    def column_bias(self) -> Tensor | None:
        g = torch.Generator().manual_seed(self.vocab)
        return torch.randn(self.vocab, generator=g, dtype=torch.float64).to(self.dtype) if self.bias else None

    def ids(self) -> Tensor:
        return torch.arange(self.rows) * 2**33 - 5

    def logits(self) -> Tensor:
        """With the rounding of the reference."""
        products, bias = self.products(), self.column_bias()
        z = products if bias is None else products + bias
        scale = torch.where(self.greedy(), 1, self.scale())[:, None]
        return torch.where(z == -torch.inf, z, z * scale)

    def scale(self) -> Tensor:
        """One over the temperature; "mixed": of every kind."""
        scale = torch.full((self.rows,), math.inf if self.temperature == 0 else 1 / self.temperature, dtype=self.dtype)
        if self.mixed:
            kinds = torch.tensor([1.0, torch.inf, 0.0, 3.0], dtype=self.dtype)
            scale = kinds.repeat(self.rows)[: self.rows]
        return scale

    def greedy(self) -> Tensor:
        return self.scale().isinf()

    def call(self) -> run.Call:
        stride = self.vocab + self.pad
        stored = torch.full((self.offset + self.rows * stride,), torch.nan, dtype=self.dtype)
        stored[self.offset :].view(self.rows, stride)[:, : self.vocab] = self.products()
        state = {
            name: torch.full((self.rows,), 7, dtype=self.dtype) for name in ("row_max", "sum_exp", "best", "logprob")
        }
        arrays = {"products": stored, "bias": self.column_bias(), "row_ids": self.ids(), "seed": torch.tensor([SEED])}
        arrays |= {**state, "index": torch.full((self.rows,), 7)}
        sizes = {"rows": self.rows, "vocab": self.vocab, "tile": self.tile, "stride": stride}
        sizes |= {"draw": self.draw, "element": run.ELEMENTS[self.dtype], **DEVICES[self.device]}
        arrays["scale"] = self.scale()
        arrays = {k: a for k, a in arrays.items() if a is not None}
        return run.Call("sample_rows", sizes, {}, arrays, {"products": self.offset})


# Teams of a part of a warp, of a warp, of some of them, and of several blocks.
SIZES = [(1, 1), (37, 2), (5, 5), (9, 31), (6, 64), (70, 130), (6, 517), (6, 1030), (2, 4099), (1, 9000)]


def cases() -> dict[str, Case]:
    layouts = itertools.cycle([(0, 0), (1, 0), (0, 3), (2, 1), (4, 8)])
    devices = itertools.cycle(DEVICES)
    temperatures = itertools.cycle([1.0, 0.7, 0.02, 30.0, float("inf")])
    kinds = itertools.cycle(["normal", "masked", "bad", "equal", "far", "normal"])
    tiles = itertools.cycle([1 << 20, 256, 512, 1 << 20, 4])
    found = []
    for dtype, (rows, vocab) in itertools.product(DTYPES, SIZES):
        (offset, pad), kind, tile = next(layouts), next(kinds), next(tiles)
        kind = "normal" if kind == "bad" and rows < 5 else kind
        tile = max(tile, 1024) if vocab > 1000 else tile  # launches are slow here
        temperature = 1.0 if kind in ("equal", "bad") else next(temperatures)
        found.append(Case(dtype, rows, vocab, tile, next(devices), offset, pad, len(found) % 2 == 1, temperature, kind))
    for kind, tile in itertools.product(["masked", "bad", "equal", "far"], [1 << 20, 128]):
        found.append(Case(torch.float32, 6, 330, tile, "spread", kind=kind))
    for kind, tile in itertools.product(["masked", "bad", "equal", "normal"], [1 << 20, 128]):
        found.append(Case(torch.float32, 9, 330, tile, "spread", bias=True, kind=kind, mixed=True, draw=3))
    found.append(Case(torch.float64, 5, 1030, bias=True, kind="normal", temperature=0.0))
    # Few classes, many rows: the largest logit often draws a small number, and a lower one wins.
    found += [Case(dtype, rows, 3 * (rows > 0) + 2, temperature=2.0) for dtype in DTYPES for rows in (0, 5000)]
    return {run.label(case): case for case in found}


CASES = cases()
PLANS = {
    # rows, columns -> team, threads, cluster, on 132 multiprocessors
    (1024, 4224): (160, 160, 1),
    (1024, 1024): (64, 64, 1),
    (8192, 1024): (32, 256, 1),
    (64, 98304): (256, 256, 8),
    (512, 98304): (256, 256, 2),
    (1, 128256): (256, 256, 8),
    (1, 17): (2, 32, 1),
    (1024, 17): (2, 32, 1),
    (1 << 20, 2): (1, 256, 1),
}


def plan_call(sizes: tuple[int, int]) -> run.Call:
    ints = {"rows": sizes[0], "columns": sizes[1], "processors": 132}
    return run.Call("plan_sample_rows", ints, {}, {"plan": torch.zeros(3, dtype=torch.int64)})


def calls() -> dict[str, run.Call]:
    found = {name: case.call() for name, case in CASES.items()}
    empty = CASES["dtype=float32-rows=0-vocab=2-temperature=2.0"].call()
    half = run.Call("sample_rows", {**empty.ints, "element": run.ELEMENTS[torch.float16]}, empty.reals)
    return found | {f"plan-{sizes}": plan_call(sizes) for sizes in PLANS} | {"half": half}


results, test_no_kernel_races = run.results_and_races(calls)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, results):
    case, result = CASES[name], results[name]
    assert result.error == ""
    got, z = result.arrays, case.logits()
    if case.rows == 0:
        return
    with sk.use_backend("reference"):
        gumbel = sk.random_gumbel(z.shape, SEED, row_ids=case.ids(), sample=case.draw)
    greedy = case.greedy()
    gumbel = torch.where(greedy[:, None], 0, gumbel)
    perturbed = torch.where(z.isnan(), -torch.inf, z + gumbel)
    best, index = perturbed.max(1)
    known = z.masked_fill(z.isnan(), -torch.inf)
    assert torch.equal(got["index"], index)
    assert torch.equal(got["best"], best)
    assert torch.equal(got["row_max"], known.amax(1))
    exact = z.double().log_softmax(1).gather(1, index[:, None])[:, 0]
    exact[greedy & ~exact.isnan()] = 0
    exact[got["best"] == -torch.inf] = torch.nan
    eps = torch.finfo(case.dtype).eps
    # Relative to the maximum, so that a large common offset of the logits does not count.
    allowed = 8 * eps * (1 + (known.amax(1) - z.gather(1, index[:, None])[:, 0]).abs().nan_to_num(0, 0, 0))
    error = (got["logprob"].double() - exact).abs()
    assert torch.equal(got["logprob"].isnan(), exact.isnan())
    assert ((error <= allowed) | exact.isnan()).all()


@pytest.mark.parametrize("sizes", PLANS)
def test_plan(sizes, results):
    assert tuple(results[f"plan-{sizes}"].arrays["plan"].tolist()) == PLANS[sizes]


def test_other_dtypes_are_refused(results):
    assert results["half"].error == "sslkernels: sample_rows_kernel takes float32 and float64 products"


def test_every_kernel_runs(results, request):
    launched = {name for result in results.values() for name in result.launched}
    program = run.build(request.node.callspec.params["results"])
    compiled = {name for name in run.kernels(program).values() if name.startswith("sample_rows_kernel")}
    assert len(compiled) == len(DTYPES)
    assert {name for name in launched if name.startswith("sample_rows")} == compiled


def test_a_winning_word_always_gets_its_gumbel_number():
    """The kernel computes the Gumbel number only of words whose uniform number, truncated to 23 bits, is below
    1.001 exp(logit - best). A Gumbel number exceeds that bound by less than half of the thousandth."""
    ends = torch.arange(1 << 16), torch.arange(2**32 - (1 << 16), 2**32)
    words = torch.cat([*ends, torch.arange(0, 2**32, 40009)])
    number = (words // 512).double() / 2**23
    assert (transforms.gumbel(words).double() <= -number.log() + 5e-4).all()
    assert float(transforms.gumbel(words).min()) > -3.2
    assert float(transforms.gumbel(words).max()) < 22.88
