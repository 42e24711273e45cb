"""cross_entropy that computes its gradient in forward and keeps it, and the scaling of kept gradients, per backend."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from sslkernels.core.scale import scale_gradient, scale_gradient_
from sslkernels.vocabulary import cross_entropy as module

pytestmark = pytest.mark.pairwise

OP = "cross_entropy"
DTYPES = (torch.float32, torch.bfloat16)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0}


@pytest.fixture(autouse=True)
def _every_backend_keeps_the_gradient(monkeypatch):
    monkeypatch.setattr(module, "KEEPING_BACKENDS", ("cuda", "cpu", "triton", "reference"))


@pytest.fixture
def kept(monkeypatch):
    """The gradients computed in forward so far."""
    grads = []
    run = module._KeptLoss.run

    def recording(*args):
        loss, outputs, grad = run(*args)
        grads.append(grad)
        return loss, outputs, grad

    monkeypatch.setattr(module._KeptLoss, "run", staticmethod(recording))
    return grads


def problem(device, dtype=torch.float32, rows=17, vocab=67):
    g = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(rows, vocab, generator=g)).to(device, dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=g).to(device)
    target[::4] = -100
    return logits, target


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_that_of_eager(backend, dtype, reduction, options, device, kept):
    logits, target = problem(device, dtype)
    grad_output = torch.tensor(0.625, device=device)
    loss, stats = sk.cross_entropy(logits, target, reduction=reduction, return_stats=True, **options)
    (grad,) = torch.autograd.grad(loss, logits, grad_output)
    assert len(kept) == 1
    exact = logits.detach().double().requires_grad_()
    truth = oracle.cross_entropy(exact, target, reduction=reduction, **options)
    (true_grad,) = torch.autograd.grad(truth, exact, grad_output.double())
    eager = oracle.cross_entropy(logits, target, reduction=reduction, **options)
    (eager_grad,) = torch.autograd.grad(eager, logits, grad_output.to(eager.dtype))
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert oracle.error(loss, truth) <= oracle.error(eager, truth) + 4 * torch.finfo(torch.float32).eps
    # One rounding when the gradient is stored, and one when it is scaled.
    assert oracle.error(grad, true_grad) <= oracle.error(eager_grad, true_grad) + torch.finfo(dtype).eps
    assert stats.lse.shape == target.shape
    assert not stats.lse.requires_grad


def test_a_scale_of_one_costs_nothing(backend, device, kept):
    logits, target = problem(device)
    (grad,) = torch.autograd.grad(sk.cross_entropy(logits, target), logits)
    assert grad.data_ptr() == kept[0].data_ptr()


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("scale", [1.0, 0.5, 65536.0])
def test_a_retained_graph_keeps_its_gradient(backend, scale, device, kept):
    logits, target = problem(device)
    loss = sk.cross_entropy(logits, target)
    before = kept[0].clone()
    grad_output = torch.tensor(scale, device=device)
    (first,) = torch.autograd.grad(loss, logits, grad_output, retain_graph=True)
    first_copy = first.clone()
    first.mul_(7)  # the user owns the returned tensor
    (second,) = torch.autograd.grad(loss, logits, grad_output, retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits, 2 * grad_output)
    assert torch.equal(first_copy, before * scale)
    assert torch.equal(second, first_copy)
    assert torch.equal(third, 2 * first_copy)


@pytest.mark.full_for(backend="triton")
def test_gradients_accumulate(backend, device):
    logits, target = problem(device)
    loss = sk.cross_entropy(logits, target)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_backward_after_release_raises(backend, device):
    logits, target = problem(device)
    loss = sk.cross_entropy(logits, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.full_for(backend="triton")
def test_double_backward_raises(backend, device):
    logits, target = problem(device)
    (grad,) = torch.autograd.grad(sk.cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(grad.square().sum() + logits.square().sum(), logits)


def test_the_graph_does_not_save_the_logits(backend, device):
    """It saves an empty anchor instead."""
    logits, target = problem(device)
    leaf = torch.ones((), device=device, requires_grad=True)
    product = logits.detach() * leaf
    loss = sk.cross_entropy(product, target)
    saved = [t for t in loss.grad_fn.saved_tensors if t is not None]
    assert {t.data_ptr() for t in saved}.isdisjoint({product.data_ptr()})
    expected = (torch.autograd.grad(sk.cross_entropy(product, target), product)[0] * logits.detach()).sum()
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_all_rows_ignored(backend, device):
    logits, target = problem(device)
    loss = sk.cross_entropy(logits, torch.full_like(target, -100))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert not grad.any()


def test_zero_rows(backend, device):
    logits = torch.empty(0, 5, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    assert sk.cross_entropy(logits, target).isnan()
    loss = sk.cross_entropy(logits, target, reduction="sum")
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 5)


@pytest.mark.parametrize("shape", [(2, 11, 5), (3, 11, 2, 2)])
def test_other_layouts(backend, shape, device):
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randint(0, 11, (shape[0], *shape[2:]), device=device)
    weight = torch.rand(11, device=device)
    loss = sk.cross_entropy(logits, target, weight)
    want = torch.nn.functional.cross_entropy(logits, target, weight)
    torch.testing.assert_close(loss, want)
    grads = (torch.autograd.grad(value, logits)[0] for value in (loss, want))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "what", ["float16", "float64", "none", "no_grad", "frozen", "compiled", "checkpoint"],
)  # fmt: skip
def test_cases_without_a_kept_gradient(backend, what, device, kept):
    dtype = {"float16": torch.float16, "float64": torch.float64}.get(what, torch.float32)
    logits, target = problem(device, dtype)
    if what == "frozen":
        logits = logits.detach()
    with torch.set_grad_enabled(what != "no_grad"):
        if what == "compiled":
            torch.compile(sk.cross_entropy, fullgraph=True, backend="aot_eager")(logits, target)
        elif what == "checkpoint":
            checkpoint(sk.cross_entropy, logits, target, use_reentrant=False).backward()
        else:
            sk.cross_entropy(logits, target, reduction="none" if what == "none" else "mean")
    assert kept == []


def test_only_the_cuda_backend_keeps_it_by_default(monkeypatch, backend, device, kept):
    monkeypatch.undo()
    logits, target = problem(device)
    loss = sk.cross_entropy(logits, target)
    assert (type(loss.grad_fn).__name__ == "_KeptLossBackward") == (backend == "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 4097])
def test_scaling(backend, count, dtype, device):
    values = torch.randn(count, device=device).to(dtype)
    scale = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    want = values.double() * scale.double()
    for other in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        got = scale_gradient(values, scale, other)
        assert got.dtype == other
        computed = torch.float64 if dtype == other == torch.float64 else torch.float32
        rounding = torch.finfo(other).eps / 2 + torch.finfo(computed).eps
        bound = rounding * want.abs() + torch.finfo(other).smallest_normal
        assert bool(((got.double() - want).abs() <= bound).all())
    same = values.clone()
    scale_gradient_(same, torch.ones_like(scale))
    assert torch.equal(same, values)
    scale_gradient_(same, scale)
    assert torch.equal(same, scale_gradient(values, scale, dtype))
