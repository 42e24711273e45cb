"""The CUDA kernels of linear_distillation, run on the host under sanitizers, against float64."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from cuda_host import run
from torch import Tensor

pytestmark = run.required

DTYPES = (torch.float32, torch.float64)  # dtypes of logits on a GPU
GRADIENTS = {torch.float32: (None, torch.float32, torch.bfloat16, torch.float16), torch.float64: (None, torch.float64)}


@dataclass(frozen=True)
class Case:
    """choices: columns of the index, 0 for none; grad: dtype of the gradient, None for none; in_place: it replaces the
    logits. align: elements before the logits; pad: between rows. kind: "normal", "confident", "bad" (rows of NaN, +inf
    and -inf, an index out of range), "masked" (many logits of -inf)."""

    dtype: torch.dtype
    rows: int
    vocab: int
    choices: int = 0
    grad: torch.dtype | None = None
    in_place: bool = False
    align: int = 0
    pad: int = 0
    offset: bool = False
    stats: bool = False
    divergence: bool = False
    kind: str = "normal"

    @property
    def teachers(self) -> int:
        return 3 if self.choices else self.rows

    def numbers(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.rows * 1009 + self.vocab)
        make = {"generator": g, "dtype": torch.float64}
        logits = 3 * torch.randn(self.rows, self.vocab, **make)
        teacher = 4 * torch.randn(self.teachers, self.vocab, **make)
        if self.kind == "confident":
            logits[:, self.vocab // 2] = 60 + torch.arange(self.rows)
            teacher[:, self.vocab // 2] = 70
            teacher[1, self.vocab // 2] = -70
            teacher[1, 0] = 75
        if self.kind == "masked":
            gone = torch.rand(self.vocab, generator=g) < 0.7
            gone[self.vocab // 2] = False
            logits[:, gone] = teacher[:, gone] = -torch.inf
        if self.kind == "bad":
            logits[0, self.vocab // 3] = torch.nan
            logits[1, self.vocab - 1] = torch.inf
            logits[2] = -torch.inf
            teacher[2, 0] = torch.nan
        found = {"logits": logits.to(self.dtype), "teacher": teacher.to(self.dtype)}
        if self.offset:
            found["offset"] = torch.randn(self.vocab, **make).to(self.dtype)
        found["coefficient"] = torch.randn(self.rows, **make).to(self.dtype)
        return found

    def index(self) -> Tensor:
        g = torch.Generator().manual_seed(self.rows)
        index = torch.randint(-1, self.teachers, (self.rows, self.choices), generator=g)
        index[:1] = -1
        if self.kind == "bad":
            index[0], index[1], index[2] = 0, 0, 1
            index[3], index[4, 0] = 0, self.teachers
        return index

    def teacher_call(self) -> run.Call:
        """The kernel that turns the teacher's logits into exponentials, on the student's logits."""
        t = self.numbers()
        arrays = {"logits": self._stored(t["logits"]), "scale": torch.tensor([0.7], dtype=self.dtype)}
        arrays |= {"offset": t["offset"]} if self.offset else {}
        arrays["others"] = torch.full((self.rows,), 7, dtype=self.dtype)
        arrays["best"] = torch.full((self.rows,), 7)
        return run.Call("teacher_rows", self._sizes(), {}, arrays, {"logits": self.align})

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        teacher = self.numbers()["teacher"]
        largest, best = teacher.nan_to_num(-torch.inf).max(1)
        e = (teacher - largest[:, None]).exp()
        return e, e.scatter(1, best[:, None], 0).sum(1), best

    def call(self) -> run.Call:
        t, (e, others, best) = self.numbers(), self.state()
        arrays = {"logits": self._stored(t["logits"]), "scale": torch.tensor([0.7], dtype=self.dtype)}
        arrays |= {"teacher": e, "teacher_others": others, "teacher_best": best}
        arrays |= {"offset": t["offset"]} if self.offset else {}
        if self.choices:
            index = self.index()
            given = (index >= 0).to(self.dtype)
            arrays |= {"index": index, "share": given / given.sum(1, keepdim=True).clamp_min(1)}
        for name in ("loss", "gap", *(("teacher_entropy", "student_entropy") if self.stats else ())):
            arrays[name] = torch.full((self.rows,), 7, dtype=self.dtype)
        if self.stats:
            arrays["agreement"] = torch.zeros(self.rows, dtype=torch.bool)
        if self.grad is not None:
            arrays["coefficient"] = t["coefficient"]
            if not self.in_place:
                arrays["grad"] = torch.full((self.rows, self.vocab + self.pad), 7, dtype=self.grad)
        sizes = self._sizes() | {
            "teacher_stride": self.vocab,
            "teachers": self.teachers,
            "choices": max(self.choices, 1),
            "grad_stride": self.vocab + self.pad,
            "grad_element": run.ELEMENTS[self.grad or self.dtype],
            "divergence": int(self.divergence),
            "in_place": int(self.in_place),
        }
        return run.Call("distillation_rows", sizes, {}, arrays, {"logits": self.align})

    def _sizes(self) -> dict[str, int]:
        stride = self.vocab + self.pad
        return {"element": run.ELEMENTS[self.dtype], "stride": stride, "count": self.rows, "vocab": self.vocab}

    def _stored(self, logits: Tensor) -> Tensor:
        stride = self.vocab + self.pad
        stored = torch.full((self.align + self.rows * stride,), torch.nan, dtype=self.dtype)
        stored[self.align :].view(self.rows, stride)[:, : self.vocab] = logits
        return stored

    def unstored(self, stored: Tensor) -> Tensor:
        return stored[self.align :].view(self.rows, self.vocab + self.pad)[:, : self.vocab]


SIZES = [(5, 1), (5, 2), (7, 9), (6, 131), (5, 517), (2, 1030)]


def cases() -> dict[str, Case]:
    layouts = itertools.cycle([(0, 0), (1, 0), (0, 3), (2, 1), (4, 8)])
    kinds, choices = itertools.cycle(["normal", "confident", "masked", "bad"]), itertools.cycle([0, 1, 3, 2, 0])
    flags = itertools.cycle(itertools.product([False, True], repeat=3))
    found = []
    for dtype, (rows, vocab) in itertools.product(DTYPES, SIZES):
        for grad in GRADIENTS[dtype]:
            (align, pad), kind, (offset, stats, divergence) = next(layouts), next(kinds), next(flags)
            kind = "normal" if vocab < 3 or rows < 5 else kind
            in_place = grad == dtype
            found.append(
                Case(dtype, rows, vocab, next(choices), grad, in_place, align, pad, offset, stats, divergence, kind)
            )
    found += [Case(torch.float32, 6, 131, 2, torch.float32, False, kind="bad", stats=True, divergence=True)]
    found += [Case(torch.float32, 0, 5, 2, torch.float32, True)]
    return {run.label(case): case for case in found}


CASES = cases()


def calls() -> dict[str, run.Call]:
    found = {name: case.call() for name, case in CASES.items()}
    found |= {f"teacher-{name}": case.teacher_call() for name, case in CASES.items() if case.grad is None}
    empty = Case(torch.float32, 0, 5, 2, torch.float32, True)
    half = {"element": run.ELEMENTS[torch.float16]}
    found["half teacher"] = dataclasses.replace(empty.teacher_call(), ints=empty.teacher_call().ints | half)
    found["half"] = dataclasses.replace(empty.call(), ints=empty.call().ints | half)
    return found


results, test_no_kernel_races = run.results_and_races(calls)


def z_of(case: Case) -> Tensor:
    t = case.numbers()
    z = 0.7 * t["logits"].double()
    return z + t["offset"].double() if case.offset else z


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.grad is None])
def test_teacher_rows_equal_float64(name, results):
    case, result = CASES[name], results[f"teacher-{name}"]
    assert result.error == ""
    z = z_of(case)
    largest, best = z.nan_to_num(-torch.inf, torch.inf, -torch.inf).max(1)
    e = (z - largest[:, None]).exp()
    fine = largest.isfinite() & z.isfinite().logical_or(z == -torch.inf).all(1)
    close = {"rtol": 64 * torch.finfo(case.dtype).eps, "atol": 1e-30}
    others = e.scatter(1, best[:, None], 0).sum(1)
    torch.testing.assert_close(result.arrays["others"].double()[fine], others[fine], **close)
    assert result.arrays["others"][~fine].isnan().all()
    assert torch.equal(result.arrays["best"][fine], best[fine])
    torch.testing.assert_close(case.unstored(result.arrays["logits"]).double()[fine], e[fine], **close)


@pytest.mark.parametrize("name", CASES)
def test_distillation_rows_equal_float64(name, results):
    case, result = CASES[name], results[name]
    assert result.error == ""
    got, z = result.arrays, z_of(case)
    e, others, best = (values.double() if values.is_floating_point() else values for values in case.state())
    softmax = e / (1 + others[:, None])
    rest = (1 - softmax).scatter(1, best[:, None], (others / (1 + others))[:, None])
    left_out = torch.zeros(case.rows, dtype=torch.bool)
    wrong = left_out.clone()
    q, rest_of_q = softmax, rest
    if case.choices:
        index = case.index()
        given = (index >= 0).double()
        left_out, wrong = (index < 0).all(1), (index >= case.teachers).any(1)
        share = given / given.sum(1, keepdim=True).clamp_min(1)
        number = index.clamp(0, case.teachers - 1)
        q, rest_of_q = (
            torch.where(given[..., None] > 0, share[..., None] * values[number], 0).sum(1) for values in (softmax, rest)
        )
    largest, at = z.nan_to_num(-torch.inf, torch.inf, -torch.inf).max(1)
    gap = largest[:, None] - z
    exp = (-gap).exp().scatter(1, at[:, None], 0)
    rest_of_p = exp.sum(1) / (1 + exp.sum(1))
    log_p = -gap - exp.sum(1, keepdim=True).log1p()
    p = log_p.exp()
    difference = p - q
    own = at[:, None]
    sure = (p.gather(1, own) > 0.5) & (q.gather(1, own) > 0.5)
    exact = torch.where(sure, rest_of_q.gather(1, own) - rest_of_p[:, None], difference.gather(1, own))
    difference = difference.scatter(1, own, exact)
    log_q = torch.where(q > 0.5, torch.log1p(-rest_of_q), q.log())

    def mean(values: Tensor, weight: Tensor) -> Tensor:
        return torch.where(weight == 0, 0, weight * values).sum(1)

    expected = {"loss": mean(-log_p, q), "gap": mean(gap, p) - mean(gap, q)}
    if case.divergence:
        expected["loss"] = torch.where(q == 0, p, q * (log_q - log_p) + difference).sum(1)
    if case.stats:
        expected |= {"teacher_entropy": mean(-log_q, q), "student_entropy": mean(-log_p, p)}
    eps = torch.finfo(case.dtype).eps
    size = 1 + torch.where(z.isfinite(), z.abs(), 0).amax(1)
    for key, values in expected.items():
        values = values.masked_fill(left_out, 0).masked_fill(wrong, torch.nan)
        found = got[key].double()
        assert torch.equal(found.isnan(), values.isnan()), key
        scale = values.abs() if key in ("loss", "teacher_entropy") else values.abs() + (size if key == "gap" else 0)
        allowed = 16 * eps * size * (scale + 1e-30)
        assert ((found - values).abs() <= allowed).nan_to_num(1).logical_or(values.isnan()).all(), key
    bad = expected["loss"].isnan() | wrong
    if case.stats:
        same = (q.argmax(1) == at) & ~left_out
        assert torch.equal(got["agreement"][~bad], same[~bad])
    if case.grad is None:
        return
    grad = case.unstored(got["logits"]) if case.in_place else got["grad"][:, : case.vocab]
    truth = case.numbers()["coefficient"].double()[:, None] * difference
    truth = truth.masked_fill(left_out[:, None], 0).masked_fill(wrong[:, None], torch.nan)
    fine = ~bad | left_out
    allowed = 16 * eps * size[:, None] * truth.abs().amax(1, keepdim=True) + torch.finfo(case.grad).eps * truth.abs()
    allowed = allowed + torch.finfo(case.grad).tiny
    assert ((grad.double() - truth).abs() <= allowed)[fine].all()
    assert grad[wrong].isnan().all()


def test_other_dtypes_are_refused(results):
    assert results["half teacher"].error == "sslkernels: teacher_rows_kernel takes float32 and float64 logits"
    assert results["half"].error.startswith("sslkernels: distillation_rows_kernel takes float32 or float64 logits")


def test_every_kernel_runs(results, request):
    launched = {name for result in results.values() for name in result.launched}
    program = run.build(request.node.callspec.params["results"])
    kernels = ("teacher_rows_kernel", "distillation_rows_kernel")
    compiled = {name for name in run.kernels(program).values() if name.startswith(kernels)}
    assert len(compiled) == 2 + 4
    assert {name for name in launched if name.startswith(kernels)} == compiled
