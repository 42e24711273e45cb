"""The kernels of class probabilities against their formula in float64, for rows and layouts that no matmul makes."""

from __future__ import annotations

import math

import pytest
import torch

import sslkernels as sk
from sslkernels.vocabulary.probability_rows import ProbabilityRows, TritonProbabilityRows
from sslkernels.vocabulary.softmax_rows import RowOptions

PLAIN = RowOptions(-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0)
EVERY = RowOptions(-100, label_smoothing=0.1, z_loss=1e-2, softcap=8.0, logit_scale=1.7)
KERNELS = {"torch": ProbabilityRows, "triton": TritonProbabilityRows}


@pytest.fixture(params=KERNELS)
def kernels(request, device):
    if request.param == "triton" and "triton" not in sk.available_backends("linear_cross_entropy", device):
        pytest.skip("Triton does not run here")
    return KERNELS[request.param]()


def results(kernels, logits, target, extra, options):
    """Losses and state, and the gradients that forward and backward write over the logits."""
    first, second = logits.clone(), logits.clone()
    coefficient = torch.linspace(0.5, 2, len(logits), dtype=torch.float64, device=logits.device)
    coefficient = coefficient.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    outputs = kernels.forward(first, target, *extra, options, stats=False, coefficient=coefficient, grad=first)
    kernels.backward(second, target, *extra, options, outputs.state, coefficient, second)
    alone = kernels.forward(logits.clone(), target, *extra, options, stats=False)
    assert torch.equal(alone.loss.nan_to_num(7), outputs.loss.nan_to_num(7))
    return *outputs[:4], first, second


def formula(logits, target, extra, options):
    """In float64."""
    x = logits.double().requires_grad_()
    bias, weight = (None if t is None else t.double() for t in extra)
    z = options.logit_scale * x if bias is None else options.logit_scale * x + bias
    z = options.softcap * torch.tanh(z / options.softcap) if options.softcap else z
    q = target.double() * (1 - options.label_smoothing) + options.label_smoothing / z.shape[1]
    q = q if weight is None else q * weight
    lse = z.logsumexp(1)
    loss = (q * (lse[:, None] - z)).sum(1) + options.z_loss * lse.square()
    coefficient = torch.linspace(0.5, 2, len(x), dtype=torch.float64, device=x.device)
    (gradient,) = torch.autograd.grad(loss, x, coefficient)
    row_max = z.amax(1)
    gradient = gradient / options.logit_scale  # of l, by which the caller multiplies
    return loss, row_max, (z - row_max[:, None]).exp().sum(1), q.sum(1), gradient, gradient


@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 129, 2048, 2501])
def test_against_float64(kernels, device, dtype, options, vocab):
    """Rows of one tile and several, with room for whole vectors or without; probabilities of any dtype and layout."""
    g = torch.Generator().manual_seed(vocab)
    rows = 3
    logits = (4 * torch.randn(rows, vocab, generator=g)).to(device, dtype)
    if vocab == 129:
        room = torch.full((rows, 136), math.nan, dtype=dtype, device=device)[:, :vocab]
        logits = room.copy_(logits)
    target = (
        torch.rand(vocab, rows, generator=g).pow(4).t() if vocab == 7 else torch.rand(rows, vocab, generator=g).pow(4)
    )
    target = (target / target.sum(1, keepdim=True)).to(torch.float16 if vocab == 129 else dtype).to(device)
    target[0] = 0
    extra = (None, None)
    if options is EVERY:
        extra = tuple(t.to(device, dtype) for t in torch.rand(2, vocab, generator=g).unbind())
    found = results(kernels, logits, target, extra, options)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for i, (got, want) in enumerate(zip(found, formula(logits, target, extra, options), strict=True)):
        bound = 64 * eps if i < 4 else 64 * eps + torch.finfo(dtype).eps
        assert (got.double() - want).norm() <= bound * want.norm() + 1e-30, i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_confident_row_keeps_its_digits(kernels, device, dtype):
    """The largest logit comes first, last, and in a later tile than others, whose offsets cost no digits."""
    for at in (0, 1, 2500):
        logits = torch.linspace(-8, 8, 2501, dtype=dtype, device=device).unsqueeze(0) + 1000
        logits[0, at] = 1040
        target = torch.zeros_like(logits)
        target[0, at] = 1
        loss, *_ = results(kernels, logits, target, (None, None), PLAIN)
        rest = torch.cat([logits[0, :at], logits[0, at + 1 :]]).double()
        want = torch.log1p((rest - 1040).exp().sum())
        assert abs(loss.item() / want.item() - 1) <= 64 * torch.finfo(dtype).eps


def test_numbers_that_are_none(kernels, device):
    """NaN and infinity stay in their rows; a logit of -inf costs nothing where its probability is 0."""
    inf, nan = math.inf, math.nan
    given = [
        ([1.0, -inf, 2.0], [0.5, 0.0, 0.5]),
        ([1.0, -inf, 2.0], [0.5, 0.25, 0.25]),
        ([-inf, 1.0, 0.0], [1.0, 0.0, 0.0]),
        ([1.0, nan, 2.0], [1.0, 0.0, 0.0]),
        ([1.0, inf, 2.0], [1.0, 0.0, 0.0]),
        ([inf, inf, 2.0], [1.0, 0.0, 0.0]),
        ([-inf, -inf, -inf], [1.0, 0.0, 0.0]),
        ([1.0, 0.0, 2.0], [nan, 0.0, 0.0]),
        ([1.0, 0.0, 2.0], [0.0, 0.0, 0.0]),
    ]
    logits, target = (torch.tensor(rows, device=device) for rows in zip(*given, strict=True))
    loss, _, _, _, first, second = results(kernels, logits, target, (None, None), PLAIN)
    assert loss.isinf().tolist() == [False, True, True, *[False] * 6]
    assert loss.isnan().tolist() == [False] * 3 + [True] * 5 + [False]
    torch.testing.assert_close(loss[0].item(), math.log1p(math.exp(-1)) + 0.5)
    assert loss[8] == 0
    for gradient in (first, second):
        assert gradient.isnan().any(1).tolist() == [False] * 3 + [True] * 5 + [False]
        assert not gradient[8].any()
