"""The CUDA kernels of Gumbel-softmax, run on the host under sanitizers, against float64.

The device limits that the launcher gets decide whether a row is cached, computed twice, or shared by a cluster.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

import gumbel_oracle
import pytest
import torch
from cuda_host import run
from torch import Tensor

from sslkernels.latent.gumbel_rows import HARD, NONE, SOFT

pytestmark = run.required

DTYPES = tuple(run.ELEMENTS)
SEED = -(2**40) + 3
SMALL = {"shared_per_block": 4096, "shared_per_processor": 8192}  # too small for long rows
DEVICES = {"": {}, "twice": {**SMALL, "ptx": 80}, "cluster": SMALL, "spread": {"processors": 64}, "old": {"major": 8}}


@dataclass(frozen=True)
class Case:
    """offset: elements before the logits; pad: elements between their rows; bad: rows of NaN, +inf, -inf; grad: the
    gradient of y, "none", "narrow" (the dtype of the logits), "wide" or "in_place"; usage: groups of
    grad_usage, 0 for none."""

    dtype: torch.dtype
    rows: int
    columns: int
    tau: float = 1.0
    device: str = ""
    offset: int = 0
    pad: int = 0
    noise: bool = True
    row_ids: bool = False
    first_row: int = 0
    bad: bool = False
    output: int = NONE
    stats: bool = False
    grad: str = "narrow"
    usage: int = 0
    mask: bool = False

    @property
    def acc(self) -> torch.dtype:
        return gumbel_oracle.accumulation(self.dtype)

    def logits(self) -> Tensor:
        g = torch.Generator().manual_seed(self.rows * 1009 + self.columns)
        values = (3 * torch.randn(self.rows, self.columns, generator=g, dtype=torch.float64)).to(self.dtype)
        values[torch.rand(values.shape, generator=g) < 0.1] = -torch.inf
        values[:, self.columns // 2] = 0.5
        if self.bad:
            values[0, -1] = torch.nan
            values[1, 0] = torch.inf
            values[2] = -torch.inf
        return values

    def ids(self) -> Tensor | None:
        return torch.arange(self.rows) * 2**33 - 5 if self.row_ids else None

    def s(self) -> Tensor:
        ids = self.ids()
        numbers = ids if ids is not None else self.first_row + torch.arange(self.rows)
        return gumbel_oracle.perturbed(self.logits(), SEED if self.noise else None, numbers)

    def draw(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)

    def masked(self) -> Tensor | None:
        return (torch.arange(self.rows) % 3 != 1) if self.mask else None

    def call(self, name: str, ints: dict[str, int], arrays: dict[str, Tensor | None]) -> run.Call:
        stride = self.columns + self.pad
        stored = torch.zeros(self.offset + self.rows * stride, dtype=self.dtype)
        stored[self.offset :].view(self.rows, stride)[:, : self.columns] = self.logits()
        arrays = {
            "logits": stored,
            "inverse_tau": torch.tensor([1 / self.tau], dtype=torch.float64),
            "row_ids": self.ids(),
            "seed": torch.tensor([SEED]) if self.noise else None,
            **arrays,
        }
        sizes = {"rows": self.rows, "columns": self.columns, "logits_stride": stride}
        sizes |= {"first_row": self.first_row, "element": run.ELEMENTS[self.dtype], **ints, **DEVICES[self.device]}
        arrays = {k: a for k, a in arrays.items() if a is not None}
        return run.Call(name, sizes, {}, arrays, {"logits": self.offset})

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, 7, dtype=dtype or self.acc)


def forward_call(case: Case) -> run.Call:
    rows = case.rows
    arrays = {"max": case.empty(rows), "sum": case.empty(rows), "index": case.empty(rows, dtype=torch.int64)}
    if case.output != NONE:
        arrays["y"] = case.empty(rows, case.columns, dtype=case.dtype)
    if case.stats:
        arrays |= {"softmax_max": case.empty(rows), "softmax_sum": case.empty(rows)}
        arrays["argmax"] = case.empty(rows, dtype=torch.int64)
    return case.call("gumbel_rows_fwd", {"output": case.output}, arrays)


def softmax_state(case: Case) -> tuple[Tensor, Tensor]:
    truth = gumbel_oracle.reduced(case.logits().to(case.acc), 1.0)
    return truth.max, truth.sum.to(case.acc)


def grad_of(case: Case) -> Tensor | None:
    if case.grad == "none":
        return None
    return case.draw(case.rows, case.columns, dtype=case.dtype if case.grad == "narrow" else case.acc)


def grad_usage_of(case: Case) -> Tensor | None:
    return case.draw(case.usage, case.columns, dtype=case.acc) if case.usage else None


def backward_call(case: Case) -> run.Call:
    truth, grad, out = gumbel_oracle.reduced(case.s(), case.tau), grad_of(case), case.empty(case.rows, case.columns)
    in_place = case.grad == "in_place"
    out = grad if in_place else out.to(case.dtype)
    softmax_max, softmax_sum = softmax_state(case) if case.usage else (None, None)
    state = (truth.max, truth.sum.to(case.acc)) if grad is not None else (None, None)
    arrays = {"max": state[0], "sum": state[1], "softmax_max": softmax_max, "softmax_sum": softmax_sum}
    arrays |= {"grad_usage": grad_usage_of(case), "mask": case.masked()}
    arrays |= {"grad": None if in_place else grad, "grad_logits": out}
    ints = {"in_place": in_place, "groups": max(case.usage, 1), "grad_stride": 0 if grad is None else case.columns}
    ints["wide_grad"] = grad is not None and grad.dtype != case.dtype
    return case.call("gumbel_rows_bwd", ints, arrays)


@dataclass(frozen=True)
class Sums:
    case: Case
    chunk_rows: int = field(default=2)

    def call(self) -> run.Call:
        groups = self.case.usage
        chunks = -(-self.case.rows // (self.chunk_rows * groups))
        softmax_max, softmax_sum = softmax_state(self.case)
        arrays = {"softmax_max": softmax_max, "softmax_sum": softmax_sum, "mask": self.case.masked()}
        arrays["partial"] = self.case.empty(chunks, groups, self.case.columns)
        ints = {"groups": groups, "chunk_rows": self.chunk_rows, "chunks": chunks}
        return self.case.call("probability_sums", ints, arrays)


# Teams of a part of a warp, of a warp, of a block, and more columns than a block has threads for.
SIZES = [(5, 1), (37, 2), (3, 5), (70, 8), (6, 31), (5, 64), (3, 130), (2, 320), (2, 1030), (1, 2051), (3, 29)]


def cases() -> tuple[dict[str, Case], dict[str, Case], dict[str, Sums]]:
    layouts = itertools.cycle([(0, 0), (1, 0), (0, 3), (2, 1), (4, 8), (8, 8)])
    devices = itertools.cycle(DEVICES)
    taus = itertools.cycle([1.0, 0.1, 1e-3, 5.0, 1e-30, 1e30])
    forward, backward, sums = {}, {}, {}
    kinds = itertools.cycle([(SOFT, False), (HARD, False), (NONE, True), (NONE, False), (SOFT, True), (HARD, True)])
    grads = itertools.cycle([("narrow", 0), ("wide", 0), ("wide", 1), ("none", 1), ("wide", 2), ("in_place", 0)])
    flags = itertools.cycle([{}, {"row_ids": True}, {"first_row": 2**40}, {"noise": False}, {"bad": True}])
    for dtype, (rows, columns) in itertools.product(DTYPES, SIZES):
        offset, pad = next(layouts)
        extra = next(flags)
        if rows < 3:
            extra = {k: v for k, v in extra.items() if k != "bad"}
        base = Case(dtype, rows, columns, next(taus), next(devices), offset, pad, **extra)
        output, stats = next(kinds)
        case = dataclasses.replace(base, output=output, stats=stats)
        forward[run.label(case)] = case
        grad, usage = next(grads)
        if grad == "in_place" and dtype in (torch.bfloat16, torch.float16):
            grad = "narrow"
        if rows % max(usage, 1):
            usage = 1
        case = dataclasses.replace(base, grad=grad, usage=usage, mask=usage > 0 and rows > 3)
        backward[run.label(case)] = case
    for dtype, device in itertools.product(DTYPES, DEVICES):
        # Long rows under every plan, with results for a second pass.
        base = Case(dtype, 3, 1100, 0.5, device, bad=device == "")
        if dtype in (torch.float32, torch.bfloat16):
            forward[run.label(base) + "-long"] = dataclasses.replace(base, output=SOFT)
            backward[run.label(base) + "-long"] = dataclasses.replace(base, grad="wide", usage=3)
        case = dataclasses.replace(
            base, rows=2 * (3 + len(device)), columns=[1, 6, 40, 300, 1500][len(sums) % 5], usage=2
        )
        sums[run.label(case)] = Sums(dataclasses.replace(case, bad=False, mask=len(sums) % 2 == 0))
    empty = Case(torch.float32, 0, 5, output=HARD)
    forward["no_rows"], backward["no_rows"] = empty, dataclasses.replace(empty, output=NONE)
    return forward, backward, sums


FORWARD, BACKWARD, SUMS = cases()
LIMITS = {"processors": 132}
PLANS = {
    # rows, columns, bytes each, twice -> team, threads, cluster, cached
    (4096, 2, 4, False): (1, 32, 1, False),
    (1 << 20, 2, 4, True): (1, 256, 1, True),
    (4096, 128, 4, True): (32, 256, 1, True),
    (4096, 320, 4, True): (96, 96, 1, True),
    (4096, 8192, 4, True): (256, 256, 1, True),
    (4096, 8192, 4, False): (256, 256, 1, False),
    (4096, 50000, 4, True): (1024, 1024, 1, True),
    (4096, 100000, 4, True): (1024, 1024, 2, True),
    (4096, 1 << 20, 4, True): (256, 256, 1, False),
    (1, 1 << 20, 4, False): (256, 256, 8, False),
    (100, 32768, 4, True): (1024, 1024, 2, True),
}


def plan_call(sizes: tuple[int, int, int, bool]) -> run.Call:
    rows, columns, each, twice = sizes
    ints = {"rows": rows, "columns": columns, "chunk": 4, "bytes_each": each, "twice": twice, "most_threads": 1024}
    return run.Call("plan_gumbel_rows", {**ints, **LIMITS}, {}, {"plan": torch.zeros(5, dtype=torch.int64)})


def calls() -> dict[str, run.Call]:
    found = {f"fwd-{name}": forward_call(case) for name, case in FORWARD.items()}
    found |= {f"bwd-{name}": backward_call(case) for name, case in BACKWARD.items()}
    found |= {f"sums-{name}": case.call() for name, case in SUMS.items()}
    return found | {f"plan-{sizes}": plan_call(sizes) for sizes in PLANS}


results, test_no_kernel_races = run.results_and_races(calls)


def close(got: Tensor, true: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Within the rounding of exponents up to 30 and of the dtype."""
    eps = torch.finfo(gumbel_oracle.accumulation(dtype)).eps
    exponent = 64 * eps
    tiny = torch.finfo(dtype).tiny + 1e-30
    torch.testing.assert_close(
        got.double(),
        true.double(),
        rtol=exponent + torch.finfo(dtype).eps,
        atol=scale * exponent + tiny,
        equal_nan=True,
    )


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, results):
    case, result = FORWARD[name], results[f"fwd-{name}"]
    assert result.error == ""
    if case.rows == 0:
        return
    truth, got = gumbel_oracle.reduced(case.s(), case.tau), result.arrays
    assert torch.equal(got["max"], truth.max)
    assert torch.equal(got["index"], truth.index)
    close(got["sum"], truth.sum, case.acc)
    if case.stats:
        plain = gumbel_oracle.reduced(case.logits().to(case.acc), 1.0)
        assert torch.equal(got["softmax_max"], plain.max)
        assert torch.equal(got["argmax"], plain.index)
        close(got["softmax_sum"], plain.sum, case.acc)
    if case.output == SOFT:
        close(got["y"], truth.y, case.dtype)
    if case.output == HARD:
        torch.testing.assert_close(got["y"].double(), gumbel_oracle.hard(truth), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name, results):
    case, result = BACKWARD[name], results[f"bwd-{name}"]
    assert result.error == ""
    if case.rows == 0:
        return
    true = gumbel_oracle.gradient(case.logits(), case.s(), case.tau, grad_of(case), grad_usage_of(case), case.masked())
    close(result.arrays["grad_logits"], true, case.dtype, 4 / case.tau + 4)


@pytest.mark.parametrize("name", SUMS)
def test_probability_sums(name, results):
    case, result = SUMS[name].case, results[f"sums-{name}"]
    assert result.error == ""
    p = gumbel_oracle.reduced(case.logits().to(case.acc), 1.0).y
    if case.mask:
        p = p.masked_fill(~case.masked()[:, None], 0)
    close(result.arrays["partial"].double().sum(0), p.view(-1, case.usage, case.columns).sum(0), case.acc)


@pytest.mark.parametrize("sizes", PLANS)
def test_plan(sizes, results):
    team, threads, cluster, cached, shared = results[f"plan-{sizes}"].arrays["plan"].tolist()
    assert (team, threads, cluster, bool(cached)) == PLANS[sizes]
    _, columns, each, _ = sizes
    if cached:
        assert shared >= 1024 + (columns if team > 32 else columns * threads // team) * each / cluster
    assert shared <= 232448


def test_every_kernel_runs(results, request):
    launched = {name for result in results.values() for name in result.launched}
    program = run.build(request.node.callspec.params["results"])
    kernels = ("gumbel_rows_fwd_kernel", "gumbel_rows_bwd_kernel", "probability_sums_kernel")
    compiled = {name for name in run.kernels(program).values() if name.startswith(kernels)}
    assert len(compiled) == len(DTYPES) * 3
    assert launched == compiled
