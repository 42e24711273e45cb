"""Norms, scores of positives, losses and finished gradients of rows: every backend against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from public_calls import left_over
from torch import Tensor

import sslkernels as sk
from sslkernels.contrastive.pair_rows import (
    HINGE,
    INVALID_POSITIVE,
    NO_POSITIVE,
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    FeatureGradient,
    LossOptions,
    LossOutputs,
    LossRows,
    PositivePairs,
    SideGrad,
)
from sslkernels.contrastive.records import gradient_dtype
from sslkernels.contrastive.score_tiles import PairKernels, ReferencePairs
from sslkernels.contrastive.tile_backends import NativePairs, TritonPairs

pytestmark = pytest.mark.pairwise

OP = "contrastive_energy"
KERNELS = {"reference": ReferencePairs(), "cpu": NativePairs(), "triton": TritonPairs()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 3, 1), (9, 9, 19), (130, 150, 700))  # rows, keys, D: one block and several, with and without a rest
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-5, torch.float16: 2e-5}
ROUNDING = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 2**-8}


@pytest.fixture
def kernels(backend: str) -> PairKernels:
    return KERNELS[backend]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(record: Any) -> Any:
    """The record, or tensor, with floating-point tensors in float64."""
    if isinstance(record, tuple):
        return type(record)(*map(wide, record))
    return record.double() if isinstance(record, Tensor) and record.is_floating_point() else record


def features(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    """Queries and keys; the first query is zero, and the last key so small that its norm is clamped."""
    rows, keys, dim = shape
    query, key = torch.randn(rows, dim, device=device), torch.randn(keys, dim, device=device)
    query[0] = 0
    key[-1] *= 1e-15
    return query.to(dtype), key.to(dtype)


def positive_of(kind: str, rows: int, keys: int, device: str) -> Tensor | None:
    if kind == "in order":
        return None
    positive = torch.randint(0, keys, (rows,), device=device)
    positive[::3] = NO_POSITIVE
    positive[1::4] = INVALID_POSITIVE
    return positive


def close(found: Tensor, want: Tensor, tolerance: float, scale: float = 1.0) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_norms(kernels, dtype, shape, device):
    for values in features(dtype, shape, device):
        norm = kernels.inverse_norm(values, accumulation(dtype))
        assert norm.dtype == accumulation(dtype)
        close(norm, ReferencePairs().inverse_norm(values.double(), torch.float64), TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("positive", ["in order", "by index"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positive_scores(kernels, dtype, shape, positive, normalize, bias, device):
    rows, keys, dim = shape
    query, key = features(dtype, shape, device)
    norms: list[Tensor | None] = [None, None]
    if normalize:
        norms = [ReferencePairs().inverse_norm(x, accumulation(dtype)) for x in (query, key)]
    pairs = PositivePairs(query, key, *norms, positive_of(positive, rows, keys, device))
    number = torch.tensor([3.0], dtype=accumulation(dtype), device=device)
    found, want = ([torch.empty(rows, dtype=d, device=device) for _ in range(2)] for d in (number.dtype, torch.float64))
    kernels.positive_scores(pairs, number, number if bias else None, *found)
    ReferencePairs().positive_scores(wide(pairs), number.double(), number.double() if bias else None, *want)
    for values, expected in zip(found, want, strict=True):
        close(values, expected, TOLERANCE[dtype], scale=dim)


def loss_rows(
    dtype: torch.dtype, rows: int, entries: int, options: LossOptions, positive: Tensor | None, device: str
) -> LossRows:
    """Sums of `entries` rows; without a positive in row 1, sums of nothing in row 0, a score beyond any exp in the last
    one."""

    def vector(wanted: bool = True, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.rand(entries, dtype=dtype, device=device) if wanted else None

    softmax, smooth, ids = options.energy == SOFTMAX, options.label_smoothing > 0, options.ids_positive
    sums = ColumnSums(
        vector(softmax), vector(dtype=torch.float64), vector(options.energy == HINGE, torch.float64),
        vector(smooth, torch.float64), vector(ids, torch.float64),
    )  # fmt: skip
    if softmax:
        sums.sum[0], sums.max[0] = 0, float("-inf")
    counts = torch.randint(1, 9, (entries,), device=device)
    score, u = torch.randn(rows, dtype=dtype, device=device) * 4, torch.randn(rows, dtype=dtype, device=device)
    score[-1] = 200
    if positive is not None:
        score[positive == INVALID_POSITIVE] = u[positive == INVALID_POSITIVE] = float("nan")
    side = SideGrad(vector(), None, vector(ids), vector(smooth))
    side.weight[0] = 0
    return LossRows(sums, score, u, positive, counts if ids else None, counts if smooth else None, side)


def loss_outputs(rows: LossRows, softmax: bool, dtype: torch.dtype) -> LossOutputs:
    entries, score = rows.sums.sum.shape[0], rows.score
    others = torch.empty_like(score, dtype=torch.float64) if softmax else None
    written = softmax and rows.side.weight is not None
    reference, weight = (torch.empty(entries, dtype=dtype, device=score.device) if written else None for _ in range(2))
    added = [torch.ones_like(score, dtype=d) for d in (dtype, dtype, torch.float64, torch.float64)]
    return LossOutputs(others, reference, weight, *added)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("positive", ["in order", "by index"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
def test_losses(kernels, energy, smoothing, ids, positive, gradient, device):
    if energy != SOFTMAX and (smoothing or ids):
        return
    options = LossOptions(energy, 0.5, smoothing, ids)
    for dtype, rows in itertools.product((torch.float32, torch.float64), (1, 9, 300)):
        entries = rows + 5 if positive == "in order" else rows  # columns that are nobody's positive
        given = loss_rows(dtype, rows, entries, options, positive_of(positive, rows, 7, device), device)
        if not gradient:
            given = given._replace(side=SideGrad())
        found, want = (loss_outputs(given, energy == SOFTMAX, d) for d in (dtype, torch.float64))
        kernels.add_losses(given, options, found)
        ReferencePairs().add_losses(wide(given), options, want)
        for values, expected in zip(found, want, strict=True):
            if values is not None:
                close(values, expected, TOLERANCE[dtype], scale=10)


def test_losses_from_others_alone(kernels, device):
    """As the backward of per-row losses has it: the sums are a log-sum-exp, and no loss is wanted."""
    options = LossOptions(SOFTMAX, 1.0, 0.1, True)
    given = loss_rows(torch.float32, 9, 9, options, None, device)
    others = torch.randn(9, device=device)
    given = given._replace(
        sums=ColumnSums(others, torch.ones(9, dtype=torch.float64, device=device), None, None, None),
        positives=None,
        candidates=None,
    )
    found, want = (
        loss_outputs(given, True, d)._replace(others=None, loss=None) for d in (torch.float32, torch.float64)
    )
    kernels.add_losses(given, options, found)
    ReferencePairs().add_losses(wide(given), options, want)
    for values, expected in zip(found, want, strict=True):
        if values is not None:
            close(values, expected, 2e-5, scale=10)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("partner", ["none", "in order", "by index"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finished_gradients(kernels, dtype, shape, partner, normalize, extra, device):
    rows, keys, dim = shape
    acc = accumulation(dtype)
    partners, values = features(dtype, (rows, keys, dim), device)  # more rows than partners
    norms: list[Tensor | None] = [None, None]
    if normalize:
        norms = [ReferencePairs().inverse_norm(x, acc) for x in (values, partners)]
    gradient = FeatureGradient(torch.randn(keys, dim, dtype=acc, device=device), values, norms[0])
    if partner != "none":
        index = positive_of(partner, keys, rows, device)
        of_score = torch.randn(rows if index is None else keys, dtype=acc, device=device)
        if index is not None:
            of_score[index == NO_POSITIVE] = 0
            of_score[index == INVALID_POSITIVE] = float("nan")
        gradient = gradient._replace(partner=partners, partner_norm=norms[1], index=index, score_gradient=of_score)
    if extra:
        gradient = gradient._replace(extra=torch.randn(keys, dim, dtype=acc, device=device))
    scale = torch.tensor([3.0], dtype=acc, device=device)
    want = torch.empty(keys, dim, dtype=torch.float64, device=device)
    ReferencePairs().finish_gradient(
        wide(gradient)._replace(total=gradient.total.double().clone()), scale.double(), want
    )
    out = torch.empty(keys, dim, dtype=gradient_dtype(values), device=device)
    kernels.finish_gradient(gradient._replace(total=gradient.total.clone()), scale, out)
    # A row whose norm is clamped has a gradient of 1e12 and more.
    size = want.nan_to_num().abs().amax(1, keepdim=True).clamp(min=1)
    close(out.double() / size, want / size, TOLERANCE[dtype] + ROUNDING[out.dtype], scale=10)


@pytest.mark.parametrize(
    ("direction", "energy"), [("row", "softmax"), ("symmetric", "softmax"), ("row", "sigmoid"), ("symmetric", "hinge")]
)
def test_a_loss_leaves_no_cycles(direction, energy):
    """The products of a plan would stay until Python's collector runs."""
    query, key = (torch.randn(16, 8, requires_grad=True) for _ in range(2))

    def step():
        loss, _ = sk.contrastive_energy(query, key, direction=direction, energy=energy, return_stats=True)
        loss.backward()

    assert left_over(step) == 0


def test_an_infinite_similarity_with_a_slope_of_zero():
    query = torch.tensor([[1e20, 0.0], [0.0, 1.0]], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    gradients = []
    for name in ("reference", "cpu"):
        if name not in sk.available_backends("contrastive_energy", "cpu"):
            pytest.skip("it needs the extension")
        with sk.use_backend(name):
            loss = sk.contrastive_energy(query, query.detach(), logit_scale=scale)
            gradients.append(torch.autograd.grad(loss, (query, scale)))
    for got, expected in zip(*gradients, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected)
