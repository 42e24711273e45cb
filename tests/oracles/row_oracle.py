"""Inputs for the cross-entropy row tests, the float64 reference, and the tolerances of results."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sslkernels.vocabulary.softmax_rows import ReferenceRows, RowOptions, RowOutputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = RowOptions(-100, 0.0, 0.0, 0.0)
EVERY = RowOptions(-100, 0.125, 2.0**-10, 3.0, 0.75)
EPS32 = torch.finfo(torch.float32).eps


def make(device, count, vocab, dtype=torch.float32, *, seed=0, scale=2.0, pitch=None, index_dtype=torch.int64):
    """Logits, targets (one ignored if there are at least three), bias, class weights, coefficients."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(count, pitch or vocab, generator=generator, dtype=torch.float64) * scale
    logits = storage.to(device, dtype)[:, :vocab]
    target = torch.randint(0, vocab, (count,), generator=generator).to(device, index_dtype)
    if count > 2:
        target[1] = -100
    bias = torch.randn(vocab, generator=generator).to(device)
    weight = torch.rand(vocab, generator=generator).to(device) + 0.1
    coefficient = torch.rand(count, generator=generator).to(device) + 0.5
    return logits, target, bias, weight, coefficient


def oracle(logits, target, bias, weight, options, coefficient=None, stats=True):
    """Outputs and gradient of the reference in float64."""
    wide = [None if t is None else t.double() for t in (bias, weight)]
    grad = None if coefficient is None else torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    outputs = ReferenceRows().forward(
        logits.double(), target, *wide, options, stats=stats, coefficient=coefficient, grad=grad
    )
    return outputs, grad


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str, scale: Tensor | float = 1.0) -> None:
    """|got - want| <= tolerance * (|want| + scale), and the same NaNs and infinities."""
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan()), what
    assert torch.equal(got[got.isinf()], want[want.isinf()]), what
    finite = want.isfinite()
    error = (got - want).abs()[finite]
    bound = tolerance * (want.abs() + scale)[finite]
    assert bool((error <= bound).all()), f"{what}: {float((error / bound).max()):.3g} times the tolerance"


def assert_outputs(got: Iterable[Tensor], want: RowOutputs, tolerance: float, *, stats: bool) -> None:
    """Compares lse instead of row_max and sum_exp; the terms of a loss are as large as its largest |z|."""
    got = RowOutputs(*got)
    scale = 1.0 + want.row_max.abs()
    assert_near(got.row_max + got.sum_exp.log(), want.row_max + want.sum_exp.log(), tolerance, "lse")
    assert_near(got.logprob, want.logprob, tolerance, "logprob")
    assert_near(got.loss, want.loss, tolerance, "loss", scale)
    if stats:
        assert got.prediction.dtype == torch.int64
        assert torch.equal(got.prediction.cpu(), want.prediction.cpu())
        assert_near(got.entropy, want.entropy, tolerance, "entropy", scale)
    else:
        assert got.prediction.numel() == got.entropy.numel() == 0


def tolerance_of(dtype: torch.dtype) -> float:
    """Rounding of the accumulation dtype: a few ulp for exp, log and blocked sums."""
    return 1e-13 if dtype == torch.float64 else 16 * EPS32


def assert_gradient(got: Tensor, want: Tensor, coefficient: Tensor, tolerance: float | None = None) -> None:
    """Error bound: the accumulation's, relative to the row's coefficient, plus half an ulp of rounding."""
    accumulation = tolerance_of(got.dtype) if tolerance is None else tolerance
    info = torch.finfo(got.dtype)
    rounding = 0 if got.dtype in (torch.float32, torch.float64) else 0.5 * info.eps
    bound = accumulation * coefficient.double().abs().unsqueeze(1) + rounding * want.abs() + info.smallest_normal
    assert torch.equal(got.isnan().cpu(), want.isnan().cpu())
    finite = want.isfinite()
    error = (got.double() - want).abs()
    assert bool((error <= bound)[finite].all()), float((error / bound)[finite].max())
